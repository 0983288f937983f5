"""Exact resume: everything a run needs to go on as if it had never stopped.

    state/step00000100/  parameters.safetensors  optimizer.safetensors  [ema.safetensors]
                         state.json              manifest.json (sizes and hashes, written last)

A folder without a right manifest does not exist: loading walks back to the newest that has one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recast import processes
from recast.checkpoint import Checkpoint, write, write_dict
from recast.commit import commit_folder, valid_folder
from recast.errors import NotFinite, Refused
from recast.train.ema import Ema
from recast.train.tree import flatten, unflatten

if TYPE_CHECKING:
    from recast.train.shards import Shards

NAME = re.compile(r"step(\d{8})")
WRAPPED = "__bnb_optimizer_quant_state__"  # bitsandbytes' saved states lie one level deeper


@dataclass(frozen=True)
class Found:
    """The newest valid state, and newer folders that were passed over because they are damaged."""

    path: Path
    step: int
    damaged: tuple[Path, ...]


def save(
    root: Path,
    *,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    ema: Ema | None = None,
    identity: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int = 2,
    shards: Shards | None = None,
) -> Path:
    """Commit the state after `step` steps below `root`, then prune to the `keep` newest.

    `parameters` are what the optimizer holds, in its order. `identity` is what must be equal at
    resume (recipe, seed, hash of the model), plain JSON; `extra` is handed back by `load` and may
    hold tensors. Save in training mode, not inside `averaged` or `shown`. With `shards` every
    process saves, and the first one writes all of it whole. Raises NotFinite, with nothing written,
    if a parameter is not finite.
    """
    if keep < 2:
        raise Refused(f"keep = {keep} states: the newest may be damaged, so keep 2 or more")
    _same_tensors(parameters, optimizer)
    if name := _lost(parameters, shards):
        raise NotFinite(f"step {step}: {name} is not finite; the state before it is kept")
    tensors: dict[str, Tensor] = {}
    scalars = {
        "step": step,
        "identity": dict(identity or {}),
        "extra": flatten(dict(extra or {}), tensors, "extra"),
        "optimizer": flatten(optimizer.state_dict(), tensors),
        "ema": ema.count if ema else None,
    }
    tensors |= {f"rng.{device}": state for device, state in _rng().items()}

    files: dict[str, Mapping[str, Tensor]] = {"parameters": parameters, "optimizer": tensors}
    if ema:
        files["ema"] = dict(zip(parameters, ema.tensors, strict=True))

    def fill(folder: Path) -> None:
        for name, content in files.items():
            _write(folder / f"{name}.safetensors", content, shards)
        text = json.dumps(scalars, indent=1, allow_nan=False)
        (folder / "state.json").write_text(text, encoding="utf-8")

    path = root / f"step{step:08d}"
    if shards is not None and not processes.first():
        for content in files.values():
            for _ in shards.gathered(content):
                pass
        return path
    root.mkdir(parents=True, exist_ok=True)
    if path.exists():
        _remove(path)
    commit_folder(path, fill)
    prune(root, keep)
    return path


def latest(root: Path) -> Found | None:
    """The newest state below `root` that is whole, by step; None if there is none."""
    damaged: list[Path] = []
    for step, path in reversed(list(_states(root))):
        if valid_folder(path):
            return Found(path, step, tuple(damaged))
        damaged.append(path)
    return None


def load(
    path: Path,
    *,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
    ema: Ema | None = None,
    identity: Mapping[str, Any] | None = None,
    shards: Shards | None = None,
) -> tuple[int, dict[str, Any]]:
    """Put a state back, dtypes and random generators included; returns (step, extra).

    Raises Refused, with nothing changed, if the state belongs to another run: the identity, the
    parameters' names, shapes or dtypes, or the use of an average differ.
    """
    _same_tensors(parameters, optimizer)
    scalars = json.loads((path / "state.json").read_text(encoding="utf-8"))
    _same_run(path, scalars["identity"], dict(identity or {}))
    if (ema is None) != (scalars["ema"] is None):
        raise Refused(f"{path}: saved {'without' if ema else 'with'} an average; set ema as it was")
    with ExitStack() as files:

        def file(name: str) -> Mapping[str, Tensor]:
            saved = files.enter_context(Checkpoint(path / f"{name}.safetensors"))
            if name == "parameters":
                _same_specs(path, parameters if shards is None else shards.whole, saved)
            return saved if shards is None else shards.of_file(saved)

        saved, tensors = file("parameters"), file("optimizer")
        _copy(parameters, saved)
        if ema is not None:
            _copy(dict(zip(parameters, ema.tensors, strict=True)), file("ema"))
            ema.count = scalars["ema"]
        restore(optimizer, unflatten(scalars["optimizer"], tensors))
        _set_rng({k[4:]: tensors[k] for k in tensors if k.startswith("rng.")})
        return scalars["step"], unflatten(scalars["extra"], tensors)


def restore(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load an optimizer's state with the dtypes it was saved with.

    torch casts state to the parameter's dtype on load, which ends bit-exact resume for optimizers
    that mix precisions; so the saved tensors are put back over the loaded ones. They are copied,
    because sums of a tensor can depend on how its memory is aligned.
    """
    optimizer.load_state_dict(saved)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for index, state in saved["state"].items():
        mine = optimizer.state[held[index]]
        for key, value in {**state, **state.get(WRAPPED, {})}.items():
            if key != WRAPPED:
                mine[key] = _placed(value, mine[key])
    for group in optimizer.param_groups:
        device = group["params"][0].device
        for key, value in group.items():
            # adaptive optimizers keep running sums here, on the parameters' device
            if isinstance(value, Tensor):
                group[key] = value.to(device)


