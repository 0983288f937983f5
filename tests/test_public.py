"""What a researcher imports from the top, and that the top itself is light."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny

import recast

SOURCE = Path(__file__).parents[1] / "src"
NAMES = """
EPS FLOW OBJECTIVES V V_ZSNR X0 Objective carry express
Checkpoint open_checkpoint Layout detect Model open_model sample_images
Adapter LowRank attach decompose factorize read_adapter rebuild split
Job Recipe load_recipe run
RecastError Refused __version__
"""
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "matplotlib", "pytorch_optimizer")


def test_the_public_names_are_these() -> None:
    assert set(recast.__all__) == set(NAMES.split())
    assert len(recast.__all__) == len(set(recast.__all__))


def test_every_public_name_is_there_and_is_what_its_module_has() -> None:
    for name in recast.__all__:
        assert getattr(recast, name) is not None
        assert name in dir(recast)
    from recast.model import open_model
    from recast.objective import FLOW

    assert recast.FLOW is FLOW
    assert recast.open_model is open_model


def test_other_names_are_no_attributes() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = recast.nonsense


def loaded(code: str, *words: str) -> set[str]:
    """Which heavy packages a fresh process has imported after some code."""
    code += f"\nimport sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(SOURCE), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_recast_imports_nothing_heavy() -> None:
    assert (
        loaded("import recast; recast.__version__; recast.Checkpoint; recast.load_recipe") == set()
    )


@pytest.mark.parametrize("words", [["--help"], ["convert", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    assert loaded(COMMAND, *words) == set()


def test_inspect_imports_nothing_heavy(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "model.safetensors", "sdxl")
    assert loaded(COMMAND, "inspect", str(path), "--json") == set()
    assert loaded(COMMAND, "inspect", str(path)) == set()


COMMAND = """
import sys
from recast import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize("module", ["recast.cli", "recast.checkpoint", "recast.inspection"])
def test_nothing_needs_fcntl_to_be_imported(module: str) -> None:
    """Windows has msvcrt in its place."""
    code = f"""
import sys, types
import asyncio, subprocess, tempfile  # what imports by platform must have been imported before
import pathlib, shutil, rich.console, typer
sys.modules["fcntl"] = None
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda fd, mode, size: None)
sys.platform = "win32"
import {module}
"""
    assert loaded(code) == set()
