"""Tiny checkpoints: every part of SDXL and SD 1.5 in the right names, with random weights.

The two text encoders of SDXL have different widths, or diffusers' own loader swaps them.  The
vocabulary is cut to 512 rows; give vocabulary=49408 where real prompts are tokenised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from recast.layout.blueprint import Plan, TextPlan, UNetPlan, VAEPlan
from recast.layout.generate import generate

VAE = VAEPlan(widths=(32, 32, 64, 64), layers=1)
XL = Plan(
    "sdxl",
    UNetPlan((32, 64, 64), (0, 1, 2), 2, context=32 + 48, vector=40 + 6 * 16, linear=True),
    VAE,
    TextPlan(32, 2, 64, vocabulary=512),
    TextPlan(48, 3, 96, vocabulary=512, projection=40),
)
ONE = Plan(
    "sd15",
    UNetPlan((32, 32, 64, 64), (1, 1, 1, 0), 1, context=32, vector=None, linear=False),
    VAE,
    TextPlan(32, 2, 64, vocabulary=512),
)
PLANS = {"sdxl": XL, "sd15": ONE}


def plan(family: str, *, vocabulary: int | None = None) -> Plan:
    """The tiny plan of a family, "sdxl" or "sd15"."""
    found = PLANS[family]
    if vocabulary is None:
        return found
    te1 = found.te1 and replace(found.te1, vocabulary=vocabulary)
    te2 = found.te2 and replace(found.te2, vocabulary=vocabulary)
    return replace(found, te1=te1, te2=te2)


def checkpoint(
    path: Path,
    family: str = "sdxl",
    *,
    seed: int = 0,
    dtype: str = "F32",
    vocabulary: int | None = None,
    metadata: Mapping[str, str] | None = None,
    extras: bool = True,
) -> Path:
    """Write a tiny checkpoint and return its path."""
    found = plan(family, vocabulary=vocabulary)
    generate(path, found, seed=seed, dtype=dtype, metadata=metadata, extras=extras)
    return path
