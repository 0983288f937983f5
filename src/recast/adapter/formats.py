"""Read adapters of any of the four formats; `spelling` holds their names.

A file is first sorted by modules, in kohya's names and its own dtypes, and every key is accounted
for; `read_adapter` then folds each scale into its factors.

    scale = alpha / r       kohya, ComfyUI: a tensor `.alpha`; missing means scale 1
                            PEFT, diffusers: lora_alpha and alpha_pattern in the configuration
                            (rsLoRA: alpha / sqrt(r)); a diffusers file without one means scale 1
    Tucker: down'[i, c, y, x] = sum_j mid[i, j, y, x] down[j, c]      an ordinary pair of factors

DoRA, LoHa, LoKr and OFT entries, `.set_weight` and sparse biases are refused by name: as changes of
the original's weights they have no factors, or none without the base.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.file import Adapter
from recast.adapter.spelling import paths, plan_of, shapes, spelt
from recast.checkpoint import Checkpoint, Spec
from recast.errors import Refused
from recast.layout import Layout, Plan
from recast.layout.loras import PEFT, foreign, format_of, parse
from recast.layout.peft import METADATA, adapter_files, alpha_of, configs_of
from recast.lowrank import Full, LowRank

FULL_SUFFIXES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
FACTORS = {"lora_up.weight", "lora_down.weight"}
LOW_RANK_SUFFIXES = FACTORS | {"lora_mid.weight", "alpha"}


@dataclass(frozen=True)
class Raw:
    """An adapter file sorted by modules: kohya's module name, then suffix, to tensor.

    Tensors keep the file's dtype. Alphas of a configuration have become `alpha` tensors. plan is
    the architecture that the names were looked up in, None where kohya's were taken as they are.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    form: str
    plan: Plan | None


class Tensors(Mapping[str, Tensor]):
    """The tensors of one module by suffix, each read from its file when it is asked for.

    alpha: what a configuration gives it; a tensor of the file comes before that.
    """

    def __init__(self, file: Checkpoint, keys: Mapping[str, str], alpha: float | None) -> None:
        self.file, self.keys_in_file = file, keys
        self._alpha = None if "alpha" in keys else alpha

    def __getitem__(self, suffix: str) -> Tensor:
        if suffix == "alpha" and self._alpha is not None:
            return torch.tensor(self._alpha)
        return self.file[self.keys_in_file[suffix]]

    def __iter__(self) -> Iterator[str]:
        yield from self.keys_in_file
        if self._alpha is not None:
            yield "alpha"

    def __len__(self) -> int:
        return len(self.keys_in_file) + (self._alpha is not None)

    def spec(self, suffix: str) -> Spec:
        """Dtype and shape of a tensor of the file, which is not read."""
        return self.file.specs[self.keys_in_file[suffix]]


def read_adapter(path: Path, layout: Layout | None = None) -> Adapter:
    """Read an adapter of any format in fp32, accounting for every key.

    layout: of the checkpoint it is for; without one, names other than kohya's are looked up in the
    full-size architecture that has them all. Raises Refused with the keys that cannot be placed and
    for incomplete pairs.
    """
    raw = read_raw(path, layout)
    known = shapes(raw.plan) if raw.plan else {}
    entries: dict[str, LowRank | Full] = {}
    for lora, tensors in raw.modules.items():
        for name, entry in _entries(path, lora, tensors):
            entries[name] = _fitted(entry, known.get(lora, ()))
    return Adapter(entries, raw.metadata)


def read_raw(path: Path, layout: Layout | None = None) -> Raw:
    """Sort an adapter file, or a PEFT folder, by modules."""
    with open_raw(path, layout) as raw:
        return replace(raw, modules={lora: dict(found) for lora, found in raw.modules.items()})


