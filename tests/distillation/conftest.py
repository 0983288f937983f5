"""A tiny SD 1.5 checkpoint, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sd15.safetensors, of pictures of 32 pixels."""
    folder = tmp_path_factory.mktemp("distillation")
    tiny.checkpoint(
        folder / "sd15.safetensors", "sd15", dtype="F16", vocabulary=49408,
        metadata={"recast.size": "32"},
    )  # fmt: skip
    return folder
