"""Recast changes what a Stable Diffusion checkpoint predicts, without losing what it knows.

What a researcher wants is here by name, imported when it is first asked for:

    from recast import FLOW, express, open_model, sample_images
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from recast.adapter import Adapter, attach, decompose, read_adapter, rebuild, split
    from recast.checkpoint import Checkpoint
    from recast.convert import Job, run
    from recast.errors import RecastError, Refused
    from recast.layout import Layout, detect, open_checkpoint
    from recast.lowrank import LowRank, factorize
    from recast.model import Model, open_model
    from recast.objective import EPS, FLOW, OBJECTIVES, V_ZSNR, X0, Objective, V, carry, express
    from recast.recipe import Recipe
    from recast.recipe import load as load_recipe
    from recast.sample import sample_images

HOMES = {
    "adapter": ("Adapter", "attach", "decompose", "read_adapter", "rebuild", "split"),
    "checkpoint": ("Checkpoint",),
    "convert": ("Job", "run"),
    "errors": ("RecastError", "Refused"),
    "layout": ("Layout", "detect", "open_checkpoint"),
    "lowrank": ("LowRank", "factorize"),
    "model": ("Model", "open_model"),
    "objective": (
        "EPS", "FLOW", "OBJECTIVES", "V", "V_ZSNR", "X0", "Objective", "carry", "express",
    ),
    "recipe": ("Recipe",),
    "sample": ("sample_images",),
}  # fmt: skip
# public name: (module, its name there)
_PLACES = {name: (module, name) for module, names in HOMES.items() for name in names}
_PLACES |= {"load_recipe": ("recipe", "load")}

__all__ = [
    "EPS",
    "FLOW",
    "OBJECTIVES",
    "V_ZSNR",
    "X0",
    "Adapter",
    "Checkpoint",
    "Job",
    "Layout",
    "LowRank",
    "Model",
    "Objective",
    "RecastError",
    "Recipe",
    "Refused",
    "V",
    "__version__",
    "attach",
    "carry",
    "decompose",
    "detect",
    "express",
    "factorize",
    "load_recipe",
    "open_checkpoint",
    "open_model",
    "read_adapter",
    "rebuild",
    "run",
    "sample_images",
    "split",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, there = _PLACES[name]
    value = getattr(import_module(f"{__name__}.{module}"), there)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