def prune(root: Path, keep: int) -> None:
    """Remove all states older than the `keep` newest whole ones, and what a kill left of others."""
    for doomed in root.glob(".removed-step*"):
        shutil.rmtree(doomed)
    states = list(_states(root))
    if len(states) <= keep:
        return
    whole = [step for step, path in states if valid_folder(path)]
    for step, path in states:
        if len(whole) > keep and step < whole[-keep]:
            _remove(path)


def _states(root: Path) -> Iterator[tuple[int, Path]]:
    folders = sorted(root.glob("step*")) if root.is_dir() else []
    for path in folders:
        if match := NAME.fullmatch(path.name):
            yield int(match[1]), path


def _remove(folder: Path) -> None:
    """Take a state away: under its own name it is either whole or gone."""
    doomed = folder.with_name(f".removed-{folder.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _same_tensors(parameters: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    held = [p for group in optimizer.param_groups for p in group["params"]]
    if [id(p) for p in held] != [id(p) for p in parameters.values()]:
        raise ValueError("the named parameters are not the optimizer's, in its order")


def _same_run(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))  # as it would come back: tuples are lists
    keys = sorted(k for k in {*saved, *now} if saved.get(k) != now.get(k))
    if keys:
        told = ", ".join(f"{k} was {saved.get(k)!r} and is {now.get(k)!r}" for k in keys)
        raise Refused(
            f"{path} belongs to another run ({told}); use another folder or settings as they were"
        )


def _lost(parameters: Mapping[str, Tensor], shards: Shards | None) -> str:
    """The name of a parameter that is not finite, "" if all are; the same on every process."""
    odd = (k for k, p in enumerate(parameters.values(), 1) if not torch.isfinite(p).all())
    place = next(odd, 0)
    if shards is not None:
        (place,) = processes.agree(place)
    return list(parameters)[place - 1] if place else ""


def _write(path: Path, tensors: Mapping[str, Tensor], shards: Shards | None) -> None:
    if shards is None:
        write_dict(path, tensors, {})
    else:
        write(path, shards.specs(tensors), shards.gathered(tensors), {})


def _same_specs(path: Path, parameters: Mapping[str, Tensor], saved: Checkpoint) -> None:
    mine = {k: (p.dtype, tuple(p.shape)) for k, p in parameters.items()}
    theirs = {k: (s.torch_dtype, tuple(s.shape)) for k, s in saved.specs.items()}
    wrong = sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k))
    if wrong:
        raise Refused(f"{path}: {len(wrong)} parameters differ from this run's, first {wrong[0]}")


@torch.no_grad()
def _copy(into: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    for name, tensor in into.items():
        tensor.copy_(saved[name])


def _placed(saved: Any, loaded: Any) -> Any:
    if isinstance(saved, Tensor):
        return saved.to(loaded.device, copy=True)
    if isinstance(saved, dict):
        return {k: _placed(v, loaded[k]) for k, v in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_placed(v, w) for v, w in zip(saved, loaded, strict=True))
    return saved


def _rng() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _set_rng(states: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    for name, state in states.items():
        if name.startswith("cuda") and int(name[4:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[4:]))
