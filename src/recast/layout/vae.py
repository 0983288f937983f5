"""A VAE by itself, from whatever holds one, and a checkpoint that is given another VAE.

    file      ldm names (with or without first_stage_model.) or diffusers'; a whole checkpoint
    folder    of AutoencoderKL (config.json), or of a whole pipeline

A checkpoint with another VAE has all its other tensors as they were.  Scale and shift that no
loader would guess are folded into the 1x1 convolutions at the latents' door, with the family's
scale f, which is exact but for rounding:
    z' = (z - shift) scale / f      quant_conv: mean rows; log variances + 2 log(scale / f)
    z = z' f / scale + shift        post_quant_conv
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint, Spec
from recast.errors import Refused
from recast.header import place
from recast.layout import latents
from recast.layout.blueprint import Plan, VAEPlan, blueprint
from recast.layout.configs import SCALING
from recast.layout.detect import detect, read_vae
from recast.layout.folder import canonical, open_checkpoint, piece_shape
from recast.layout.keymap import trace
from recast.layout.names import UNET, VAE
from recast.layout.pipeline import INDEX, Odd, vae_plan
from recast.layout.weights import Weights, read_json

if TYPE_CHECKING:
    from torch import Tensor

DOOR = ("quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias")
KIND = "a VAE file in ldm's or diffusers' names, a diffusers vae folder, or a checkpoint"


@dataclass(frozen=True)
class Autoencoder:
    """A VAE's tensors by their own names; scale and shift are None where nothing states them.

    `theirs`: whether the names are diffusers'.
    """

    path: Path
    plan: VAEPlan
    theirs: bool
    specs: Mapping[str, Spec]
    raw: Callable[[str], bytearray]
    close: Callable[[], None]
    scale: float | None = None
    shift: float | None = None

    def sha256(self) -> str:
        """Hash of names and bytes, whatever file they lie in."""
        found = hashlib.sha256()
        for name in sorted(self.specs):
            spec = self.specs[name]
            found.update(f"{name} {spec.dtype} {spec.shape}\n".encode())
            found.update(self.raw(name))
        return found.hexdigest()


def open_vae(path: Path | str) -> Autoencoder:
    """Open a VAE; raises Refused, in one sentence, for whatever is none."""
    path = Path(path)
    if path.is_dir() and not (path / INDEX).exists():
        return _of_folder(path)
    checkpoint = open_checkpoint(path)
    if path.is_dir() or any(key.startswith(UNET) for key in checkpoint.specs):
        return _of_model(checkpoint)
    return _of_file(checkpoint)


def _of_model(checkpoint: Checkpoint) -> Autoencoder:
    layout = detect(checkpoint)
    if layout.plan.vae is None:
        raise Refused(f"{checkpoint.path} has no VAE: give {KIND}.")
    return Autoencoder(
        checkpoint.path, layout.plan.vae, False, *_below(checkpoint, VAE), checkpoint.close,
        layout.scaling, layout.shift,
    )  # fmt: skip


def _below(
    checkpoint: Checkpoint, prefix: str
) -> tuple[dict[str, Spec], Callable[[str], bytearray]]:
    """The tensors below a prefix, named without it."""
    found = {k.removeprefix(prefix): s for k, s in checkpoint.specs.items() if k.startswith(prefix)}
    return found, lambda name: checkpoint.raw(prefix + name)


def _of_file(checkpoint: Checkpoint) -> Autoencoder:
    """A VAE alone in a file, in either naming; scale and shift from Recast's own entries."""
    prefix = VAE if any(key.startswith(VAE) for key in checkpoint.specs) else ""
    specs, raw = _below(checkpoint, prefix)
    theirs = "encoder.down_blocks.0.resnets.0.conv1.weight" in specs
    shapes = {name: spec.shape for name, spec in specs.items()}
    try:
        plan = _read_theirs(shapes) if theirs else read_vae(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise Refused(
            f"{checkpoint.path} holds no VAE ({error} is absent): give {KIND}."
        ) from error
    said: list[float | None] = [None, None]
    if latents.VAE_SCALE in checkpoint.metadata:
        try:
            said = list(latents.stated(checkpoint.metadata, "sdxl"))
        except Refused as error:
            raise Refused(f"{checkpoint.path}: {error}") from error
    return Autoencoder(checkpoint.path, plan, theirs, specs, raw, checkpoint.close, *said)


def _read_theirs(shapes: Mapping[str, tuple[int, ...]]) -> VAEPlan:
    """The plan of a VAE in diffusers' names."""

    def count(prefix: str) -> int:
        return len({k[len(prefix) :].partition(".")[0] for k in shapes if k.startswith(prefix)})

    levels = range(count("encoder.down_blocks."))
    return VAEPlan(
        widths=tuple(shapes[f"encoder.down_blocks.{k}.resnets.0.conv1.weight"][0] for k in levels),
        layers=count("encoder.down_blocks.0.resnets."),
        latent=shapes["decoder.conv_in.weight"][1],
    )


def _of_folder(path: Path) -> Autoencoder:
    if not (path / "config.json").exists():
        raise Refused(f"{path} has neither {INDEX} nor config.json: give {KIND}.")
    config = read_json(path / "config.json")
    try:
        if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
            raise Odd(f"is a {str(config['_class_name'])[:60]}'s")
        plan = vae_plan(config)
    except Odd as error:
        raise Refused(f"{path / 'config.json'} {error}: give {KIND}.") from error
    weights = Weights(path, "diffusion_pytorch_model")
    return Autoencoder(
        path, plan, True, weights.specs, weights.raw, weights.close, *latents.of_config(config)
    )


class Exchanged:
    """A checkpoint's tensors with another VAE's in place of its own; see the module's docstring.

    Its sha256 is the checkpoint's: that is what adapters of the UNet belong to.  `fold` off leaves
    the VAE's bytes alone and states scale and shift in the header.
    """

    def __init__(
        self, checkpoint: Checkpoint, vae: Autoencoder, scale: float, shift: float, *, fold: bool
    ) -> None:
        layout = detect(checkpoint)
        self.checkpoint, self.vae, self.path = checkpoint, vae, checkpoint.path
        plan = replace(layout.plan, vae=vae.plan)
        shapes = {k: s for k, s in blueprint(plan).items() if k.startswith(VAE)}
        self._names = _names(plan, vae, shapes)
        self._gain = scale / SCALING[layout.family] if fold else 1.0
        self._shift = shift if fold else 0.0
        own = {k: (s.dtype, s.shape) for k, s in checkpoint.specs.items() if not k.startswith(VAE)}
        new = {key: (vae.specs[self._names[key]].dtype, shapes[key]) for key in shapes}
        self.specs = place({**own, **new})
        gone = (latents.VAE_SCALE, latents.VAE_SHIFT)
        self.metadata = {k: v for k, v in checkpoint.metadata.items() if k not in gone}
        self.metadata[latents.VAE_FILE] = vae.sha256()
        if not fold:
            self.metadata |= latents.entries(scale, shift, layout.family)

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self.checkpoint.files, self.vae.path)

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())

    def raw(self, key: str) -> bytearray:
        if key not in self._names:
            return self.checkpoint.raw(key)
        data = self.vae.raw(self._names[key])
        leaf = key.removeprefix(VAE)
        if leaf not in DOOR or (self._gain, self._shift) == (1.0, 0.0):
            return data
        return self._folded(leaf, data, self.specs[key])

    def sha256(self) -> str:
        return self.checkpoint.sha256()

    def close(self) -> None:
        self.vae.close()

    def _folded(self, leaf: str, data: bytearray, spec: Spec) -> bytearray:
        import torch

        def tensor(data: bytearray, spec: Spec) -> Tensor:
            return torch.frombuffer(data, dtype=spec.torch_dtype).reshape(spec.shape).double()

        value, half = tensor(data, spec), spec.shape[0] // 2
        if leaf == "quant_conv.weight":
            value[:half] *= self._gain
        elif leaf == "quant_conv.bias":
            value[:half] = (value[:half] - self._shift) * self._gain
            value[half:] += 2 * math.log(self._gain)
        elif leaf == "post_quant_conv.weight":
            value /= self._gain
        else:
            name = VAE + "post_quant_conv.weight"
            weight = tensor(self.vae.raw(self._names[name]), self.specs[name])
            value += self._shift * weight.sum((1, 2, 3))
        return bytearray(value.to(spec.torch_dtype).view(torch.uint8).numpy().data.cast("B"))


