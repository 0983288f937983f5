"""The networks of a checkpoint and the four things they do: encode, decode, condition, denoise."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Layout
from recast.layout.names import PART_NAMES, TEXTS
from recast.model.parts import Parts
from recast.objective import Net, Objective
from recast.text.encode import PADS, Condition, encode_prompts

SLICED = 4 * 512 * 512  # pixels of a batch above which the VAE takes one picture at a time
LARGE = 512 * 512  # pixels at once above which the VAE wants the device for itself
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(eq=False)
class Model:
    """The networks of one checkpoint; `size` is the side of pictures that it was trained for."""

    checkpoint: Checkpoint
    layout: Layout
    parts: MutableMapping[str, nn.Module]
    objective: Objective
    size: int
    dtype: torch.dtype
    device: torch.device
    scaling: float
    shift: float = 0.0
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def unet(self) -> nn.Module:
        """The denoising network."""
        return self.part("unet")

    @property
    def vae(self) -> nn.Module:
        """The autoencoder, in float32."""
        return self.part("vae")

    @property
    def texts(self) -> tuple[nn.Module, ...]:
        """The text encoders, in the family's order."""
        return tuple(self.part(name) for name in self.text_parts)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Names of the family's text encoders."""
        return tuple(TEXTS[self.layout.family])

    def part(self, name: str) -> nn.Module:
        """Return a module; refuses one that the file does not have or that was not opened."""
        if name not in self.parts:
            why = "has no" if name in self.layout.missing else "was opened without its"
            raise Refused(f"{self.checkpoint.path} {why} {PART_NAMES[name]}, which is needed here.")
        return self.parts[name]

    def fingerprint(self, name: str) -> str:
        """Hash a part's weights as they are loaded (computed once)."""
        if name not in self._fingerprints:
            found = hashlib.sha256()
            for key, value in sorted(self.part(name).state_dict().items()):
                found.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
                found.update(
                    value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                )
            self._fingerprints[name] = found.hexdigest()
        return self._fingerprints[name]

    @property
    def factor(self) -> int:
        """How many pixels one latent is wide."""
        return 2 ** (len(self.layout.vae["block_out_channels"]) - 1) if self.layout.vae else 8

    def latent_shape(self, size: int | Size | None = None) -> tuple[int, int, int]:
        """Return (C, h, w) for a picture's side or (height, width); default: the model's size."""
        height, width = self.pixels(size)
        for side in (height, width):
            if side < self.factor or side % self.factor:
                raise Refused(
                    f"A picture of {width}x{height} has no latents: sides must be multiples of "
                    f"{self.factor}."
                )
        return self.layout.unet["in_channels"], height // self.factor, width // self.factor

    def pixels(self, size: int | Size | None = None) -> Size:
        """Return (height, width) for a side, a pair, or the model's own size."""
        if size is None:
            size = self.size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    def encode(self, images: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Return scaled latents of images (B, 3, H, W) in [-1, 1]: their mean, or a draw."""
        images = images.to(self.device, torch.float32)
        self._make_room(len(images), images[0, 0].numel())

        def one(part: Tensor) -> Tensor:
            found = self.vae.encode(part).latent_dist  # type: ignore[operator]
            return found.mode() if generator is None else found.sample(generator)

        return (sliced(one, images, images[0, 0].numel()) - self.shift) * self.scaling

    def decode(self, latents: Tensor) -> Tensor:
        """Return float32 images (B, 3, H, W) of scaled latents: [-1, 1], but for overshoots."""
        latents = latents.to(self.device, torch.float32) / self.scaling + self.shift
        pixels = latents[0, 0].numel() * self.factor**2
        self._make_room(len(latents), pixels)
        return sliced(lambda part: self.vae.decode(part).sample, latents, pixels)  # type: ignore[operator]

    def _make_room(self, count: int, pixels: int) -> None:
        """Let the other networks wait elsewhere while the VAE works on large pictures."""
        at_once = count * pixels if count * pixels <= SLICED else pixels
        if at_once > LARGE and isinstance(self.parts, Parts):
            self.parts.alone("vae")

    def condition(
        self,
        prompts: Sequence[str],
        *,
        size: int | Size | None = None,
        time_ids: Sequence[Sequence[float]] | None = None,
    ) -> Condition:
        """Encode prompts; SDXL is told the size, uncropped, or what `time_ids` (B, 6) say instead.

        Gradients flow to whatever of the text encoders asks for them.
        """
        names = self.text_parts
        context, pooled = encode_prompts(
            self.texts, prompts, pads=PADS[: len(names)], penultimate=len(names) > 1
        )
        if self.layout.family != "sdxl":
            return Condition(context)
        height, width = self.pixels(size)
        rows = time_ids or [(height, width, 0, 0, height, width)] * len(prompts)
        sizes = torch.tensor(rows, dtype=torch.float32, device=self.device)
        return Condition(context, pooled, sizes)

    def net(self, condition: Condition, objective: Objective | None = None) -> Net:
        """Bind a condition: (x, t) -> output, t on the path of `objective` (default: the model's).

        One condition serves any batch.  The answer has x's dtype; the UNet computes in its own, and
        is asked for at each call, since another network may have taken its place on the device.
        """
        path = (objective or self.objective).path
        bound = condition.to(self.device, self.dtype)

        def call(x: Tensor, t: Tensor) -> Tensor:
            rows = bound.expand(len(x))
            added = {} if rows.pooled is None else {"text_embeds": rows.pooled}
            if rows.time_ids is not None:
                added["time_ids"] = rows.time_ids
            clock = path.embed(torch.as_tensor(t, device=x.device)).float().expand(len(x))
            answer = self.unet(
                x.to(self.dtype),
                clock,
                encoder_hidden_states=rows.context,
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
            return answer.to(x.dtype)

        return call


def sliced(run: Callable[[Tensor], Tensor], batch: Tensor, pixels: int) -> Tensor:
    """Run a batch whole, or one row at a time where its pictures of `pixels` are large together."""
    if len(batch) * pixels <= SLICED:
        return run(batch)
    return torch.cat([run(row) for row in batch.split(1)])
