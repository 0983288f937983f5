"""Write an adapter in another format without changing a number that need not change.

Works on the file's own tensors: dtypes stay, Tucker cores are multiplied out. What a loader would
misread is never written:

    several alphas      kohya, comfy: one for the file (diffusers gives every layer the majority's)
    alpha other than r  diffusers: folded into `up`, for ComfyUI looks for alpha tensors only; the
                        old alpha is kept in `recast.alpha`, and comes back in the other formats
    text encoder        a zero out_proj beside q, k, v (diffusers drops attention without one)
    full entries        refused for PEFT and diffusers, which have no place for them
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from recast.adapter.file import Adapter, file_metadata, kohya_hashes
from recast.adapter.formats import read_raw
from recast.adapter.pairs import Pair, commonest, one_alpha, padded_pairs, taken, zero_pairs
from recast.adapter.spelling import Module, modules, plan_of, shapes
from recast.checkpoint import dtype_name, write_dict
from recast.commit import commit, refuse_target
from recast.errors import Refused
from recast.layout import Layout, Plan
from recast.layout.loras import FORMATS, NETWORKS
from recast.layout.peft import CONFIG, METADATA, WEIGHTS
from recast.lowrank import LowRank


def export(
    source: Path,
    out: Path,
    form: str,
    *,
    layout: Layout | None = None,
    dtype: str | None = None,
    padded: bool = False,
    force: bool = False,
) -> list[Path]:
    """Write an adapter in one of FORMATS and return the files written.

    out: a file, or for PEFT a folder. layout: of the checkpoint, needed where the names alone do
    not tell the architecture. padded: zeros fill every module up to the largest rank, for trainers
    that know one rank only. dtype None keeps each tensor's.
    """
    if form not in FORMATS:
        raise Refused(f"{form!r} is no adapter format: choose {', '.join(FORMATS)}.")
    raw = read_raw(source, layout)
    pairs, full = taken(source, raw, dtype)
    if layout is not None:
        _refuse_other_shapes(pairs, layout.plan, source)
    if padded:
        pairs = padded_pairs(pairs | zero_pairs(pairs))
    return write_pairs(out, form, pairs, full, raw.metadata, raw.plan, source, force=force)


def write_pairs(
    out: Path,
    form: str,
    pairs: Mapping[str, Pair],
    full: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    plan: Plan | None,
    source: Path,
    *,
    force: bool = False,
) -> list[Path]:
    """Write factors and full changes (`module.suffix`) in one of FORMATS; returns the files.

    plan: the architecture, which kohya's names can do without; None: the full-size one that has
    all modules. source: the file that sentences are about.
    """
    if full and form in ("peft", "diffusers"):
        raise Refused(
            f"{source} changes {len(full)} tensors as a whole, first {', '.join(list(full)[:3])}, "
            f"and {form} has no place for that; choose kohya or comfy."
        )
    pairs = {**pairs, **zero_pairs(pairs)}
    refuse_target(out / CONFIG if form == "peft" else out, force=force)
    if form == "kohya":
        names: Mapping[str, Module] = {}
    else:
        found = plan or _guess(source, [*pairs, *_heads(full)], metadata, pairs)
        names = _modules(found, [*pairs, *_heads(full)], source)
    # kohya's hashes are of the tensors under kohya's names
    plain = {k: v for k, v in metadata.items() if not k.startswith("sshs_")}
    if form == "peft":
        return _write_peft(out, pairs, names, plain, force)
    if form == "diffusers":
        return [_write_diffusers(out, pairs, names, plain, force)]
    heads = {lora: module.comfy() for lora, module in names.items()}
    return [_write_tensors(out, pairs, full, heads, metadata, force)]


def _write_tensors(
    out: Path,
    pairs: Mapping[str, Pair],
    full: Mapping[str, Tensor],
    heads: Mapping[str, str],
    metadata: Mapping[str, str],
    force: bool,
) -> Path:
    """kohya's file, or ComfyUI's where heads gives it other names."""
    alpha = one_alpha(pairs, metadata)
    tensors: dict[str, Tensor] = {}
    for lora, pair in pairs.items():
        head = heads.get(lora, lora)
        tensors[f"{head}.lora_up.weight"] = pair.scaled(alpha).raised()
        tensors[f"{head}.lora_down.weight"] = pair.down
        tensors[f"{head}.alpha"] = torch.tensor(alpha)
    for name, tensor in full.items():
        lora, _, suffix = name.partition(".")
        tensors[f"{heads.get(lora, lora)}.{suffix}"] = tensor
    old = {k: v for k, v in metadata.items() if k != "recast.alpha"}
    shapes = {f"{lora}.weight": LowRank(p.up, p.down) for lora, p in pairs.items()}
    made = file_metadata(Adapter(shapes, old), {}, alpha)
    kept = {k: v for k, v in old.items() if not k.startswith(("ss_network_", "sshs_"))}
    header = {**made, **kept}
    specs = {key: (dtype_name(t.dtype), tuple(t.shape)) for key, t in tensors.items()}
    header |= kohya_hashes(specs, lambda key: tensors[key], header)
    write_dict(out, tensors, header, force=force)
    return out


def _write_diffusers(
    out: Path,
    pairs: Mapping[str, Pair],
    names: Mapping[str, Module],
    metadata: Mapping[str, str],
    force: bool,
) -> Path:
    alphas = {pair.alpha for pair in pairs.values()}
    unlike = any(pair.alpha != pair.rank for pair in pairs.values())
    plain = {lora: pair.scaled(float(pair.rank)) for lora, pair in pairs.items()}
    tensors: dict[str, Tensor] = {}
    configs: dict[str, Any] = {}
    for part, network in NETWORKS.items():
        mine = {names[lora].path: p for lora, p in plain.items() if names[lora].part == part}
        if mine:
            configs |= {f"{network}.{k}": v for k, v in _config(mine).items()}
    for lora, pair in plain.items():
        head = names[lora].diffusers()
        tensors[f"{head}.lora_A.weight"] = pair.down
        tensors[f"{head}.lora_B.weight"] = pair.raised()
    header = {**metadata, "format": "pt", METADATA: json.dumps(configs, sort_keys=True)}
    if unlike and len(alphas) == 1:
        header["recast.alpha"] = str(alphas.pop())
    write_dict(out, tensors, header, force=force)
    return out


def _write_peft(
    out: Path,
    pairs: Mapping[str, Pair],
    names: Mapping[str, Module],
    metadata: Mapping[str, str],
    force: bool,
) -> list[Path]:
    """One folder a network, as PEFT's own training scripts lay them out; one alone is `out`."""
    parts = {part for part in NETWORKS if any(names[lora].part == part for lora in pairs)}
    written = []
    for part in (part for part in NETWORKS if part in parts):
        folder = out if len(parts) == 1 else out / NETWORKS[part]
        folder.mkdir(parents=True, exist_ok=True)
        mine = {lora: pair for lora, pair in pairs.items() if names[lora].part == part}
        tensors: dict[str, Tensor] = {}
        for lora, pair in mine.items():
            head = names[lora].peft()
            tensors[f"{head}.lora_A.weight"] = pair.down
            tensors[f"{head}.lora_B.weight"] = pair.raised()
        config = PEFT_CONFIG | _config({names[lora].path: pair for lora, pair in mine.items()})
        text = json.dumps(config, indent=2, sort_keys=True).encode()
        header = {**metadata, "format": "pt", "recast.part": part}
        write_dict(folder / WEIGHTS, tensors, header, force=force)
        commit(folder / CONFIG, partial(_put, text), size=len(text), force=force)
        written += [folder / WEIGHTS, folder / CONFIG]
    return written


