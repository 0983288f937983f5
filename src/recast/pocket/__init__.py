"""The embedded world: small checkpoints in Stable Diffusion's own format, and a judge for them."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parent / "data"
NAMES = ("pocket-xl", "pocket-15")
VAE = DATA / "pocket-eq.safetensors"  # another latent space for them: docs/pocket.md


def path(name: str) -> Path:
    """Return the file of a shipped checkpoint, "pocket-xl" or "pocket-15"."""
    if name not in NAMES:
        raise ValueError(f"no pocket checkpoint is called {name!r}; there are {', '.join(NAMES)}")
    return DATA / f"{name}.safetensors"
