"""The way from a model's latent space into another VAE's: a rotation and an offset.

    z' = A z + b        A orthogonal, least squares over pictures that both VAEs encoded

A rotation of white noise is white noise, so a noisy sample crosses as a whole, and with it
everything the original says of it (alpha, sigma as in objective.py):
    x' = alpha z' + sigma eps'      x = A^T (x' - alpha b)      eps' = A eps
    output' = a z' + b_ eps' = A output + a b
So the original answers in the new space, as far as the spaces are turned against each other and no
further: `residual` is what remains.  The same A, put into the first and the last convolution, is
where training begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.convert.folder import Folder
from recast.objective import Net, Objective, levels

if TYPE_CHECKING:
    from recast.model import Model
    from recast.sample.images import Painter
    from recast.text.encode import Condition

FILE = "bridge.safetensors"
FITTED = 64  # pictures at most that it is fitted to
FAR = 0.5  # residual above which the original's answers are no teacher


@dataclass(frozen=True)
class Bridge:
    """A (C, C), b (C,); errors relative to the new latents' spread.

    apart: of the old latents as they are. residual: through the bridge. linear: of the best linear
    map whatever, which no noise could cross.
    """

    matrix: Tensor
    offset: Tensor
    apart: float
    residual: float
    linear: float

    def forth(self, z: Tensor) -> Tensor:
        """Old latents (B, C, h, w) in the new space."""
        return turned(self.matrix, z) + self.offset.to(z)[:, None, None]

    def back(self, z: Tensor) -> Tensor:
        """New latents in the old space."""
        return turned(self.matrix.T, z - self.offset.to(z)[:, None, None])

    def carried(self, net: Net, objective: Objective) -> Net:
        """A net of the old space, of this objective, that answers in the new one."""

        def answer(x: Tensor, t: Tensor) -> Tensor:
            alpha, sigma = levels(objective.path, t, x)
            offset = self.offset.to(x)[:, None, None]
            output = net(turned(self.matrix.T, x - alpha * offset), t)
            a, _ = objective.predicts(alpha, sigma)
            return turned(self.matrix, output) + a * offset

        return answer

    def returned(self, net: Net, objective: Objective) -> Net:
        """A net of the new space that answers in the old one."""
        inverse = Bridge(
            self.matrix.T, -(self.matrix.T @ self.offset), self.apart, self.residual, self.linear
        )
        return inverse.carried(net, objective)

    def in_words(self) -> str:
        return (
            f"The latent spaces are {100 * self.apart:.0f} % of their spread apart, "
            f"{100 * self.residual:.0f} % after a rotation ({100 * self.linear:.0f} % after any "
            "linear map)."
        )


def turned(matrix: Tensor, z: Tensor) -> Tensor:
    """A matrix (C, C) applied to the channels of z (B, C, h, w)."""
    return torch.einsum("ij,bjhw->bihw", matrix.to(z), z)


def fit(old: Tensor, new: Tensor) -> Bridge:
    """The rotation and offset that bring old latents (B, C, h, w) nearest to new ones.

    Orthogonal Procrustes (Schönemann 1966): A = U V^T, with U S V^T = N' N^T of the centred
    latents.
    """
    a, b = (z.double().movedim(1, 0).flatten(1) for z in (old, new))
    mean_a, mean_b = a.mean(1, keepdim=True), b.mean(1, keepdim=True)
    u, _, v = torch.linalg.svd((b - mean_b) @ (a - mean_a).T)
    matrix = u @ v
    offset = mean_b - matrix @ mean_a
    spread = (b - mean_b).norm()
    linear = torch.linalg.lstsq((a - mean_a).T, (b - mean_b).T).solution.T
    errors = (b - a, b - matrix @ a - offset, (b - mean_b) - linear @ (a - mean_a))
    return Bridge(matrix.float(), offset[:, 0].float(), *(float(e.norm() / spread) for e in errors))


@torch.no_grad()
def crossed(old: Model, new: Model, latents: Tensor) -> Tensor:
    """Latents of the old space as the new VAE encodes their pictures."""
    parts = (old.decode(part).clamp(-1, 1) for part in latents.split(16))
    return torch.cat([new.encode(part).float() for part in parts])


@torch.no_grad()
def through(model: Model, pictures: Sequence[Tensor]) -> list[Tensor]:
    """Pictures (3, H, W) as the model's VAE gives them back: the most its own can be like them."""
    shown = (model.decode(model.encode(picture[None])) for picture in pictures)
    return [picture[0].float().clamp(-1, 1).cpu() for picture in shown]


def keep(folder: Folder, bridge: Bridge) -> None:
    """Write the bridge into the run's folder."""
    errors = torch.tensor([bridge.apart, bridge.residual, bridge.linear])
    tensors = {"matrix": bridge.matrix, "offset": bridge.offset, "errors": errors}
    write_dict(folder.path(FILE), tensors, folder.stamp(), force=True)


def read(folder: Folder) -> Bridge | None:
    """The run's bridge; None where the VAE stays."""
    if not folder.has(FILE):
        return None
    with Checkpoint(folder.path(FILE)) as file:
        return Bridge(file["matrix"], file["offset"], *file["errors"].tolist())


def folded_in(bridge: Bridge, first: Tensor) -> Tensor:
    """The first convolution's weight (O, C, k, k) for samples of the new space."""
    return torch.einsum("ojhw,ij->oihw", first, bridge.matrix.to(first))


def folded_out(bridge: Bridge, last: Tensor) -> Tensor:
    """The last convolution's weight (C, I, k, k) or bias (C,) for answers in the new space."""
    return torch.einsum("ij,j...->i...", bridge.matrix.to(last), last)


def painter(model: Model, bridge: Bridge | None) -> Painter:
    """The model from the original's noises, as far as a bridge carries them."""
    return model if bridge is None or not bridge.residual <= FAR else Painted(model, bridge)


class Painted:
    """A model of the new space that paints from noises of the old one, carried over the bridge.

    What `sample_images` needs; its pictures are the model's own, from the noise that belongs to the
    original's.
    """

    def __init__(self, model: Model, bridge: Bridge) -> None:
        self.model, self.bridge = model, bridge
        self.objective, self.device = model.objective, model.device

    def condition(self, prompts: Sequence[str], *, size: Any = None) -> Condition:
        return self.model.condition(prompts, size=size)

    def net(self, condition: Condition) -> Net:
        return self.bridge.returned(self.model.net(condition), self.objective)

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(self.bridge.forth(latents))

    def latent_shape(self, size: Any = None) -> tuple[int, int, int]:
        return self.model.latent_shape(size)
