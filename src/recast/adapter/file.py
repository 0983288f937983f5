"""Adapters and their file, in the names that kohya's trainers and LyCORIS use.

    lora_unet_<module>.lora_up.weight      (O, r) or (O, r, 1, 1)
    lora_unet_<module>.lora_down.weight    (r, I) or (r, I, kh, kw)
    lora_unet_<module>.alpha               () fp32, the same number everywhere
    lora_unet_<module>.diff, .diff_b       full change of a weight, of a bias

One alpha per file: diffusers gives a layer the alpha of the majority where several occur. It is the
commonest rank, so that the scale of most layers, and of all where there is one rank, is 1; the
others' `up` is multiplied by r / alpha, which loaders undo. Who reads what: every loader reads the
low-rank part; ComfyUI and the A1111 family also read `.diff` and `.diff_b`, of norms too (ComfyUI
maps every `.weight` of the UNet); LyCORIS reads them for linear and convolution layers, and for
norms only as `w_norm`, `b_norm`; diffusers refuses a file that holds any full entry.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recast.checkpoint import write
from recast.header import header_bytes, place
from recast.lowrank import Full, LowRank

ROLES = ("pissa-init", "pissa-trained", "delta", "full")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
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
    alpha: float | None = None,
    trainer: Mapping[str, str] | None = None,
) -> str:
    """Write an adapter file and return its sha256.

    metadata is added to the adapter's own. The trainers' fields (`ss_network_*`, `sshs_*`,
    `modelspec.*`) are made new from the content, but for those in `trainer`. alpha: the file's,
    where it is not the common one. A change of a text encoder's attention gets a zero `out_proj`
    where it has none, because diffusers would drop it otherwise.
    """
    if adapter.role == "delta":
        adapter = Adapter({**adapter.entries, **zero_out_proj(adapter.entries)}, adapter.metadata)
    specs = adapter_specs(adapter, dtype)
    alpha = common_alpha(adapter) if alpha is None else alpha
    tensors = dict(_tensors(adapter, alpha))

    def read(key: str) -> Tensor:
        return tensors[key].to(DTYPES[specs[key][0]])

    header = {**file_metadata(adapter, metadata or {}, alpha), **(trainer or {})}
    header |= kohya_hashes(specs, read, header)
    return write(path, specs, ((key, read(key)) for key in specs), header, force=force)


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


def low_rank_tensors(
    lora: str, entry: LowRank, alpha: float, *, folded: bool = False
) -> dict[str, Tensor]:
    """The three tensors of one low-rank entry, as low_rank_specs lists them.

    folded: `up` already holds r / alpha.
    """
    up = entry.up.reshape(*entry.up.shape, *(1,) * (entry.down.ndim - 2))
    return {
        f"{lora}.lora_up.weight": up
        if folded or entry.rank == alpha
        else up * (entry.rank / alpha),
        f"{lora}.lora_down.weight": entry.down,
        f"{lora}.alpha": torch.tensor(alpha),
    }


def common_alpha(adapter: Adapter) -> float:
    """The one alpha of an adapter's file: the commonest rank, of several the largest."""
    counts = Counter(e.rank for e in adapter.entries.values() if isinstance(e, LowRank))
    return float(max(counts, key=lambda rank: (counts[rank], rank), default=1))


def zero_out_proj(entries: Mapping[str, LowRank | Full]) -> dict[str, LowRank | Full]:
    """Zero changes of each `out_proj` that is missing beside a text encoder's q, k or v."""
    found: dict[str, LowRank | Full] = {}
    for name, entry in entries.items():
        head, middle, _ = name.rpartition("_self_attn_")
        out = f"{head}{middle}out_proj.weight"
        wanted = middle and name.startswith("lora_te") and isinstance(entry, LowRank)
        if wanted and out not in entries:
            assert isinstance(entry, LowRank)
            width, rank = entry.up.shape  # out_proj is square
            found[out] = LowRank(entry.up.new_zeros(width, rank), entry.up.new_zeros(rank, width))
    return found


def file_metadata(
    adapter: Adapter, extra: Mapping[str, str], alpha: float | None = None
) -> dict[str, str]:
    """Header fields of an adapter file, but for the hashes of its content.

    alpha: the file's, where it is not the common one. Only the ranks of the entries matter.
    """
    own = {k: v for k, v in adapter.metadata.items() if not k.startswith(("sshs_", "modelspec."))}
    own |= extra
    family = own.get("recast.family", "")
    ranks = {e.rank for e in adapter.entries.values() if isinstance(e, LowRank)}
    shape = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # kohya's word for several
    scale = str(common_alpha(adapter) if alpha is None else alpha)
    if adapter.rank is None:
        scale, args = "Dynamic", {"algo": "full", "preset": "full", "train_norm": "True"}
    else:
        args = {"algo": "locon", "preset": "full", "use_tucker": "False", "dropout": "0.0"}
        args |= {"conv_dim": shape, "conv_alpha": scale}
    own |= {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": shape,
        "ss_network_alpha": scale,
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


def _tensors(adapter: Adapter, alpha: float) -> Iterator[tuple[str, Tensor]]:
    for name, entry in adapter.entries.items():
        lora, _, param = name.rpartition(".")
        if isinstance(entry, Full):
            yield f"{lora}.{'diff' if param == 'weight' else 'diff_b'}", entry.delta
        else:
            yield from low_rank_tensors(lora, entry, alpha).items()
