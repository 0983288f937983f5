"""Adapters and their file, in the names that kohya's trainers and LyCORIS use.

    lora_unet_<module>.lora_up.weight      (O, r) or (O, r, 1, 1)
    lora_unet_<module>.lora_down.weight    (r, I) or (r, I, kh, kw)
    lora_unet_<module>.alpha               () fp32, equal to r everywhere, so that the scale is 1
    lora_unet_<module>.diff, .diff_b       full change of a weight, of a bias

One rank and one alpha per file (short layers are zero-padded): diffusers gives a layer the alpha of
the majority where several occur. Who reads what: every loader reads the low-rank part; ComfyUI and
the A1111 family also read `.diff` and `.diff_b`, of norms too (ComfyUI maps every `.weight` of the
UNet); LyCORIS reads them for linear and convolution layers, and for norms only as `w_norm`,
`b_norm`, which are accepted here on reading; diffusers refuses a file that holds any full entry.

Reading folds alpha / r into `up`, takes a missing alpha for r (as ComfyUI and diffusers do), and
must account for every key.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write
from recast.errors import Refused
from recast.header import header_bytes, place
from recast.lowrank import Full, LowRank

ROLES = ("pissa-init", "pissa-trained", "delta", "full")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FULL_SUFFIXES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
LOW_RANK_SUFFIXES = ("lora_up.weight", "lora_down.weight", "alpha")
ARCHITECTURES = {
    "sdxl": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "sd15": ("sd_v1", "stable-diffusion-v1/lora"),
}


@dataclass(frozen=True)
class Adapter:
    """Entries by `<lora name>.weight` or `<lora name>.bias`, in module orientation, and metadata.

    The role says what the numbers mean: `pissa-init` and `pissa-trained` hold principal parts of
    the weights and are nothing without each other; `delta` and `full` are changes to the original.
    """

    entries: Mapping[str, LowRank | Full]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def role(self) -> str:
        """One of ROLES; a file of another tool counts as a delta."""
        return self.metadata.get("recast.role", "delta")

    @property
    def base(self) -> str | None:
        """sha256 of the checkpoint it belongs to, where known."""
        return self.metadata.get("recast.base_sha256")

    @property
    def rank(self) -> int | None:
        """Largest rank of the low-rank entries; None where there are none."""
        return max((e.rank for e in self.entries.values() if isinstance(e, LowRank)), default=None)

    def to(self, dtype: torch.dtype) -> Adapter:
        """Round every entry to a dtype."""
        return Adapter({k: e.to(dtype) for k, e in self.entries.items()}, self.metadata)


def trained_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata of an initial adapter, for what has been trained from it."""
    kept = {k: v for k, v in metadata.items() if k.startswith("recast.") and k != "recast.energy"}
    if kept.get("recast.role") == "pissa-init":
        kept["recast.role"] = "pissa-trained"
    return kept


def write_adapter(
    path: Path,
    adapter: Adapter,
    *,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
    force: bool = False,
) -> str:
    """Write an adapter file and return its sha256.

    metadata is added to the adapter's own. The trainers' fields (`ss_*`, `sshs_*`, `modelspec.*`)
    are made new from the content.
    """
    even = _one_rank(adapter)
    specs = adapter_specs(even, dtype)
    tensors = dict(_tensors(even))

    def read(key: str) -> Tensor:
        return tensors[key].to(DTYPES[specs[key][0]])

    header = file_metadata(even, metadata or {})
    header |= kohya_hashes(specs, read, header)
    return write(path, specs, ((key, read(key)) for key in specs), header, force=force)


def read_adapter(path: Path) -> Adapter:
    """Read an adapter in fp32, accounting for every key of the file.

    Raises Refused with the list of keys it cannot place (Tucker, DoRA and others have no meaning
    here) and for incomplete pairs.
    """
    with Checkpoint(path) as file:
        groups: dict[str, set[str]] = {}
        for key in file.specs:
            lora, _, suffix = key.partition(".")
            groups.setdefault(lora, set()).add(suffix)
        _account(path, groups)
        entries: dict[str, LowRank | Full] = {}
        for lora, suffixes in groups.items():
            entries |= _read_module(file, lora, suffixes)
        return Adapter(entries, dict(file.metadata))


