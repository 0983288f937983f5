"""Scale and shift of a file's latent space: what a UNet sees is (z - shift) scale.

Single files have no common word for either: every loader takes the family's scale and no shift.
Recast's own entries say otherwise; a diffusers folder says it in vae/config.json.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recast.errors import Refused
from recast.layout.configs import SCALING

VAE_SCALE, VAE_SHIFT = "recast.vae_scale", "recast.vae_shift"
SILENT = 0.18215  # what diffusers takes where a configuration is silent
VAE_FILE = "recast.vae_sha256"  # of the file that a VAE was taken from


def stated(metadata: Mapping[str, str], family: str) -> tuple[float, float]:
    """Return (scale, shift) as a header states them, else the family's; refuses what is neither."""
    scale = _number(metadata, VAE_SCALE, SCALING[family])
    shift = _number(metadata, VAE_SHIFT, 0.0)
    if scale <= 0:
        raise Refused(f"its {VAE_SCALE} is {scale:g}, and a scale is above 0.")
    return scale, shift


def entries(scale: float, shift: float, family: str) -> dict[str, str]:
    """What a header must say for `stated` to find a scale and shift; nothing for the usual ones."""
    if (scale, shift) == (SCALING[family], 0.0):
        return {}
    return {VAE_SCALE: repr(float(scale)), VAE_SHIFT: repr(float(shift))}


def configured(config: dict[str, Any], scale: float, shift: float) -> dict[str, Any]:
    """An AutoencoderKL's arguments with a scale and shift."""
    if not shift:
        return {**config, "scaling_factor": scale}
    return {**config, "scaling_factor": scale, "shift_factor": shift}


def of_config(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return (scale, shift) of a VAE's configuration; ValueError where they are no numbers."""
    found = []
    for key, silent in (("scaling_factor", SILENT), ("shift_factor", 0.0)):
        value = config.get(key)
        value = silent if value is None else value
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"has {str(value)[:60]} as {key}")
        found.append(float(value))
    if found[0] <= 0:
        raise ValueError(f"has {config['scaling_factor']} as scaling_factor")
    return found[0], found[1]


def _number(metadata: Mapping[str, str], key: str, usual: float) -> float:
    text = metadata.get(key)
    if text is None:
        return usual
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise Refused(f"its {key} is {text[:20]!r}, which is no number.")
    return found
