"""A distillation that several processes compute: what each takes, and who does what.

first     checks, makes dreams and the profile | trains, logs, saves, proves | paints, uploads
others    wait                                 | train along                 | have ended
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from recast import processes
from recast.distillation.config import Config
from recast.errors import Refused
from recast.events import Event

if TYPE_CHECKING:
    from recast.distillation import Job


def widened(config: Config) -> Config:
    """A config whose steps take in what all processes do: `accumulate` is that of each one.

    The result is that of one process which accumulates it all, and so is the run's name.
    """
    if not processes.several():
        return config
    if processes.sharing():
        raise Refused(
            "recast distill keeps the whole student in every process: launch with --multi_gpu "
            "instead of FSDP."
        )
    accumulate = config.run.accumulate * processes.count()
    return config.model_copy(
        update={"run": config.run.model_copy(update={"accumulate": accumulate})}
    )


def assist(job: Job, stopped: Callable[[], int]) -> Iterator[Event]:
    """Wait for the first process to come as far as training, then train along."""
    from recast.distillation import checked, learned
    from recast.layout import open_checkpoint

    processes.wait(("start",), stopped)
    with open_checkpoint(job.model) as checkpoint:
        identity = checked(checkpoint, replace(job, force=False))
        yield from learned(job, checkpoint, identity, stopped)


def met(signal: int) -> int:
    """After a step: the signal that any process got."""
    return processes.agree(signal)[0] if processes.several() else signal


def saved() -> None:
    """Before all stop: nobody ends, and has the others ended, until the first one has saved."""
    if processes.several():
        processes.agree(0)