def adapter_specs(adapter: Adapter, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the tensors of an adapter's file, in order."""
    specs: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, entry in adapter.entries.items():
        lora, _, param = name.rpartition(".")
        if isinstance(entry, Full):
            specs[f"{lora}.{'diff' if param == 'weight' else 'diff_b'}"] = (dtype, entry.shape)
            continue
        specs |= low_rank_specs(lora, entry.shape, entry.rank, dtype)
    return specs


def low_rank_specs(
    lora: str, shape: tuple[int, ...], rank: int, dtype: str
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, dtypes and shapes of the three tensors of one low-rank entry."""
    up = (shape[0], rank) + (1,) * (len(shape) - 2)
    return {
        f"{lora}.lora_up.weight": (dtype, up),
        f"{lora}.lora_down.weight": (dtype, (rank, *shape[1:])),
        f"{lora}.alpha": ("F32", ()),
    }


def low_rank_tensors(lora: str, entry: LowRank) -> dict[str, Tensor]:
    """The three tensors of one low-rank entry, as low_rank_specs lists them."""
    return {
        f"{lora}.lora_up.weight": entry.up.reshape(*entry.up.shape, *(1,) * (entry.down.ndim - 2)),
        f"{lora}.lora_down.weight": entry.down,
        f"{lora}.alpha": torch.tensor(float(entry.rank)),
    }


def file_metadata(adapter: Adapter, extra: Mapping[str, str]) -> dict[str, str]:
    """Header fields of an adapter file, but for the hashes of its content."""
    own = {k: v for k, v in adapter.metadata.items() if not k.startswith(("sshs_", "modelspec."))}
    own |= extra
    family = own.get("recast.family", "")
    rank = adapter.rank
    if rank is None:
        shape, args = "Dynamic", {"algo": "full", "preset": "full", "train_norm": "True"}
    else:
        shape = str(rank)
        args = {"algo": "locon", "preset": "full", "conv_dim": shape, "conv_alpha": shape}
        args |= {"use_tucker": "False", "dropout": "0.0"}
    own |= {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": shape,
        "ss_network_alpha": shape if rank is None else str(float(rank)),
        "ss_network_args": json.dumps(args),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": own.get("modelspec.title", f"Recast {adapter.role} adapter"),
    }
    if family in ARCHITECTURES:
        own["ss_base_model_version"], own["modelspec.architecture"] = ARCHITECTURES[family]
    return own


def kohya_hashes(
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """`sshs_model_hash` and `sshs_legacy_hash` as kohya's trainer computes them.

    The first is sha256 of the tensor section; the second 8 digits of the sha256 of bytes 0x100000
    to 0x110000 of the file whose metadata is reduced to `ss_*`. read gives a tensor in its dtype.
    """
    placed = place(specs)
    plain = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    whole, window = hashlib.sha256(), hashlib.sha256()
    at = len(header_bytes(placed, plain))
    for key in placed:
        data = read(key).contiguous().reshape(-1).view(torch.uint8).numpy().data
        whole.update(data)
        window.update(data[max(0x100000 - at, 0) : max(0x110000 - at, 0)])
        at += len(data)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": window.hexdigest()[:8]}


def _tensors(adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    for name, entry in adapter.entries.items():
        lora, _, param = name.rpartition(".")
        if isinstance(entry, Full):
            yield f"{lora}.{'diff' if param == 'weight' else 'diff_b'}", entry.delta
        else:
            yield from low_rank_tensors(lora, entry).items()


def _one_rank(adapter: Adapter) -> Adapter:
    """Pad low-rank entries with zeros to the largest rank of the adapter."""
    rank = adapter.rank
    if rank is None:
        return adapter
    entries: dict[str, LowRank | Full] = {}
    for name, entry in adapter.entries.items():
        if isinstance(entry, LowRank) and entry.rank < rank:
            up = entry.up.new_zeros(entry.up.shape[0], rank)
            down = entry.down.new_zeros(rank, *entry.down.shape[1:])
            up[:, : entry.rank], down[: entry.rank] = entry.up, entry.down
            entry = LowRank(up, down)
        entries[name] = entry
    return Adapter(entries, adapter.metadata)


def _account(path: Path, groups: Mapping[str, set[str]]) -> None:
    known = {*FULL_SUFFIXES, *LOW_RANK_SUFFIXES}
    odd = [f"{lora}.{s}" for lora, found in groups.items() for s in sorted(found - known)]
    if odd or not groups:
        raise Refused(
            f"{path} has {len(odd)} keys that no adapter entry accounts for, first "
            f"{', '.join(odd[:5]) or 'none at all'}; give a LoRA or LoCon file in kohya "
            "names without Tucker or DoRA parts."
        )
    for lora, found in groups.items():
        pair = found & set(LOW_RANK_SUFFIXES)
        if pair and not {"lora_up.weight", "lora_down.weight"} <= pair:
            raise Refused(
                f"{path}: {lora} has {', '.join(sorted(pair))} but not both factors; "
                "the file is incomplete, export it again."
            )
        if (pair and found & {"diff", "w_norm"}) or {"diff", "w_norm"} <= found:
            raise Refused(
                f"{path}: {lora} has {', '.join(sorted(found))}, of which loaders apply "
                "only one; keep either the factors or the full difference."
            )


def _read_module(file: Checkpoint, lora: str, suffixes: set[str]) -> dict[str, LowRank | Full]:
    found: dict[str, LowRank | Full] = {}
    if "lora_up.weight" in suffixes:
        up = file[f"{lora}.lora_up.weight"].float().flatten(1)
        down = file[f"{lora}.lora_down.weight"].float()
        if up.shape[1] != down.shape[0]:
            raise Refused(
                f"{file.path}: {lora} has factors of rank {up.shape[1]} and "
                f"{down.shape[0]}; the file is damaged, export it again."
            )
        if "alpha" in suffixes:
            up = up * (file[f"{lora}.alpha"].double().item() / down.shape[0])
        found[f"{lora}.weight"] = LowRank(up, down)
    for suffix in suffixes & FULL_SUFFIXES.keys():
        found[f"{lora}.{FULL_SUFFIXES[suffix]}"] = Full(file[f"{lora}.{suffix}"].float())
    return found
