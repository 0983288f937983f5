"""Optimizers by name: a table of rows, any class by its dotted path, and the averaged weights.

Rows keep the settings of the published runs; every argument can be overridden. Libraries are
imported only when one of their rows is built.
"""

import importlib
import inspect
import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from recast.errors import Refused

__all__ = ["ONE_RATE", "OPTIMIZERS", "Row", "averaged", "build"]

logger = logging.getLogger("recast.optim")


@dataclass(frozen=True)
class Row:
    """Where an optimizer's class is, and the arguments it is built with unless told otherwise.

    `adapts`: it finds the rate by itself, one for all layers; lr is then a factor, 1 as a rule.
    """

    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    adapts: bool = False


PRODIGY_PLUS = {  # the settings published with the "full fine-tune at home" recipe
    "lr": 1.0,
    "betas": (0.8, 0.8),
    "d0": 1e-5,
    "d_coef": 1.0,
    "prodigy_steps": 100,
    "schedulefree_c": 10,
    "weight_decay_by_lr": False,
    "use_stableadamw": False,
    "d_limiter": False,
    "use_speed": False,
}

OPTIMIZERS: dict[str, Row] = {
    "adamw": Row("torch.optim.AdamW", {"lr": 1e-3, "weight_decay": 0.0}),
    "adamw8bit": Row("bitsandbytes.optim.AdamW8bit", {"lr": 1e-3, "weight_decay": 0.0}),
    "adafactor": Row(
        "pytorch_optimizer.AdaFactor",
        {"lr": 1e-4, "relative_step": False, "scale_parameter": False},
    ),
    "lion": Row("pytorch_optimizer.Lion", {"lr": 1e-4}),
    "saveus": Row("recast.optim.saveus.Saveus", {"lr": 1e-3}),
    "dadaptlion": Row(
        "pytorch_optimizer.DAdaptLion",
        {"lr": 1.0, "betas": (0.9, 0.99), "d0": 1e-5},
        adapts=True,
    ),
    "dadaptadam": Row("pytorch_optimizer.DAdaptAdam", {"lr": 1.0, "d0": 1e-5}, adapts=True),
    "dadaptadan": Row(  # d without a bound on its growth overshoots by orders of magnitude
        "pytorch_optimizer.DAdaptAdan", {"lr": 1.0, "d0": 1e-5, "growth_rate": 1.02}, adapts=True
    ),
    "dadaptadagrad": Row(
        "pytorch_optimizer.DAdaptAdaGrad", {"lr": 1.0, "d0": 1e-5, "eps": 1e-8}, adapts=True
    ),
    "dadaptsgd": Row("pytorch_optimizer.DAdaptSGD", {"lr": 1.0, "d0": 1e-5}, adapts=True),
    "prodigy": Row("pytorch_optimizer.Prodigy", {"lr": 1.0, "betas": (0.9, 0.99)}, adapts=True),
    "prodigyplus": Row("prodigyplus.ProdigyPlusScheduleFree", PRODIGY_PLUS, adapts=True),
}

ONE_RATE = tuple(name for name, row in OPTIMIZERS.items() if row.adapts)


def build(
    name: str,
    parameters: Iterable[Tensor] | Iterable[dict[str, Any]],
    *,
    lr: float | None = None,
    **arguments: Any,
) -> Optimizer:
    """Build an optimizer of the table, or the class that a dotted path names.

    `parameters` are tensors or torch's group dicts. Raises Refused for an unknown name, an
    argument the class does not take, or a rate that is not above 0.
    """
    row = _row(name)
    chosen = {**row.arguments, **({} if lr is None else {"lr": lr}), **arguments}
    # a recipe file has lists only, where these classes expect tuples (betas)
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    if chosen.get("lr") is not None and not chosen["lr"] > 0:
        raise Refused(
            f"optimizer {name}: lr is {chosen['lr']}; it must be above 0 to train anything"
        )
    cls = _load(name, row.path)
    _check_arguments(name, cls, chosen)
    groups = list(parameters)
    if row.path.startswith("bitsandbytes."):
        _try(name, cls, chosen, groups)
    told = {"fused", "foreach"} & chosen.keys()
    if row.path == "torch.optim.AdamW" and not told and _fusable(groups):
        chosen["fused"] = True
    said = io.StringIO()
    with redirect_stdout(said):  # some libraries print, and stdout belongs to results
        optimizer = cls(groups, **chosen)
    for line in filter(None, said.getvalue().splitlines()):
        logger.info(line)
    if row.path.startswith("prodigyplus."):
        optimizer.log = logger.info
    return optimizer


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Show the averaged weights of a schedule-free optimizer; any other is left as it is.

    On leaving, the training weights return byte for byte: the library's own way back
    (`train()`) interpolates and is off by a rounding.
    """
    evaluate, train = getattr(optimizer, "eval", None), getattr(optimizer, "train", None)
    if not (callable(evaluate) and callable(train)):
        yield
        return
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    before = [p.detach().clone() for p in weights]
    evaluate()
    try:
        yield
    finally:
        train()
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)


def _row(name: str) -> Row:
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if "." in name:
        return Row(name)
    near = get_close_matches(name.lower().replace("_", ""), OPTIMIZERS, 1, 0.0)
    raise Refused(
        f"there is no optimizer {name!r}; the nearest is {near[0]!r} "
        f"(of {', '.join(OPTIMIZERS)}, or the dotted path of a class)"
    )


def _load(name: str, path: str) -> Any:
    module, _, attribute = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        mend = ": pip install 'recast[quant]'" if module.startswith("bitsandbytes") else ""
        raise Refused(f"optimizer {name}: {path} cannot be imported ({error}){mend}") from error
    if not (isinstance(cls, type) and issubclass(cls, Optimizer)):
        raise Refused(f"optimizer {name}: {path} is not a torch Optimizer")
    return cls


def _check_arguments(name: str, cls: type, chosen: Mapping[str, Any]) -> None:
    """Refuse arguments the class does not name: several libraries swallow typos in **kwargs."""
    parameters = inspect.signature(cls).parameters.values()
    known = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
    for key in chosen:
        if key not in known:
            near = get_close_matches(key, known, 1, 0.0)[0]
            raise Refused(f"optimizer {name} takes no argument {key!r}; the nearest is {near!r}")


def _try(name: str, cls: type, chosen: Mapping[str, Any], groups: list[Any]) -> None:
    """Take one step on the parameters' device: bitsandbytes has kernels for some devices only."""
    tensors = _tensors(groups)
    device = tensors[0].device if tensors else torch.device("cpu")
    probe = torch.nn.Parameter(torch.linspace(-1, 1, 8192, device=device))
    probe.grad = probe.detach().clone()
    try:
        cls([probe], **chosen).step()
        fault = "" if probe.isfinite().all() else "its first step is not finite"
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
    if fault:
        raise Refused(
            f"optimizer {name} cannot step on {device} ({fault}): take adamw, or another --device"
        )


def _fusable(groups: list[Any]) -> bool:
    """Whether one call can step all tensors: five times as fast as one by one where they are small.

    On a CPU those of 16 bits are stepped one by one, as they were before.
    """
    tensors = _tensors(groups)
    fit = (p.is_cuda or (p.device.type == "cpu" and p.dtype == torch.float32) for p in tensors)
    return bool(tensors) and all(fit)


def _tensors(groups: list[Any]) -> list[Tensor]:
    return [p for g in groups for p in (g["params"] if isinstance(g, dict) else [g])]
