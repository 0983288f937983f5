"""What each stage of a conversion holds on the device, forecast from SDXL's true shapes.

    python bench/stages.py          write the table; nothing but shapes is computed, in seconds

The networks are built without weights (torch's meta device) and asked for as the stages ask for
them, so that they take turns as in a run: `held` are the weights on the device. `alive` are the
tensors of one call that are alive at once, at most, counted operation by operation. Attention keeps
no matrix, as in the fused kernels that a GPU has for it. What an operation needs while it runs, a
convolution's workspace for one, is not counted, nor what the driver takes.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _live import Live
from size import Generated

from recast.adapter.forecast import readout
from recast.checkpoint import Checkpoint
from recast.layout import SD15, SDXL, Layout, detect
from recast.layout.blueprint import Plan, blueprint
from recast.model.parts import Parts

if TYPE_CHECKING:
    import torch
    from torch import nn

    from recast.model import Model

RESULTS = Path(__file__).parent / "results"
PLANS = {"sdxl": (SDXL, 1024), "sd15": (SD15, 512)}
DTYPES = {"bf16": 2, "fp32": 4}  # and the bytes of a number
PROMPTS = 32  # that the text encoders take together
Row = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """One thing that a stage asks of its networks: who is on the device meanwhile, in bytes."""

    name: str
    parts: str
    held: int
    alive: int

    @property
    def total(self) -> int:
        return self.held + self.alive


class Hollow(Parts):
    """Networks that nothing can be copied out of: to leave is all they have to do."""

    def alone(self, name: str) -> None:
        for place in self.room:
            place.here = place.here and place.kind == self.places[name].kind


def model_of(plan: Plan, side: int, dtype: str) -> Model:
    """A model whose weights are shapes."""
    import torch

    from recast.convert.training import PRECISION
    from recast.model import Model
    from recast.objective import EPS

    checkpoint = Checkpoint(Generated.path, store=Generated(plan))
    layout, device = detect(checkpoint), torch.device("meta")
    chosen = dict.fromkeys(("unet", *layout.text_parts), PRECISION[dtype])
    chosen["vae"] = torch.float32
    parts = Hollow(
        {part: partial(hollow, layout, part, each) for part, each in chosen.items()}, device
    )
    return Model(
        checkpoint, layout, parts, EPS, side, PRECISION[dtype], device, layout.scaling,
        layout.shift,
    )  # fmt: skip


def hollow(layout: Layout, part: str, dtype: torch.dtype) -> nn.Module:
    """A network without weights."""
    import torch

    from recast.model.load import build

    module = build(layout, part).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    return module.to(torch.device("meta"))


@contextmanager
def fused() -> Iterator[None]:
    """Attention as a GPU's kernels have it, which answer and keep no matrix."""
    import torch
    import torch.nn.functional as F

    kept = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, **how: torch.empty_like(q)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = kept


def calls(model: Model) -> Iterator[Call]:
    """What the stages ask for, at the model's own size; pictures one at a time."""
    import torch

    texts, side = model.layout.text_parts, model.size
    prompts = [f"a picture of {number} boats" for number in range(PROMPTS)]
    x = torch.empty(2, *model.latent_shape(), device=model.device)
    picture = torch.empty(1, 3, side, side, device=model.device)
    half = torch.full((2,), 0.5)
    condition = model.condition(["", ""])
    yield counted("prompts", texts, model, lambda: model.condition(prompts))
    yield counted("encode", ("vae",), model, lambda: model.encode(picture))
    yield counted("paint", ("unet",), model, lambda: model.net(condition)(x, half))
    yield counted("decode", ("vae",), model, lambda: model.decode(x[:1]))


def counted(name: str, parts: Sequence[str], model: Model, ask: Callable[[], object]) -> Call:
    """Open, ask, and count."""
    import torch

    for part in parts:
        model.part(part)
    with torch.no_grad(), fused(), Live() as live:
        ask()
    assert isinstance(model.parts, Parts)
    here = {part: place.module for part, place in model.parts.places.items() if place.here}
    held = sum(p.nbytes for module in here.values() if module for p in module.parameters())
    return Call(name, " + ".join(here), held, live.peak)


STAGES = {
    "encode images": ("prompts", "encode"),
    "dream": ("prompts", "paint"),
    "what validation and previews are held against": ("prompts", "paint", "decode"),
    "report: the original, then the converted model": ("prompts", "paint", "decode"),
}


def rows() -> Iterator[Row]:
    """Each stage of each family, in each precision, and the training step beside them."""
    for family, (plan, side) in PLANS.items():
        whole = sum(math.prod(shape) for shape in blueprint(plan).values()) * 4
        for dtype, size in DTYPES.items():
            model = model_of(plan, side, dtype)
            found = {call.name: call for call in calls(model)}
            about = {"family": family, "side": side, "dtype": dtype, "before": whole}
            for name, asked in STAGES.items():
                turns = [asdict(found[each]) for each in asked]
                peak = max(found[each].total for each in asked)
                yield {**about, "stage": name, "turns": turns, "peak": peak}
            step = readout(model.layout, "full", side, trunk_bytes=size)
            held = step.trunk + step.adapter + found["decode"].held
            alive = step.activations + step.working
            turns = [asdict(Call("step", "unet + vae + what is trained", held, alive))]
            yield {**about, "stage": "train", "turns": turns, "peak": held + alive}


def page(found: list[Row]) -> str:
    """Everything as Markdown."""
    lines = ["# bench/stages", "", (__doc__ or "").strip(), ""]
    for (family, side, dtype), some in groupby(found, key=itemgetter("family", "side", "dtype")):
        stages = list(some)
        lines += [f"## {family}, {side} pixels, {dtype}", "", *table(stages), ""]
        before = stages[0]["before"] / 1e9
        lines += [f"The whole checkpoint in fp32, which was opened before: {before:.2f} GB.", ""]
    return "\n".join(lines)


def table(stages: list[Row]) -> list[str]:
    """A line for every stage: who is there in turn, with weights + tensors in GB."""
    lines = ["| stage | in turn: weights + tensors of a call | at most |", "|---|---|--:|"]
    for row in stages:
        turns = "; ".join(
            f"{turn['parts']} {turn['held'] / 1e9:.2f} + {turn['alive'] / 1e9:.2f}"
            for turn in row["turns"]
        )
        lines.append(f"| {row['stage']} | {turns} | {row['peak'] / 1e9:.2f} GB |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    found = list(rows())
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "stages.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "stages.md").write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
