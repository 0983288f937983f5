"""What a split would give, and what training it would take, before anything is written.

Memory for one training step, in bytes:

    trunk        parameters x bytes of the trunk's dtype; of a quantised base 8.5 or 4.5 bits for
                 each weight of a block, and the largest of them dense, which is one at a time
    adapter      20 an entry: master, start, gradient and Adam's two moments, all fp32
    activations  what autograd keeps of one forward pass, a pixel of a level of width C:
                   residual cell   3 (C_in + C) + C
                   transformer     3 C + 29 C a block (6 norms, 4 q k v q, 4 attention outputs,
                                   12 C of the gated layer, 3 of its surroundings)
                 (within a tenth of what autograd really keeps; attention keeps no matrix)

Where only the read-out is trained (a conversion), in full rank:

    trunk        the read-out's own weights are never quantised; a layer is made dense in its dtype
    adapter      16 an entry: master, gradient, Adam's two moments; the summed weight in the
                 trunk's dtype besides
    activations  of the last level's cells 3 (C_in + C) and the transformer's as above, and 3 C of
                 the output layers; of the trunk nothing
    working      what the way back holds at once: three times the widest input of a cell

It is an estimate for planning: allocators round up, and no checkpointing of activations is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Container, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

from recast.adapter.decompose import matrices
from recast.adapter.file import DTYPES
from recast.adapter.places import read_site, refuse_residual
from recast.adapter.ranks import Ranks, ranks
from recast.checkpoint import Checkpoint
from recast.events import Event, Stage, Tick
from recast.layout import Layout, Site, detect
from recast.layout.blueprint import UNetPlan
from recast.layout.sites import MATRICES
from recast.lowrank import spectrum
from recast.quantise import BASES, BITS, in_block

ADAPTER_BYTES = 20
READOUT_BYTES = 16


@dataclass(frozen=True)
class Row:
    """One block: modules, smallest and largest rank, share of squared norm held, entries."""

    block: str
    modules: int
    ranks: tuple[int, int]
    energy: float
    parameters: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step."""

    trunk: int
    adapter: int
    activations: int
    working: int = 0

    @property
    def total(self) -> int:
        return self.trunk + self.adapter + self.activations + self.working


@dataclass(frozen=True)
class Forecast:
    """The rows in the order of the network, their sum, the adapter's file size, and the memory.

    memory: on a full, an 8-bit and a 4-bit base. size: pixels of a side, and pictures a step.
    """

    rows: tuple[Row, ...]
    total: Row
    adapter_bytes: int
    memory: Mapping[str, Memory]
    size: tuple[int, int]


