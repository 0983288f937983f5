"""What is known about a checkpoint's architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from recast.layout.blueprint import Plan
from recast.layout.sites import Site, sites


@dataclass(frozen=True)
class Layout:
    """Module configurations of a checkpoint, and where each of its weights belongs.

    unet, vae, texts: arguments of UNet2DConditionModel, AutoencoderKL, CLIPTextConfig. texts are
    those of `text_parts`, "te1" and "te2" where present; `missing` names the absent parts.
    scaling, shift: latents = (encoder output - shift) * scaling. extras: tensors that no network
    reads, carried.
    """

    family: str
    plan: Plan
    unet: dict[str, Any]
    vae: dict[str, Any] | None
    texts: tuple[dict[str, Any], ...]
    text_parts: tuple[str, ...]
    scaling: float
    shift: float
    missing: tuple[str, ...]
    extras: tuple[str, ...]

    def sites(self, profile: str) -> list[Site]:
        """The places a profile names, in the order of the network; see `recast.layout.sites`."""
        return sites(self.plan, profile)
