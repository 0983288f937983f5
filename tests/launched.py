"""A command as several processes of one run: started, ended, and what they said."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from tests.convert import child


def part(words: list[str], log: str, env: dict[str, str]) -> None:
    """Run a command as one process of several."""
    os.environ.update(env)
    child.work(words, log)


def launch(words: Iterable[object], logs: Path, count: int = 2, **more: str) -> list:
    """Start a command as `accelerate launch` would, `count` times; `more` is in its environment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(child.PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for rank in range(count):
        env = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        env = {**env, **more} if count > 1 else {}
        log = logs / f"{rank}.log"
        process = context.Process(target=part, args=([str(w) for w in words], str(log), env))
        process.start()
        started.append(process)
    return started


def ended(started: list, within: float = 240) -> list[int]:
    """Every process's exit code."""
    until = time.monotonic() + within
    for process in started:
        process.join(max(0.1, until - time.monotonic()))
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in started]


def said(logs: Path) -> list[str]:
    """The lines that begin with the program's name, of all processes."""
    lines = [line for log in sorted(logs.glob("*.log")) for line in log.read_text().splitlines()]
    return [line for line in lines if line.startswith("recast:")]