def _names(plan: Plan, vae: Autoencoder, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """For each tensor of a checkpoint's VAE its name in the Autoencoder; refuses what is amiss."""
    if not vae.theirs:
        found = {key: key.removeprefix(VAE) for key in shapes}
        wanted = dict(shapes)
    else:
        own = {canonical("vae", name): name for name in vae.specs}
        pieces = [entry for entry in trace(plan) if entry.part == "vae"]
        found = {entry.key: own.get(entry.param, entry.param) for entry in pieces}
        wanted = {entry.key: piece_shape(entry, shapes[entry.key]) for entry in pieces}
    for key, name in found.items():
        if name not in vae.specs:
            raise Refused(f"{vae.path} lacks the VAE's {name}: give {KIND}.")
        have = vae.specs[name]
        if math.prod(have.shape) != math.prod(wanted[key]) or have.shape[:2] != wanted[key][:2]:
            raise Refused(
                f"{vae.path}: {name} is {list(have.shape)} and not {list(wanted[key])}: "
                f"give {KIND}."
            )
    return found


def exchanged(
    checkpoint: Checkpoint, path: Path, scale: float | None, shift: float | None, *, fold: bool
) -> Checkpoint:
    """A checkpoint as it would be with the VAE at `path`; scale and shift None as that states them.

    Raises Refused where they are unknown, and for latents of other channels or another size.
    """
    with ExitStack() as undo:
        vae = open_vae(path)
        undo.callback(vae.close)
        own = detect(checkpoint).plan
        levels = len(own.vae.widths) if own.vae else 4
        if vae.plan.latent != own.unet.channels:
            raise Refused(
                f"{path} makes latents of {vae.plan.latent} channels and {checkpoint.path} takes "
                f"{own.unet.channels}: give a VAE of the model's family."
            )
        if len(vae.plan.widths) != levels:
            raise Refused(
                f"{path} shrinks pictures {2 ** (len(vae.plan.widths) - 1)} times and "
                f"{checkpoint.path} expects {2 ** (levels - 1)}: give a VAE of the model's family."
            )
        scale = vae.scale if scale is None else scale
        if scale is None:
            raise Refused(f"{path} does not state the scale of its latents: give --vae-scale.")
        shift = (vae.shift or 0.0) if shift is None else shift
        made = Exchanged(checkpoint, vae, scale, shift, fold=fold)
        found = Checkpoint(checkpoint.path, store=made)
        detect(found)
        undo.pop_all()
        return found
