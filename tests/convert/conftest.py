"""Tiny checkpoints and pictures, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.convert import small


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sdxl.safetensors, sd15.safetensors and images/."""
    folder = tmp_path_factory.mktemp("small")
    for family in ("sdxl", "sd15"):
        small.checkpoint(folder, family)
    small.images(folder / "images")
    return folder
