"""The networks of the stages around training: in the run's precision, one kind on the device.

encode    text encoders, then the VAE          dream     text encoders, then the UNet
report    the original: text encoders, UNet, VAE; then the converted model the same way
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint
from recast.convert.training import precision

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.model import Model


def opened(source: Checkpoint | Path, job: Job, objective: str) -> Model:
    """A model whose networks are opened when they are asked for, and take turns on the device."""
    from recast.model import open_model

    dtype = precision(job.recipe, job.device)
    return open_model(source, dtype=dtype, device=job.device, objective=objective, lazily=True)
