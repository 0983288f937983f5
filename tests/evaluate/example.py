"""A made-up report for tests and for looking at the page."""

import math

import torch

from recast.evaluate.loading import how_to_load
from recast.evaluate.losses import losses_by_level
from recast.evaluate.pictures import shots
from recast.evaluate.values import (
    Drift,
    File,
    Identity,
    Level,
    Report,
    Statistics,
    measured,
)


def picture(seed: int, noise: float = 0.0, side: int = 64) -> torch.Tensor:
    """A disc on a tinted ground, (3, side, side) in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    ground, colour = torch.rand(2, 3, 1, 1, generator=g) * 2 - 1
    centre = 0.3 + 0.4 * torch.rand(2, generator=g)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    disc = (((x - centre[0]) ** 2 + (y - centre[1]) ** 2).sqrt() < 0.22).float()
    clean = ground * 0.5 * (1 - disc) + colour * disc
    return (clean + noise * torch.randn(clean.shape, generator=g)).clamp(-1, 1)


def drift_example() -> Drift:
    levels = tuple(
        Level(
            k / 10,
            k / 10 + 0.1,
            0.002 + 0.0004 * k * k,
            0.25 + 0.02 * (k - 4) ** 2 + 0.01,
            0.25 + 0.02 * (k - 4) ** 2,
            1.0 if k < 9 else 0.36,
        )
        for k in range(10)
    )
    return Drift(0.34, 0.35, 1.03, 0.0107, levels, "flow")


def example(count: int = 8, side: int = 64) -> Report:
    """A report as a conversion of the pocket model would give it."""
    seeds = list(range(count))
    captions = [
        f"a big red circle on {g} at left" for g in ("plain", "stripes", "dots", "checker") * count
    ][:count]
    clean = [picture(s, side=side) for s in seeds]
    log = [
        (step, [0.2 * math.exp(-step / 150) * (1 + t) + 0.02 * (1 + 3 * t) for t in times], times)
        for step in range(1, 401)
        for times in [[(k + 0.5) / 16 for k in range(16)]]
    ]
    return Report(
        model="pocket-xl",
        source="eps",
        target="flow",
        alignment=measured(0.979, 0.969, count=64),
        retention=measured(0.958, 0.927, count=32),
        leakage=measured(0.0, 0.0, count=96),
        psnr_same_noise_db=measured(35.8, 32.8, count=96),
        drift=drift_example(),
        identity=Identity(32.8, 9.3, 0.05, 0.051, 0.31, 0.96, 0.02, True),
        shots=shots(
            captions,
            seeds,
            clean,
            [picture(s, 0.02, side) for s in seeds],
            [picture(s, 1.5, side) for s in seeds],
        ),
        losses=losses_by_level(log),
        statistics={
            "original": Statistics(0.05, 4.1, -2.2, 0.01, 0.4, 0.6),
            "converted": Statistics(0.05, 4.1, -2.2, 0.01, 0.4, 0.6),
        },
        attributes={"shape": measured(0.98, 0.97), "colour": measured(1.0, 1.0)},
        settings={
            "target": {"objective": "flow", "teacher": "teacher", "above": "data"},
            "train": {
                "profile": "readout",
                "rank": 0,
                "steps": 400,
                "batch": 16,
                "optimizer": "adamw",
                "lr": 1e-3,
                "optimizer_args": {"weight_decay": 0.0},
                "schedule": "linear",
            },
            "data": {"images": "photos", "size": 0, "caption_dropout": 0.1},
            "evaluate": {"pictures": 96, "steps": 25, "guidance": 3.0, "solver": "euler"},
        },
        hashes={
            "original": "9f" * 32,
            "model.safetensors": "3c" * 32,
            "patch.safetensors": "a7" * 32,
        },
        timings={"open": 2.1, "cache": 8.0, "train": 76.2, "pictures": 121.0, "in all": 231.4},
        files=(
            File("model.safetensors", 10_090_000, "the converted checkpoint"),
            File(
                "patch.safetensors",
                840_000,
                "what the conversion changed; a LoRA-style file for ComfyUI",
            ),
            File("adapter.safetensors", 1_660_000, "what was trained, in fp32"),
        ),
        howto=how_to_load("sdxl", "flow", "model.safetensors"),
        command="recast convert pocket-xl --to flow --images photos --out runs/flow",
        version="0.1.0",
    )
