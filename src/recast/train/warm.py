"""A warm start: the time embedding fitted to a new clock in closed form, before the first step.

    MLP'(features(embed'(t))) = MLP(features(embed(tau(t))))     for t in [0, 1]

tau(t) is the time on the source's path with the same sigma/alpha. What else was tried (the scale
of the first layer, the last layer by least squares) is in docs/log.md: it gave nothing.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast.objective import Path, retime


@dataclass(frozen=True)
class Fit:
    """New weights of the time embedding by name, and the error |MLP' - MLP| / |MLP| of each stage.

    `before` is the untouched network on the new clock, `solved` the second layer by least
    squares, `after` all layers after the last steps.
    """

    weights: dict[str, Tensor]
    before: float
    solved: float
    after: float


def fit_clock(
    embedding: nn.Module,
    features: Callable[[Tensor], Tensor],
    source: Path,
    target: Path,
    *,
    points: int = 1000,
    steps: int = 300,
    rate: float = 1e-4,
) -> Fit:
    """Fit a time embedding to the clock of `target`, `embedding` itself left untouched.

    `embedding` is a UNet's (linear_1, act, linear_2), `features` what feeds it: `unet.time_proj`.
    The least squares solution is the one nearest to the old weights; Adam then moves all layers.
    """
    mlp = deepcopy(embedding).float().requires_grad_(True)
    device = next(mlp.parameters()).device
    t = ((torch.arange(points) + 0.5) / points).to(device)
    with torch.no_grad():
        shown = features(target.embed(t)).float()
        wanted = mlp(features(source.embed(retime(t, target, source))).float())
        before = _error(mlp(shown), wanted)
        _solve(mlp, shown, wanted)
        solved = _error(mlp(shown), wanted)
    best, weights = solved, _weights(mlp)
    optimizer = torch.optim.Adam(mlp.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (mlp(shown) - wanted).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            error = _error(mlp(shown), wanted)
        if error < best:
            best, weights = error, _weights(mlp)
    return Fit(weights, before, solved, best)


def _solve(mlp: nn.Module, shown: Tensor, wanted: Tensor) -> None:
    """Set linear_2 to the ridge solution of H dW = wanted - now, which keeps dW small."""
    first, last = mlp.get_submodule("linear_1"), mlp.get_submodule("linear_2")
    hidden = mlp.get_submodule("act")(first(shown)).double()
    columns = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
    missing = (wanted - mlp(shown)).double()
    gram = columns.T @ columns
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    change = torch.linalg.solve(gram, columns.T @ missing)
    last.get_parameter("weight").add_(change[:-1].T.float())
    last.get_parameter("bias").add_(change[-1].float())


def _error(output: Tensor, wanted: Tensor) -> float:
    return ((output - wanted).norm() / wanted.norm()).item()


def _weights(mlp: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in mlp.named_parameters()}
