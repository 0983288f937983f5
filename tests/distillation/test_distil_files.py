"""A student's file: written and proven a tensor at a time."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.distillation.tiny_distil import config
from torch import Tensor

from recast.distillation import files
from recast.distillation.networks import Lazy, pair
from recast.errors import CheckFailed
from recast.model import open_model
from recast.train import noised

ADAPTER = {"kind": "adapter", "profile": "all", "dim": 4}


@pytest.mark.parametrize("student", [{}, pytest.param(ADAPTER, marks=pytest.mark.slow)])
def test_no_two_tensors_of_the_student_are_there_at_once(
    student: dict[str, object], home: Path, tmp_path: Path
) -> None:
    how = config(home, tmp_path / "run", student=student, target={"kind": "teacher_rf"})
    model = open_model(home / "sd15.safetensors")
    with pair(model, how, None) as both:
        for parameter in both.parameters.values():
            parameter.data.add_(0.01)
        dense = both.dense()
        alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        most = 0

        def read(name: str) -> Tensor:
            nonlocal most
            found = dense[name].clone()
            most = max(most, len(alive))
            alive.add(found)
            return found

        counted = replace(both, dense=lambda: Lazy(tuple(dense), read))
        x0 = torch.randn(2, *model.latent_shape())
        with torch.no_grad():
            condition = model.condition(["a lamp", ""])
        draw = noised(both.objective, x0, torch.tensor([0.2, 0.7]), torch.randn_like(x0), condition)
        proof = files.checkpoint(counted, how, tmp_path, 4, draw, "digest")
        assert most == 1  # the one before, until its name is taken
        assert proof.changed
        assert proof.error <= files.TOLERANCE
        short = replace(both, dense=lambda: Lazy(tuple(dense)[1:], read))
        with pytest.raises(CheckFailed, match="differ in 1 names"):
            files.checkpoint(short, how, tmp_path, 4, draw, "digest")
