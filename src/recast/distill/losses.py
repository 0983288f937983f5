"""What a student is told, and how far its blocks are from the teacher's.

    KD_b     = 1 - cos(mean over places of S_b, same of T_b)      pooled, per sample
             = 1 - mean over places of cos(S_b, T_b)              spatial
    L_blocks = sum_b lambda_b (0.25 KD_b + w_loc Local_b)
    L        = mean_i w_i |output - target|² + w_blocks L_blocks

The target is the data's output or the teacher's, `express`ed in the student's objective; an eps
teacher then says v = (eps - sigma x) / alpha, whose error grows as 1/alpha, so it counts
min(1, alpha²/0.05), alpha on the variance-preserving path of the same noise level. Where the
teacher's path does not reach, the data's output takes over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recast.errors import Refused
from recast.objective import Net, Objective, Path, express, levels, slopes

KD_WEIGHT = 0.25
LOUD = 0.05  # alpha² below which a teacher's answer counts less
TOLERANCE = 0.02  # how far the slope of noisy samples on their data may be from alpha


@dataclass(frozen=True)
class Aim:
    """What is learned: an objective by name, and the teacher's share in its target."""

    objective: str
    share: float


AIMS = {
    "teacher_v": Aim("v", 1.0),
    "data_v": Aim("v", 0.0),
    "mix_v": Aim("v", 0.5),
    "teacher_rf": Aim("flow", 1.0),
    "rf": Aim("flow", 0.0),
    "mix": Aim("flow", 0.5),
}
"""Targets by name; `mix` and `mix_v` may be given another share."""


def target(
    answer: Tensor, x: Tensor, x0: Tensor, eps: Tensor, t: Tensor, *, source: Objective,
    objective: Objective, share: float = 1.0, control: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output wanted (B, C, H, W) and how much each sample counts (B,).

    `answer` is the teacher's, expressed in `objective`; `share` of the target is its, the rest the
    data's. `control` lets it count less where noise drowns it.
    """
    alpha, sigma = levels(objective.path, t, x)
    data = objective.target(x0, eps, t)
    if not share:
        return data, torch.ones_like(t, dtype=data.dtype)
    vp = alpha.square() / (alpha.square() + sigma.square())
    heard = (vp / LOUD).clamp(max=1) if control else torch.ones_like(vp)
    heard = torch.where(source.path.covers(alpha, sigma), heard, 0)
    # a share that is not heard is the data's only where the data has a share at all, or the path
    # of the teacher has ended
    rest = torch.where(heard > 0, 1 - share, 1.0)
    of_teacher = share * heard
    total = of_teacher + rest
    part = of_teacher / total
    value = torch.where(heard > 0, part * answer + (1 - part) * data, data)
    return value, total.flatten()


def expressed(teacher: Net, source: Objective, objective: Objective) -> Net:
    """The teacher as the student's objective has it, without gradients."""
    net = express(teacher, source, objective)

    def answer(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return net(x, t).float()

    return answer


def kd_pooled(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """KD_b of features (B, C, H, W) by their means over places; (B, nb) in the teacher's order."""
    return torch.stack(
        [1 - _cosine(s.mean((-2, -1)), t.mean((-2, -1))) for s, t in _pairs(student, teacher)], 1
    )


def kd_spatial(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """KD_b of features (B, C, H, W) place by place; (B, nb) in the teacher's order."""
    found = [1 - _cosine(s, t).flatten(1).mean(1) for s, t in _pairs(student, teacher)]
    return torch.stack(found, 1)


KDS = {"pooled": kd_pooled, "spatial": kd_spatial}


class LocalHeads(nn.Module):
    """1x1 convolutions that say each block's flow at its own resolution; zero at first."""

    def __init__(self, channels: Mapping[str, int], latent: int = 4) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({b: nn.Conv2d(c, latent, 1) for b, c in channels.items()})
        for head in self.heads.values():
            for parameter in head.parameters():
                nn.init.zeros_(parameter)

    def forward(self, features: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
        """Squared error against `wanted`, averaged down to each block's places; (B, nb)."""
        found = []
        for name, head in self.heads.items():
            output = head(_block(features, name, "the student").float())
            small = F.adaptive_avg_pool2d(wanted, output.shape[-2:])
            found.append((output - small).square().flatten(1).mean(1))
        return torch.stack(found, 1)


def block_term(
    values: Tensor, kd: Tensor, local: Tensor | None = None, *, kd_weight: float = KD_WEIGHT,
    local_weight: float = 0.0,
) -> Tensor:  # fmt: skip
    """L_blocks of one batch: lambda (nb,) times the blocks' means of kd and local (B, nb)."""
    each = kd_weight * kd.mean(0)
    if local is not None and local_weight:
        each = each + local_weight * local.mean(0)
    return (values.to(each) * each).sum()


def check_forward(x_t: Tensor, x0: Tensor, eps: Tensor, t: Tensor, *, path: Path) -> None:
    """Raise Refused unless x_t is x0 and eps noised along the path, slope by slope.

    A student shown states that its targets do not belong to, pure noise at every t above all,
    learns blobs. The slope of x_t on alpha x0 must be 1 within 2 %, that of what is left on
    sigma eps too, and nothing else may be left.
    """
    alpha, sigma = levels(path, t, x0.double())
    data, noise, x = alpha * x0.double(), sigma * eps.double(), x_t.double()
    if not x0.any():
        raise Refused(
            "there is no latent source: the latents of a batch are all zero, so give images, or "
            "let the teacher dream some"
        )
    for name, slope in slopes(path, x_t, x0, eps, t).items():
        if not abs(slope - 1) <= TOLERANCE:
            raise Refused(
                f"noisy latents hold {slope:.3f} times the {name} that their path prescribes: "
                "noise them along the student's path, from latents of real or dreamt pictures"
            )
    left = (x - data - noise).norm() / x.norm()
    if not left <= TOLERANCE:
        raise Refused(
            f"{left:.1%} of the noisy latents is neither their data nor their noise: noise them "
            "along the student's path"
        )


def _pairs(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> list[tuple]:
    return [(_block(student, n, "the student").float(), t.float()) for n, t in teacher.items()]


def _block(features: Mapping[str, Tensor], name: str, whose: str) -> Tensor:
    if name not in features:
        raise Refused(f"{whose} has no block {name}: tap the same blocks of student and teacher")
    return features[name]


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)