@contextmanager
def open_raw(path: Path, layout: Layout | None = None, *, strangers: bool = False) -> Iterator[Raw]:
    """As read_raw, with modules of Tensors: nothing but the header is read before it is used.

    strangers: take the tensors of DoRA, LoHa, LoKr … too, under their own suffixes, for verbs that
    only keep or drop them.
    """
    path = Path(path)
    plan = layout.plan if layout else None
    found: dict[str, Mapping[str, Tensor]] = {}
    metadata: dict[str, str] = {}
    forms = []
    with ExitStack() as files:
        for file, part in adapter_files(path):
            piece = _sorted(files.enter_context(Checkpoint(file)), plan, part, strangers)
            forms.append(piece.form)
            metadata |= piece.metadata
            plan = plan or piece.plan
            twice = found.keys() & piece.modules.keys()
            if twice:
                raise Refused(f"{path} has {min(twice)} twice; keep one of its files.")
            found |= piece.modules
        _account(path, found)
        yield Raw(found, metadata, forms[0], plan)


def _sorted(file: Checkpoint, plan: Plan | None, part: str, strangers: bool) -> Raw:
    """One file's tensors by kohya's module names."""
    spots: dict[str, dict[str, str]] = {}
    odd = []
    for key in file.specs:
        found = parse(key)
        if found is None and strangers and (other := foreign(key)):
            found = other[0], key.removeprefix(f"{other[0]}.")
        if found is None:
            odd.append(key)
        else:
            spots.setdefault(found[0], {})[found[1]] = key
    _refuse_odd(file, odd)
    if not spots:
        raise Refused(f"{file.path} has no tensors: give a LoRA or LoCon file.")
    form = format_of(spots)
    names, plan = _names(file, list(spots), spots, form, plan, part)
    configs = configs_of(file.path, file.metadata, form)
    modules: dict[str, Tensors] = {}
    for name, keys in spots.items():
        if names[name] in modules:
            raise Refused(f"{file.path} names the module {names[name]} twice; keep one of them.")
        alpha = None
        if "lora_down.weight" in keys:
            alpha = alpha_of(configs, name, file.specs[keys["lora_down.weight"]].shape[0])
        modules[names[name]] = Tensors(file, keys, alpha)
    metadata = {k: v for k, v in file.metadata.items() if k not in (METADATA, "format")}
    return Raw(modules, metadata, form, plan)


def _names(
    file: Checkpoint,
    heads: list[str],
    spots: Mapping[str, Mapping[str, str]],
    form: str,
    plan: Plan | None,
    part: str,
) -> tuple[dict[str, str], Plan | None]:
    """kohya's name of every module of a file."""
    if form == "kohya" and plan is None and not any(n.startswith("lycoris_") for n in heads):
        strange = [name for name in heads if "." in name]
        _refuse_odd(file, [f"{n}.{s}" for n in strange for s in spots[n]])
        return {name: name for name in heads}, None
    bare = {name: name.removeprefix(PEFT) if form == "peft" else name for name in heads}
    if form == "peft":
        part = part or file.metadata.get("recast.part", "") or _peft_part(file, bare, spots, plan)
    if plan is None:
        sizes = {bare[n]: (part, _size(file, keys)) for n, keys in spots.items()}
        plan = plan_of(sizes, file.metadata, str(file.path))
    table = paths(plan, part) if form == "peft" else spelt(plan)
    lost = [name for name in heads if bare[name] not in table]
    if form == "kohya":  # whose places may be refused later, with the checkpoint's own words
        return {name: table.get(name, name) for name in heads}, plan
    if lost:
        raise Refused(
            f"{len(lost)} of {len(heads)} modules of {file.path} are none of this architecture "
            f"({plan.family}), first {', '.join(lost[:5])}; give the checkpoint it was made for."
        )
    return {name: table[bare[name]] for name in heads}, plan


def _peft_part(
    file: Checkpoint,
    bare: Mapping[str, str],
    spots: Mapping[str, Mapping[str, str]],
    plan: Plan | None,
) -> str:
    """The network of a PEFT file that stands alone: text encoders are told apart by width."""
    texts = [name for name in bare if ".encoder.layers." in f".{bare[name]}"]
    if not texts:
        return "unet"
    widths = {768: "te1", 1280: "te2"}
    if plan is not None:
        widths = {text.width: part for part, text in (("te2", plan.te2), ("te1", plan.te1)) if text}
    for name in texts:
        found = widths.get(_size(file, spots[name])[not name.endswith("fc2")])
        if found:
            return found
    raise Refused(
        f"{file.path} does not say which text encoder it is for; put it into a folder named "
        "text_encoder or text_encoder_2."
    )


