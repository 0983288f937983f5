"""How far two checkpoints are apart when only one of them is at hand: norms and random signs.

    s_j(W) = sum over i = j (mod k) of r_i w_i             r_i = -1 or 1, drawn for each tensor
    E |s(W) - s(W')|^2 = |W - W'|^2                        (count sketch, Charikar et al. 2002)

s is linear, so two sketches with the same signs give the distance to about 1/sqrt(2k): 2 % for all
of a UNet, 9 % for a single tensor. Signs come from Philox, whose stream is the same everywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout.names import UNET

VERSION = 1
WHOLE, SINGLE = 1024, 64  # numbers kept of all of a UNet, and of one tensor
CHUNK = WHOLE << 11  # weights that are signed together


@dataclass(frozen=True)
class Sketch:
    """Squared norm of what was sketched, and its k signed sums in fp64."""

    squared: float
    sums: Tensor


@dataclass(frozen=True)
class Fingerprint:
    """The UNet as a whole, and single tensors by their names in the file."""

    unet: Sketch
    tensors: Mapping[str, Sketch]

    def text(self) -> str:
        """As a header field: sums are fp32 in base64."""
        return json.dumps(
            {
                "version": VERSION,
                "unet": _packed(self.unet),
                "tensors": {key: _packed(sketch) for key, sketch in self.tensors.items()},
            },
            separators=(",", ":"),
        )


@dataclass(frozen=True)
class Distance:
    """|W - W'| / |W| over the tensors that a patch changes, and over the whole UNet."""

    patched: float
    unet: float


def fingerprint(checkpoint: Checkpoint, keys: Collection[str]) -> Fingerprint:
    """Sketch the UNet, and each of `keys` by itself, in one pass over the file.

    The last answer is kept: a run that begins with a patch asks three times, and SDXL's 5 GB take
    most of a minute.
    """
    asked = (checkpoint.sha256(), frozenset(keys))
    if asked not in _KEPT:
        found = _fingerprint(checkpoint, asked[1])
        _KEPT.clear()
        _KEPT[asked] = found
    return _KEPT[asked]


_KEPT: dict[tuple[str, frozenset[str]], Fingerprint] = {}


def _fingerprint(checkpoint: Checkpoint, keys: Collection[str]) -> Fingerprint:
    total, squared = torch.zeros(WHOLE, dtype=torch.float64), 0.0
    single: dict[str, Sketch] = {}
    for key in checkpoint.specs:
        if not key.startswith(UNET) and key not in keys:
            continue
        found = sketch(checkpoint[key], key)
        if key.startswith(UNET):
            total += found.sums
            squared += found.squared
        if key in keys:
            single[key] = Sketch(found.squared, found.sums.view(-1, SINGLE).sum(0))
    return Fingerprint(Sketch(squared, total), single)


def sketch(tensor: Tensor, name: str) -> Sketch:
    """Norm and signed sums of a tensor; the signs depend on its name alone."""
    seed = hashlib.blake2b(name.encode(), digest_size=8).digest()
    signs = np.random.Philox(int.from_bytes(seed))
    sums, squared = torch.zeros(WHOLE, dtype=torch.float64), 0.0
    for part in tensor.reshape(-1).split(CHUNK):
        bits = signs.random_raw(-(-part.numel() // 64)).astype("<u8").view(np.uint8)
        sign = torch.from_numpy(np.unpackbits(bits)[: part.numel()]).to(torch.float64) * 2 - 1
        value = part.to(torch.float64)
        squared += value.square().sum().item()
        row = torch.nn.functional.pad(value * sign, (0, -part.numel() % WHOLE))
        sums += row.view(-1, WHOLE).sum(0)
    return Sketch(squared, sums)


def distance(base: Fingerprint, other: Fingerprint) -> Distance:
    """How far `other` is from `base`, in norms of `base`; both must have the same tensors."""
    pairs = [(base.tensors[key], other.tensors[key]) for key in base.tensors]
    return Distance(_relative(pairs), _relative([(base.unet, other.unet)]))


def parse_fingerprint(text: str) -> Fingerprint:
    """Read a header field back; raises Refused where it is broken or of another version."""
    try:
        values = json.loads(text)
        if values["version"] != VERSION:
            raise Refused(
                f"the patch's fingerprint is of version {values['version']}, and this Recast reads "
                f"version {VERSION}: make the patch anew with recast convert."
            )
        tensors = {key: _unpacked(value, SINGLE) for key, value in values["tensors"].items()}
        return Fingerprint(_unpacked(values["unet"], WHOLE), tensors)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(
            f"the patch's fingerprint of its base is damaged ({type(error).__name__}): "
            "make the patch anew with recast convert."
        ) from error


def _relative(pairs: Collection[tuple[Sketch, Sketch]]) -> float:
    whole = sum(one.squared for one, _ in pairs)
    apart = sum(_apart(one, two) for one, two in pairs)
    return math.sqrt(apart / whole) if whole else 0.0


def _apart(one: Sketch, two: Sketch) -> float:
    """Squared distance, of sums as they are stored: the same weights are exactly 0 apart."""
    return (one.sums.float() - two.sums.float()).double().square().sum().item()


def _packed(sketch: Sketch) -> list[float | str]:
    data = sketch.sums.float().numpy().astype("<f4").tobytes()
    return [sketch.squared, base64.b64encode(data).decode()]


def _unpacked(value: list[float | str], size: int) -> Sketch:
    sums = np.frombuffer(base64.b64decode(str(value[1]), validate=True), "<f4")
    if len(sums) != size or not np.isfinite(sums).all() or not float(value[0]) >= 0:
        raise ValueError(f"{len(sums)} sums")
    return Sketch(float(value[0]), torch.from_numpy(sums.astype(np.float64)))
