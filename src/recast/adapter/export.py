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
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from recast.adapter.file import DTYPES, Adapter, file_metadata, kohya_hashes, zero_out_proj
from recast.adapter.formats import Raw, plain_factors, read_raw
from recast.adapter.spelling import Module, modules, plan_of
from recast.checkpoint import dtype_name, write_dict
from recast.commit import commit, refuse_target
from recast.errors import Refused
from recast.layout import Layout, Plan
from recast.layout.loras import FORMATS, NETWORKS
from recast.layout.peft import CONFIG, METADATA, WEIGHTS
from recast.lowrank import LowRank


@dataclass(frozen=True)
class Pair:
    """Factors of one module as a file holds them: up (O, r), down (r, I[, kh, kw])."""

    up: Tensor
    down: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def scaled(self, alpha: float) -> Pair:
        """The same change with another alpha, rounded to the factors' dtype."""
        if alpha == self.alpha:
            return self
        return replace(self, up=(self.up.float() * (self.alpha / alpha)).to(self.up.dtype),
                       alpha=alpha)  # fmt: skip


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
    pairs, full = _taken(source, raw, dtype)
    if full and form in ("peft", "diffusers"):
        raise Refused(
            f"{source} changes {len(full)} tensors as a whole, first {', '.join(list(full)[:3])}, "
            f"and {form} has no place for that; choose kohya or comfy."
        )
    pairs |= _zero_out_proj(pairs)
    if padded:
        pairs = _padded(pairs)
    refuse_target(out / CONFIG if form == "peft" else out, force=force)
    if form == "kohya":
        names: Mapping[str, Module] = {}
    else:
        names = _modules(raw.plan or _guess(source, raw, pairs), [*pairs, *_heads(full)], source)
    if form == "peft":
        return _write_peft(out, pairs, names, raw.metadata, force)
    if form == "diffusers":
        return [_write_diffusers(out, pairs, names, raw.metadata, force)]
    heads = {lora: module.comfy() for lora, module in names.items()}
    return [_write_tensors(out, pairs, full, heads, raw.metadata, force)]


def _taken(path: Path, raw: Raw, dtype: str | None) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The factors by module, and everything else by `module.suffix`."""
    pairs: dict[str, Pair] = {}
    full: dict[str, Tensor] = {}
    for lora, tensors in raw.modules.items():
        if "lora_up.weight" in tensors:
            up, down = plain_factors(path, lora, tensors)
            wanted = DTYPES[dtype] if dtype else tensors["lora_down.weight"].dtype
            rank = float(down.shape[0])
            alpha = tensors["alpha"].double().item() if "alpha" in tensors else rank
            pairs[lora] = Pair(up.to(wanted), down.to(wanted), alpha)
        for suffix in filter(tensors.__contains__, ("diff", "diff_b", "w_norm", "b_norm")):
            tensor = tensors[suffix]
            full[f"{lora}.{suffix}"] = tensor.to(DTYPES[dtype]) if dtype else tensor
    return pairs, full


def _write_tensors(
    out: Path,
    pairs: Mapping[str, Pair],
    full: Mapping[str, Tensor],
    heads: Mapping[str, str],
    metadata: Mapping[str, str],
    force: bool,
) -> Path:
    """kohya's file, or ComfyUI's where heads gives it other names."""
    alpha = _one_alpha(pairs, metadata)
    tensors: dict[str, Tensor] = {}
    for lora, pair in pairs.items():
        head = heads.get(lora, lora)
        tensors[f"{head}.lora_up.weight"] = _raised(pair.scaled(alpha))
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
        tensors[f"{head}.lora_B.weight"] = _raised(pair)
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
            tensors[f"{head}.lora_B.weight"] = _raised(pair)
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
    rank = _commonest(pair.rank for pair in flat.values())
    alpha = _commonest(pair.alpha for pair in flat.values())
    return {
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "rank_pattern": {path: p.rank for path, p in flat.items() if p.rank != rank},
        "alpha_pattern": {path: p.alpha for path, p in flat.items() if p.alpha != alpha},
        "target_modules": sorted(flat),
    }


def _one_alpha(pairs: Mapping[str, Pair], metadata: Mapping[str, str]) -> float:
    """The file's alpha: the one it has, or had, or else the commonest rank."""
    alphas = {pair.alpha for pair in pairs.values()}
    if "recast.alpha" in metadata:
        return float(metadata["recast.alpha"])
    if len(alphas) == 1:
        return alphas.pop()
    return float(_commonest(pair.rank for pair in pairs.values())) if pairs else 1.0


def _commonest(numbers: Iterable[Any]) -> Any:
    counts = Counter(numbers)
    return max(counts, key=lambda number: (counts[number], number))


def _raised(pair: Pair) -> Tensor:
    """`up` with the trailing 1x1 kernel that convolutions have."""
    return pair.up.reshape(*pair.up.shape, *(1,) * (pair.down.ndim - 2))


def _zero_out_proj(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    factors = {f"{lora}.weight": LowRank(p.up, p.down) for lora, p in pairs.items()}
    alpha = {p.rank: p.alpha for p in pairs.values()}
    found: dict[str, Pair] = {}
    for name, zero in zero_out_proj(factors).items():
        assert isinstance(zero, LowRank)
        found[name.removesuffix(".weight")] = Pair(zero.up, zero.down, alpha[zero.rank])
    return found


def _padded(pairs: Mapping[str, Pair]) -> dict[str, Pair]:
    rank = max((pair.rank for pair in pairs.values()), default=0)
    found = {}
    for lora, pair in pairs.items():
        same = pair.scaled(pair.alpha * pair.rank / rank)  # the scale alpha / r must stay
        up = same.up.new_zeros(len(same.up), rank)
        down = same.down.new_zeros(rank, *same.down.shape[1:])
        up[:, : pair.rank], down[: pair.rank] = same.up, same.down
        found[lora] = Pair(up, down, pair.alpha)
    return found


def _heads(full: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in full}


def _guess(path: Path, raw: Raw, pairs: Mapping[str, Pair]) -> Plan:
    sizes = {lora: (len(pair.up), pair.down.shape[1]) for lora, pair in pairs.items()}
    spots = {lora: ("", sizes.get(lora, (0, 0))) for lora in raw.modules}
    return plan_of(spots, raw.metadata, str(path))


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
