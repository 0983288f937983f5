"""An analytic denoiser to test against: the best network there is for a mixture of Gaussians.

For data x0 ~ sum_i w_i N(m_i, s_i^2 I) and x = alpha x0 + sigma eps, let
c_i = alpha^2 s_i^2 + sigma^2:

    r_i(x)    = softmax_i( log w_i - D/2 log c_i - |x - alpha m_i|^2 / 2 c_i )
    E[x0 | x] = sum_i r_i ( m_i + alpha s_i^2 / c_i (x - alpha m_i) )
    E[eps| x] = sum_i r_i (             sigma / c_i (x - alpha m_i) )

For one component the probability-flow ODE is solved by x(t) = alpha m + sqrt(c(t)) z, z constant.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recast.objective import Net, Objective, Path, levels


@dataclass(frozen=True)
class Mixture:
    weights: Tensor  # (K,)
    means: Tensor  # (K, D)
    scales: Tensor  # (K,)

    def posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x0 | x] and E[eps | x] for x (B, ...) of D numbers each; alpha, sigma (B or 1, 1)."""
        flat = x.flatten(1)
        alpha, sigma = alpha.reshape(-1, 1), sigma.reshape(-1, 1)
        c = alpha**2 * self.scales**2 + sigma**2  # (B, K)
        off = flat[:, None] - alpha[..., None] * self.means  # (B, K, D)
        logit = self.weights.log() - flat.shape[1] / 2 * c.log() - off.pow(2).sum(-1) / (2 * c)
        r = logit.softmax(1)[..., None]
        gain = (alpha * self.scales**2 / c)[..., None]
        x0 = (r * (self.means + gain * off)).sum(1)
        eps = (r * (sigma / c)[..., None] * off).sum(1)
        return x0.reshape(x.shape), eps.reshape(x.shape)

    def denoiser(self, path: Path):
        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            return self.posterior(x, *levels(path, t, x))

        return denoise

    def net(self, objective: Objective) -> Net:
        """The perfect network for an objective."""
        denoise = self.denoiser(objective.path)

        def answer(x: Tensor, t: Tensor) -> Tensor:
            return objective.target(*denoise(x, t), t)

        return answer


def gaussian(dim: int = 4, scale: float = 0.4) -> Mixture:
    """One component, so that the exact end of every trajectory is known."""
    mean = torch.linspace(-1, 1, dim, dtype=torch.float64)
    return Mixture(torch.ones(1).double(), mean[None], torch.tensor([scale]).double())


def clusters(dim: int = 4) -> Mixture:
    """Three unequal components."""
    means = torch.randn(3, dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return Mixture(
        torch.tensor([0.5, 0.3, 0.2]).double(), means, torch.tensor([0.3, 0.2, 0.5]).double()
    )


def exact(mixture: Mixture, path: Path, x: Tensor, t: Tensor, later: Tensor) -> Tensor:
    """Where the ODE of a one-component mixture leads from x at t."""
    mean, scale = mixture.means[0].reshape(1, *x.shape[1:]), mixture.scales[0]

    def place(t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = levels(path, t, x)
        return alpha * mean, (alpha**2 * scale**2 + sigma**2).sqrt()

    (mean_t, width_t), (mean_later, width_later) = place(t), place(later)
    return mean_later + width_later * (x - mean_t) / width_t
