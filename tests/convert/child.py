"""A command line in its own process, started fast: a server that has imported all of it forks.

The server itself never computes, so it has no threads that a fork could lose.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = [
    "recast.cli",
    "recast.convert.measure",
    "recast.convert.training",
    "recast.model",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.loaders.single_file_utils",
    "transformers.models.clip.modeling_clip",
    "matplotlib.pyplot",
    "jinja2",
    "torch.utils.tensorboard",
]


def start(words: Iterable[object], log: Path) -> ForkServerProcess:
    """Start a command; what it prints goes to `log`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=work, args=([str(word) for word in words], str(log)))
    process.start()
    return process


def work(words: list[str], log: str) -> None:
    """Run a command in this process."""
    import torch

    from recast import cli

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    cli.main(words)