def _put(text: bytes, file: BinaryIO) -> None:
    file.write(text)


PEFT_CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "use_rslora": False,
}


def _config(pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """Ranks and alphas of one network's modules by their paths, as PEFT's LoraConfig has them.

    Paths are without `text_model.`: PEFT matches their ends.
    """
    flat = {path.removeprefix("text_model."): pair for path, pair in pairs.items()}
    rank = commonest(pair.rank for pair in flat.values())
    alpha = commonest(pair.alpha for pair in flat.values())
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {path: p.rank for path, p in flat.items() if p.rank != rank},
        "alpha_pattern": {path: p.alpha for path, p in flat.items() if p.alpha != alpha},
        "target_modules": sorted(flat),
    }


def _heads(full: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in full}


def _guess(
    path: Path, loras: list[str], metadata: Mapping[str, str], pairs: Mapping[str, Pair]
) -> Plan:
    sizes = {lora: (len(pair.up), pair.down.shape[1]) for lora, pair in pairs.items()}
    spots = {lora: ("", sizes.get(lora, (0, 0))) for lora in loras}
    return plan_of(spots, metadata, str(path))


def _refuse_other_shapes(pairs: Mapping[str, Pair], plan: Plan, path: Path) -> None:
    """Refuse factors that do not meet the architecture's weights; a 1x1 kernel may be left out."""
    known = shapes(plan)
    wrong = [
        lora
        for lora, pair in pairs.items()
        if lora in known and prod(known[lora]) != len(pair.up) * prod(pair.down.shape[1:])
    ]
    if wrong:
        raise Refused(
            f"{len(wrong)} of {len(pairs)} modules of {path} have other shapes than --model's, "
            f"first {', '.join(wrong[:5])}; give the checkpoint it was made for."
        )


def _modules(plan: Plan, loras: list[str], path: Path) -> dict[str, Module]:
    known = modules(plan)
    lost = [lora for lora in loras if lora not in known]
    if lost:
        raise Refused(
            f"{len(lost)} of {len(loras)} modules of {path} are none of this architecture "
            f"({plan.family}), first {', '.join(lost[:5])}; name the checkpoint it was made for "
            "with --model."
        )
    return {lora: known[lora] for lora in loras}
