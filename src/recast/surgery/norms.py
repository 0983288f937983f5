"""Norms of a checkpoint's weights, kept in the user's cache by the file's hash.

    fro_ckpt   |W|, Frobenius, in fp64          spn_ckpt   sigma_1(W)

A replaced file has another hash, so its norms are never those of its predecessor; a cache that does
not parse is made anew.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from recast.adapter.places import read_site
from recast.checkpoint import Checkpoint
from recast.commit import commit
from recast.errors import RecastError
from recast.layout import Site
from recast.lowrank import factorize

VERSION = 1


def frobenius(weight: Tensor) -> float:
    """Root of the sum of all squares."""
    return float(weight.double().norm())


def spectral(weight: Tensor) -> float:
    """The largest singular value."""
    leading = factorize(weight, 1)
    return float(leading.up.double().norm() * leading.down.double().norm())


NORMS: Mapping[str, Callable[[Tensor], float]] = {"fro_ckpt": frobenius, "spn_ckpt": spectral}


def cache_folder() -> Path:
    """Where a user's caches lie: XDG_CACHE_HOME, LOCALAPPDATA or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(home) if home else Path.home() / ".cache") / "recast" / "norms"


def norms(
    checkpoint: Checkpoint, sites: Mapping[str, Site], name: str, folder: Path | None = None
) -> dict[str, float]:
    """One of NORMS of each site's weight, by the sites' names; what is new is kept.

    folder: the cache, cache_folder() otherwise. One that cannot be written is done without.
    """
    path = (folder or cache_folder()) / f"{checkpoint.sha256()}.json"
    known = _read(path)
    mine = known.setdefault(name, {})
    missing = [lora for lora in sites if lora not in mine]
    for lora in missing:
        mine[lora] = NORMS[name](read_site(checkpoint, sites[lora]))
    if missing:
        text = json.dumps({"version": VERSION, **known}, sort_keys=True).encode()
        with suppress(RecastError, OSError):  # a full or foreign home costs the next call's time
            commit(path, partial(_put, text), size=len(text), force=True, twins=True)
    return {lora: mine[lora] for lora in sites}


def _put(text: bytes, file: BinaryIO) -> None:
    file.write(text)


def _read(path: Path) -> dict[str, dict[str, float]]:
    """A cache's tables; empty ones where it is missing, damaged or of another version."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            return {}
        return {name: _sound(found.get(name, {})) for name in NORMS}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _sound(table: Mapping[str, float]) -> dict[str, float]:
    found = {str(lora): float(value) for lora, value in table.items()}
    if not all(math.isfinite(value) and value >= 0 for value in found.values()):
        raise ValueError("a norm is no number")
    return found
