"""The networks of the stages around training: in the run's precision, one kind on the device.

encode    text encoders, then the VAE          dream     text encoders, then the UNet
report    the original: text encoders, UNet, VAE; then the converted model the same way
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint
from recast.convert.training import precision
from recast.errors import Refused, Stopped
from recast.events import Event, Stage, Tick

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.data.cache import Store
    from recast.model import Model


def opened(source: Checkpoint | Path, job: Job, objective: str) -> Model:
    """A model whose networks are opened when they are asked for, and take turns on the device."""
    from recast.model import open_model

    dtype = precision(job.recipe, job.device)
    return open_model(source, dtype=dtype, device=job.device, objective=objective, lazily=True)


def encode_captions(
    texts: Iterable[str], store: Store, stopped: Callable[[], int]
) -> Iterator[Event]:
    """Encode all texts before any picture; one that is refused is said of its picture later."""
    every = list(texts)
    yield Stage("encode captions", len(every), "captions")
    for done, caption in enumerate(every, 1):
        with suppress(Refused):
            store.text(caption)
        yield Tick(done)
        if signal := stopped():
            raise Stopped(
                signal, "stopped while encoding captions; the same command goes on there."
            )
