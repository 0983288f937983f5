"""SAVEUS against its formula, computed again in float64 by numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from recast.errors import Refused
from recast.optim import build

torch.set_num_threads(1)
STEPS = 50
SHAPES = [(7,), (2,), (6, 5), (6, 1), (4, 3, 3, 2)]
PUBLISHED = {
    "lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "centralization": 0.5,
    "normalization": 0.5, "normalize_channels": True, "amp_fac": 2.0, "clip_power": 0.25,
    "decouple_weight_decay": False, "clip_gradients": False,
}  # fmt: skip


def expected(p: np.ndarray, gradients: list[np.ndarray], how: dict, in_place: bool) -> np.ndarray:
    """Step by step as the recipe states it, in its order."""
    b1, b2 = how["betas"]
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        others = tuple(range(1, g.ndim)) if g.ndim > 1 else None
        g = g - how["centralization"] * g.mean(axis=others, keepdims=True)
        scaled = None
        if g.ndim > 1 and how["normalize_channels"] and g[0].size > 1:
            scaled = g / (g.std(axis=others, keepdims=True, ddof=1) + 1e-8)
        elif g.size > 2:
            scaled = g / (g.std(ddof=1) + 1e-8)
        if scaled is not None and how["normalization"] > 0:
            n = how["normalization"]
            g = scaled if in_place else (1 - n) * g + n * scaled
        m = b1 * m + (1 - b1) * g
        g = g + how["amp_fac"] * m
        v = b2 * v + (1 - b2) * g**2
        step = how["lr"] / (1 - b1**t)
        below = np.sqrt(v) / np.sqrt(1 - b2**t) + how["eps"]
        if how["decouple_weight_decay"]:
            p = p * (1 - step * how["weight_decay"])
        else:
            g = g + how["weight_decay"] * p
        if how["clip_gradients"]:
            g = np.clip(g, -(t ** how["clip_power"]), t ** how["clip_power"])
        p = p - step * g / below
    return p


@pytest.mark.parametrize("in_place", [False, True], ids=["formula", "in place"])
@pytest.mark.parametrize(
    "other",
    [
        {},
        {"normalization": 0.0},
        {"normalize_channels": False, "normalization": 1.0},
        {"weight_decay": 0.3, "clip_gradients": True, "centralization": 0.8},
        {"weight_decay": 0.3, "decouple_weight_decay": True, "amp_fac": 0.5, "lr": 1e-2},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fifty_steps_are_those_of_the_formula(
    shape: tuple[int, ...], other: dict, in_place: bool
) -> None:
    random = np.random.default_rng(len(shape))
    start = random.normal(size=shape) * 0.1  # the size of weights
    gradients = [random.normal(size=shape) * (1 + t % 3) + 0.3 for t in range(STEPS)]
    wanted = expected(start, gradients, PUBLISHED | other, in_place)
    assert np.abs(wanted - start).max() > 1e-3
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        parameter = nn.Parameter(torch.tensor(start, dtype=dtype))
        optimizer = build("saveus", [parameter], in_place=in_place, **other)
        for g in gradients:
            given = torch.tensor(g, dtype=dtype)
            parameter.grad = given.clone()
            optimizer.step()
            assert torch.equal(parameter.grad, given)
        assert np.abs(parameter.detach().numpy() - wanted).max() < tolerance


def test_the_published_settings_are_the_defaults_and_the_readings_differ() -> None:
    moved = []
    for in_place in (False, True):
        parameter = nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = build("saveus", [parameter], in_place=in_place)
        group = dict(optimizer.param_groups[0])
        assert {k: group[k] for k in PUBLISHED} == PUBLISHED
        for t in range(3):
            parameter.grad = torch.linspace(-2, 3, 12).view(3, 4) * (t + 1) ** 2
            optimizer.step()
        moved.append(parameter.detach().clone())
    assert (moved[0] - moved[1]).abs().max() > 1e-4


def test_moments_of_bf16_parameters_are_fp32() -> None:
    parameter = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = build("saveus", [parameter])
    parameter.grad = torch.randn(4, 4).bfloat16()
    optimizer.step()
    state = optimizer.state[parameter]
    assert {state["exp_avg"].dtype, state["exp_avg_sq"].dtype} == {torch.float32}
    assert parameter.dtype == torch.bfloat16


def test_sparse_gradients_and_impossible_values_are_refused() -> None:
    parameter = nn.Parameter(torch.ones(3, 2))
    parameter.grad = torch.eye(3, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        build("saveus", [parameter]).step()
    for wrong in ({"betas": (1.0, 0.9)}, {"centralization": 1.5}, {"amp_fac": -1.0}):
        with pytest.raises(Refused, match=f"saveus: {next(iter(wrong))} is"):
            build("saveus", [parameter], **wrong)
