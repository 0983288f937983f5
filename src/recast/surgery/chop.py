"""Keep, drop and scale the modules of an adapter, in the file's own names, dtypes and alphas.

    dW' = w dW      w multiplied into one factor once, the one that rounds least; alpha stays
    w = 0           the module is not written
    w = 1           its bytes are copied

A power of two is exact to the bit. Full changes (.diff, .diff_b, w_norm, b_norm) are scaled as they
are. DoRA, LoHa, LoKr … can be kept or dropped, which needs no arithmetic, and are refused for any
other weight. The tools in use multiply w into both factors and alpha, which makes w^3 of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from recast.adapter.file import kohya_hashes
from recast.adapter.formats import FULL_SUFFIXES, open_raw
from recast.checkpoint import Checkpoint, write
from recast.commit import commit, refuse_target
from recast.errors import Refused
from recast.layout import Layout
from recast.layout.loras import NETWORKS, PEFT, parse
from recast.layout.peft import CONFIG
from recast.surgery.contents import Held, held
from recast.surgery.header import Size, configured, noted, stated, targeted
from recast.surgery.weights import Weights, refuse_unknown


@dataclass(frozen=True)
class Chopped:
    """The files written, and how many of the modules are in them."""

    files: tuple[Path, ...]
    kept: int
    dropped: int
    bytes: int


def scaled(tensor: Tensor, weight: float) -> Tensor:
    """weight * tensor in the tensor's dtype, rounded once."""
    return (tensor.double() * weight).to(tensor.dtype)


def chop(
    source: Path,
    out: Path,
    weights: Weights,
    *,
    layout: Layout | None = None,
    force: bool = False,
) -> Chopped:
    """Write an adapter with its modules weighted; a PEFT folder becomes a folder.

    layout: of the checkpoint, needed where the architecture is neither SDXL nor SD 1.5. Raises
    Refused for unknown names, for weights of a parametrization that cannot be scaled, and where
    nothing would be left.
    """
    source = Path(source)
    with open_raw(source, layout, strangers=True) as raw:
        modules, plan = held(raw, source, layout)
        refuse_unknown(weights, plan, [module.spot for module in modules])
        chosen = weigh(source, modules, weights)
        files = {module.tensors.file.path: module.tensors.file for module in modules}
        targets = {path: out / path.relative_to(source) if source.is_dir() else out
                   for path in files}  # fmt: skip
        for target in targets.values():
            refuse_target(target, force=force, sources=list(files))
        written: list[Path] = []
        for path, file in files.items():
            mine = [(m, w) for m, w in chosen if m.tensors.file is file]
            if mine:
                written += _write(file, targets[path], mine, raw.form, weights, force)
    size = sum(path.stat().st_size for path in written)
    kept = sum(weight != 0 for _, weight in chosen)
    return Chopped(tuple(written), kept, len(modules) - kept, size)


def weigh(path: Path, modules: Sequence[Held], weights: Weights) -> list[tuple[Held, float]]:
    """The modules that will be written, with their weights.

    Weight 0 stays in the list for the `out_proj` of a text encoder's attention whose q, k or v
    are kept: diffusers drops such an attention without it, so zeros are written.
    """
    found = {module.spot.lora: (module, weights.of(module.spot)) for module in modules}
    kept = {lora for lora, (_, weight) in found.items() if weight}
    if not kept:
        raise Refused(
            f"{path}: nothing would be left of its {len(found)} modules with {weights}; keep some."
        )
    odd = [m for m, w in found.values() if m.foreign and w not in (0, 1)]
    if odd:
        raise Refused(
            f"{path}: {odd[0].spot.lora} holds {odd[0].foreign[0]}, whose change is not in "
            f"proportion to its tensors; {len(odd)} such modules can be kept or dropped (weight 1 "
            "or 0), not scaled."
        )
    needed = {f"{lora.rpartition('_self_attn_')[0]}_self_attn_out_proj" for lora in kept
              if "_self_attn_" in lora}  # fmt: skip
    needed -= {m.spot.lora for m, _ in found.values() if m.foreign}
    return [pair for lora, pair in found.items() if lora in kept | needed]


def factor(module: Held, weight: float) -> str:
    """The factor that takes the weight: the one that rounds least, `up` if both round alike."""
    errors: dict[str, float] = {}
    for suffix in ("lora_up.weight", "lora_down.weight"):
        exact = module.tensors[suffix].double() * weight
        gap = scaled(module.tensors[suffix], weight).double() - exact
        error = (gap.norm() / exact.norm().clamp_min(1e-300)).item()
        errors[suffix] = error if math.isfinite(error) else math.inf
    best = min(errors, key=lambda suffix: errors[suffix])
    if math.isinf(errors[best]):
        raise Refused(
            f"{module.spot.lora} holds NaN or infinity, or leaves the range of its dtype at weight "
            f"{weight:g}; give a smaller one, or export the file in fp32 first."
        )
    return best


def _write(
    file: Checkpoint,
    out: Path,
    chosen: list[tuple[Held, float]],
    form: str,
    weights: Weights,
    force: bool,
) -> list[Path]:
    """One file of the result, and PEFT's configuration beside it."""
    owners = {
        key: (module, weight, suffix)
        for module, weight in chosen
        for suffix, key in module.tensors.keys_in_file.items()
    }
    takers = {
        module.spot.lora: factor(module, weight)
        for module, weight in chosen
        if weight not in (0, 1) and module.rank is not None
    }
    specs = {key: (spec.dtype, spec.shape) for key, spec in file.specs.items() if key in owners}

    def read(key: str) -> Tensor:
        module, weight, suffix = owners[key]
        touched = suffix == takers.get(module.spot.lora, "lora_up.weight")
        if weight == 1 or not (touched or suffix in FULL_SUFFIXES):
            return file[key]
        return scaled(file[key], weight) if weight else torch.zeros_like(file[key])

    def stream() -> Iterator[tuple[str, Tensor]]:
        for key in specs:
            yield key, read(key)

    paths: dict[str, list[str]] = {part: [] for part in NETWORKS}
    for module, _ in chosen:
        paths[module.spot.part].append(_path(module))
    header = stated(file.metadata, [size for m, _ in chosen if (size := _size(m))])
    header = configured(noted(header, str(weights), file.sha256()), paths)
    if form == "kohya":
        header |= kohya_hashes(specs, read, header)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, specs, stream(), header, force=force, sources=[file.path])
    if form != "peft":
        return [out]
    here = [path for found in paths.values() for path in found]
    config = json.loads((file.path.parent / CONFIG).read_text(encoding="utf-8"))
    text = json.dumps(targeted(config, here), indent=2, sort_keys=True).encode()
    commit(out.parent / CONFIG, partial(_put, text), size=len(text), force=force)
    return [out, out.parent / CONFIG]


def _put(text: bytes, target: BinaryIO) -> None:
    target.write(text)


def _size(module: Held) -> Size | None:
    if module.rank is None:
        return None
    shape = module.tensors.spec("lora_down.weight").shape
    alpha = module.tensors["alpha"].double().item() if "alpha" in module.tensors else module.rank
    return Size(module.rank, float(alpha), max(shape[2:], default=1) > 1)


def _path(module: Held) -> str:
    """A module's path in its network, from diffusers' or PEFT's key; kohya's keys have none."""
    suffix, key = next(iter(module.tensors.keys_in_file.items()))
    found = parse(key)
    head = found[0] if found else key.removesuffix(f".{suffix}")
    for start in (PEFT, *(f"{network}." for network in NETWORKS.values())):
        head = head.removeprefix(start)
    return head