def _size(file: Checkpoint, keys: Mapping[str, str]) -> tuple[int, int]:
    """Outer sizes (out, in) of a low-rank change; zeros for another."""
    if not keys.keys() >= FACTORS:
        return 0, 0
    up, down = (file.specs[keys[k]].shape for k in ("lora_up.weight", "lora_down.weight"))
    return up[0], down[1]


def _account(path: Path, modules: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse half pairs, factors of no rank and two changes of one weight."""
    for lora, tensors in modules.items():
        found = set(tensors)
        pair = found & LOW_RANK_SUFFIXES
        if pair and not pair >= FACTORS:
            raise Refused(
                f"{path}: {lora} has {', '.join(sorted(pair))} but not both factors; "
                "the file is incomplete, export it again."
            )
        if pair and isinstance(tensors, Tensors) and not tensors.spec("lora_down.weight").numel:
            raise Refused(
                f"{path}: {lora} has rank 0, which is no change of anything; "
                "train or export it again."
            )
        if (pair and found & {"diff", "w_norm"}) or {"diff", "w_norm"} <= found:
            raise Refused(
                f"{path}: {lora} has {', '.join(sorted(found))}, of which loaders apply "
                "only one; keep either the factors or the full difference."
            )


def _refuse_odd(file: Checkpoint, odd: list[str]) -> None:
    """Refuse keys without a meaning here, by the parametrization they belong to."""
    if odd:
        kinds = sorted({found[1] for key in odd if (found := foreign(key))})
        what = f" ({', '.join(kinds)})" if kinds else ""
        raise Refused(
            f"{file.path} has {len(odd)} keys that no adapter entry accounts for{what}, first "
            f"{', '.join(odd[:5])}; give a plain LoRA or LoCon file, or merge this one into its "
            "checkpoint with the tool that made it and take recast extract --tuned."
        )


def _entries(
    path: Path, lora: str, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[str, LowRank | Full]]:
    if "lora_up.weight" in tensors:
        up, down = plain_factors(path, lora, tensors)
        up, down = up.float(), down.float()
        if "alpha" in tensors:
            up = up * (tensors["alpha"].double().item() / down.shape[0])
        yield f"{lora}.weight", LowRank(up, down)
    for suffix in filter(tensors.__contains__, FULL_SUFFIXES):  # a set has no order of its own
        yield f"{lora}.{FULL_SUFFIXES[suffix]}", Full(tensors[suffix].float())


def _fitted(entry: LowRank | Full, shape: tuple[int, ...]) -> LowRank | Full:
    """A change of a matrix as one of a 1x1 convolution or the other way, as loaders reshape it."""
    wide, narrow = (*entry.shape, 1, 1), (*shape, 1, 1)
    if shape != wide and narrow != entry.shape:
        return entry
    if isinstance(entry, Full):
        return Full(entry.delta.reshape(shape))
    return LowRank(entry.up, entry.down.reshape(entry.rank, *shape[1:]))


def plain_factors(path: Path, lora: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """up (O, r) and down (r, I[, kh, kw]) of a module; a Tucker core is multiplied out in fp32."""
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"]
    mid = tensors.get("lora_mid.weight")
    if mid is not None and (mid.ndim != 4 or mid.shape[1] != down.shape[0]):
        raise Refused(f"{path}: {lora} has a lora_mid that does not meet lora_down; export again.")
    if mid is not None:
        down = torch.einsum("ijyx,jc->icyx", mid.float(), down.float().flatten(1))
    if up.shape[1] != down.shape[0]:
        raise Refused(
            f"{path}: {lora} has factors of rank {up.shape[1]} and "
            f"{down.shape[0]}; the file is damaged, export it again."
        )
    return up, down
