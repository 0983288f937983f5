"""Answers and pictures of a split and of a rebuilt file are those of the original."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter import Adapter, decompose, read_adapter, split, write_rebuilt
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import detect
from recast.lowrank import LowRank
from recast.verification import Question, rebuilt_answers, split_answers

ASKED = Question(level=3, steps=2, size=64)


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("tiny") / "o.safetensors"
    return tiny.checkpoint(path, request.param, dtype="F16", vocabulary=49408)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_split_answers_as_the_original(original: Path, tmp_path: Path, dtype: str) -> None:
    with Checkpoint(original) as source:
        layout = detect(source)
        sites = layout.sites(",".join(["principal", *layout.text_parts]))
        split(source, sites, 4, tmp_path, residual_dtype=dtype)
        adapter = read_adapter(tmp_path / "adapter.safetensors")
        with Checkpoint(tmp_path / "residual.safetensors") as residual:
            found = split_answers(source, residual, adapter, ASKED)
            assert found.passed, found
            assert found.output < found.forward_bound / 3
            assert found.psnr is not None
            weaker = {
                name: LowRank(entry.up * 0.5, entry.down)
                for name, entry in adapter.entries.items()
                if isinstance(entry, LowRank)
            }
            broken = Adapter(weaker, adapter.metadata)
            assert not split_answers(source, residual, broken, replace(ASKED, level=2)).passed


def test_a_rebuilt_file_answers_as_what_was_trained(original: Path, tmp_path: Path) -> None:
    with Checkpoint(original) as source:
        layout = detect(source)
        start = decompose(source, layout.sites(f"principal,{layout.text_parts[0]}"), 2)
        entries = {
            name: LowRank(entry.up + 0.02, entry.down)
            for name, entry in start.entries.items()
            if isinstance(entry, LowRank)
        }
        end = Adapter(entries, {**start.metadata, "recast.role": "pissa-trained"})
        write_rebuilt(source, start, end, tmp_path / "r.safetensors", objective="flow")
        with Checkpoint(tmp_path / "r.safetensors") as rebuilt:
            found = rebuilt_answers(source, rebuilt, start, end, ASKED)
            assert found.passed, found
            assert not rebuilt_answers(source, rebuilt, None, None, replace(ASKED, level=2)).passed
            with pytest.raises(Refused, match="choose 1"):
                rebuilt_answers(source, rebuilt, start, end, replace(ASKED, level=4))