def forecast(
    checkpoint: Checkpoint,
    sites: Iterable[Site],
    rank: int | Sequence[str] | Ranks,
    *,
    adapter_dtype: str = "F16",
    resolution: int | None = None,
    batch: int = 1,
    trunk_bytes: int = 2,
) -> Generator[Event, None, Forecast]:
    """Read every chosen weight's singular values and say what its rank would hold.

    resolution: pixels of a side, the family's own (1024, 512) if None. trunk_bytes: of a number in
    the frozen network and its activations, 2 for bf16.
    """
    refuse_residual(checkpoint)
    rules, chosen = ranks(rank), matrices(sites)
    rules.check(chosen)
    blocks: dict[str, list[tuple[int, float, float, int]]] = {}
    yield Stage("weigh", len(chosen), "layers")
    for number, site in enumerate(chosen, 1):
        weight = read_site(checkpoint, site)
        singular = spectrum(weight, name=site.key).double()
        squares = singular.square()
        whole = squares.sum().item()
        count = max(1, rules.of(site).count(singular, whole**0.5))
        size = count * (site.shape[0] + weight.numel() // site.shape[0])
        held = squares[:count].sum().item()
        blocks.setdefault(site.block, []).append((count, held, whole, size))
        yield Tick(number)
    rows = tuple(_row(block, found) for block, found in blocks.items())
    total = _row("all", [one for found in blocks.values() for one in found])
    layout = detect(checkpoint)
    pixels = resolution or (1024 if layout.family == "sdxl" else 512)
    kept = activations(layout.plan.unet, pixels // 8, pixels // 8) * batch * trunk_bytes
    factors = total.parameters * ADAPTER_BYTES
    memory = {base: Memory(trunk(layout, base, trunk_bytes), factors, kept) for base in BASES}
    size = total.parameters * DTYPES[adapter_dtype].itemsize + 4 * len(chosen)
    return Forecast(rows, total, size, memory, (pixels, batch))


def trunk(layout: Layout, base: str, trunk_bytes: int, whole: Container[str] = ()) -> int:
    """Bytes of the UNet's frozen weights on a base, with the dense weight that one layer needs.

    whole: the modules that are trained in full rank and so never quantised; none where factors are.
    """
    every = layout.sites("unet")
    numbers = sum(math.prod(site.shape) for site in every)
    if base == "full":
        return numbers * trunk_bytes
    inside = [
        math.prod(site.shape)
        for site in every
        if site.param == "weight"
        and site.kind in MATRICES
        and in_block(site.module)
        and site.module not in whole
    ]
    packed = sum(inside) * BITS[base] / 8
    # the sum of a residual and its factors is fp32
    dense = max(inside) * (trunk_bytes if whole else 4 + trunk_bytes)
    return round((numbers - sum(inside)) * trunk_bytes + packed + dense)


def readout(
    layout: Layout, base: str, side: int, *, batch: int = 1, trunk_bytes: int = 2
) -> Memory:
    """Memory of one step of a conversion by the read-out, of pictures of `side` pixels.

    Only the UNet is there: text encoders and VAE are let go of once the caches are written.
    """
    plan = layout.plan.unet
    trained = layout.sites("readout")
    entries = sum(math.prod(site.shape) for site in trained)
    pixels = batch * math.ceil(side / 8) ** 2
    wide = plan.widths[0]
    cells = readout_cells(plan)
    inside = sum(_cell(narrow, wide, plan.depths[0]) - wide for narrow in cells)
    kept = pixels * (inside + 3 * wide)
    working = pixels * 3 * max(cells)
    return Memory(
        trunk(layout, base, trunk_bytes, {site.module for site in trained}),
        entries * (READOUT_BYTES + trunk_bytes),
        kept * trunk_bytes,
        working * trunk_bytes,
    )


def readout_cells(plan: UNetPlan) -> list[int]:
    """Channels that enter each residual cell of the last up block, with the skip's."""
    below = plan.widths[1] if len(plan.widths) > 1 else plan.widths[0]
    first = plan.widths[0]
    return [below + first] + [2 * first] * plan.layers


def activations(plan: UNetPlan, height: int, width: int) -> int:
    """Numbers that autograd keeps of one picture's pass; height and width in latent pixels."""
    total = plan.widths[0] * height * width
    skips, narrow = [plan.widths[0]], plan.widths[0]
    last = len(plan.widths) - 1
    for level, (wide, depth) in enumerate(zip(plan.widths, plan.depths, strict=True)):
        pixels = -(-height // 2**level) * -(-width // 2**level)
        for _ in range(plan.layers):
            total += pixels * _cell(narrow, wide, depth)
            skips.append(narrow := wide)
        if level < last:
            total += pixels * wide
            skips.append(wide)
    pixels = -(-height // 2**last) * -(-width // 2**last)
    total += pixels * (_cell(narrow, narrow, plan.middle) + _cell(narrow, narrow, 0))
    for level in reversed(range(last + 1)):
        wide, depth = plan.widths[level], plan.depths[level]
        pixels = -(-height // 2**level) * -(-width // 2**level)
        for _ in range(plan.layers + 1):
            total += pixels * _cell(narrow + skips.pop(), wide, depth)
            narrow = wide
        total += 4 * pixels * wide if level else 0  # the enlarged input of the next level
    return total + 3 * height * width * plan.widths[0]


def _cell(narrow: int, wide: int, depth: int) -> int:
    """Numbers a pixel that a residual cell and its transformer keep."""
    cell = 3 * (narrow + wide) + wide
    return cell + (3 * wide + 29 * wide * depth if depth else 0)


def _row(block: str, found: list[tuple[int, float, float, int]]) -> Row:
    counts = [count for count, *_ in found]
    held, whole = sum(one[1] for one in found), sum(one[2] for one in found)
    share = held / whole if whole else 1.0
    return Row(block, len(found), (min(counts), max(counts)), share, sum(one[3] for one in found))
