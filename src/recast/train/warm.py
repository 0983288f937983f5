"""Warm starts: what can be fitted in closed form before the first step.

    clock     MLP'(features(embed'(t))) = MLP(features(embed(tau(t))))     for t in [0, 1]
    input     k = E[r(t) |x|²] / E[|x|²]     where r(t) x on the source's path is x on the target's
    output    conv_out'(h(x, t)) = what the teacher answers at (x, t)      on a few latents

tau(t) is the time on the source's path with the same sigma/alpha, h what the last convolution is
given. Clock and input show a frozen trunk nearly what it knows: what is left of them is the part of
r(t) that no constant is. docs/log.md has what each gave.
"""

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from recast.objective import Path, carry, retime


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


@dataclass(frozen=True)
class InputFit:
    """The factor of the first convolution's weights, and the error |k x - r x| / |r x|.

    `before` is that of k = 1.
    """

    factor: float
    before: float
    after: float


def fit_input(source: Path, target: Path, *, points: int = 1000) -> InputFit:
    """The constant nearest to the scale between the samples of two paths.

    Data and noise are taken for independent and of variance 1, so |x|² = alpha² + sigma².
    """
    t = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    alpha, sigma = target(t)
    power = alpha.square() + sigma.square()
    r, _ = carry(torch.ones_like(t), t, target, source)
    factor = ((r * power).sum() / power.sum()).item()

    def error(k: float) -> float:
        missed, whole = ((k - r).square() * power).sum(), (r.square() * power).sum()
        return (missed / whole).sqrt().item()

    return InputFit(factor, error(1.0), error(factor))


@dataclass(frozen=True)
class OutputFit:
    """A new weight and bias of a convolution, and |conv(h) - wanted| / |wanted| before and after.

    Errors are those of pairs that were not fitted.
    """

    weight: Tensor
    bias: Tensor
    before: float
    after: float


@dataclass
class _Moments:
    """Sums over pixels of columns' products: H'H, H'Y and Y'Y, in fp64."""

    gram: Tensor
    cross: Tensor
    square: float

    def error(self, solution: Tensor) -> float:
        """|H W - Y| / |Y|."""
        fitted = (solution * (self.gram @ solution - 2 * self.cross)).sum().item()
        return (max(fitted + self.square, 0.0) / self.square) ** 0.5 if self.square else 0.0


def fit_output(
    conv: nn.Conv2d, pairs: Iterable[tuple[Tensor, Tensor]], *, ridge: float = 1e-4
) -> OutputFit:
    """Fit a convolution of stride 1 to (input, wanted output) pairs, `conv` itself left untouched.

    Every second pair is kept for the errors. The ridge, in mean squares of the columns, holds the
    solution near the old weights.
    """
    old = _as_columns(conv)
    fitted, kept = (_Moments(old.new_zeros(len(old), len(old)), old * 0, 0.0) for _ in range(2))
    for number, (given, wanted) in enumerate(pairs):
        _add(kept if number % 2 else fitted, conv, given, wanted)
    gram = fitted.gram.clone()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    new = old + torch.linalg.solve(gram, fitted.cross - fitted.gram @ old)
    weight = new[:-1].T.reshape(conv.weight.shape).float()
    return OutputFit(weight, new[-1].float(), kept.error(old), kept.error(new))


def _as_columns(conv: nn.Conv2d) -> Tensor:
    """Weight and bias as the matrix that unfolded columns and a 1 are multiplied with."""
    assert conv.bias is not None
    with torch.no_grad():
        return torch.cat([conv.weight.flatten(1).T, conv.bias[None]]).double()


def _add(moments: _Moments, conv: nn.Conv2d, given: Tensor, wanted: Tensor) -> None:
    """Add one batch's pixels, a sample at a time: unfolding makes 9 copies of the input."""
    size, padding = conv.kernel_size, conv.padding
    for one, answer in zip(given.split(1), wanted.split(1), strict=True):
        columns = nn.functional.unfold(one.float(), size, padding=padding)[0].T  # type: ignore[arg-type]
        columns = torch.cat([columns, torch.ones_like(columns[:, :1])], 1)
        y = answer.float().flatten(2)[0].T
        moments.gram += (columns.T @ columns).double()
        moments.cross += (columns.T @ y).double()
        moments.square += y.double().square().sum().item()
