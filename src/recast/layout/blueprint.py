"""Names and shapes of every tensor of an SDXL or SD 1.5 checkpoint, of any size.

A plan holds the few numbers that fix an architecture; the blueprint spells out the tensors in ldm's
names.  It is what detected files are compared with, and what generated ones are made from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from recast.layout.names import TEXTS, UNET, VAE

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]


@dataclass(frozen=True)
class UNetPlan:
    """widths and depths per level; depth counts transformer blocks, 0 is none.

    context: width of the text condition. vector: width of pooled text and size condition, None
    without. linear: whether proj_in and proj_out are matrices instead of 1x1 convolutions.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    vector: int | None
    linear: bool
    layers: int = 2
    channels: int = 4
    out: int = 4


@dataclass(frozen=True)
class VAEPlan:
    """linear: whether attention weights are stored as matrices instead of 1x1 convolutions."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent: int = 4
    linear: bool = False


@dataclass(frozen=True)
class TextPlan:
    """One CLIP text encoder; projection None where there is none."""

    width: int
    layers: int
    hidden: int
    vocabulary: int = 49408
    positions: int = 77
    projection: int | None = None


@dataclass(frozen=True)
class Plan:
    """A whole checkpoint; a part that a file lacks is None."""

    family: str
    unet: UNetPlan
    vae: VAEPlan | None
    te1: TextPlan | None
    te2: TextPlan | None = None


SDXL = Plan(
    "sdxl",
    UNetPlan((320, 640, 1280), (0, 2, 10), 10, 2048, 2816, linear=True),
    VAEPlan(),
    TextPlan(768, 12, 3072),
    TextPlan(1280, 32, 5120, projection=1280),
)
SD15 = Plan(
    "sd15",
    UNetPlan((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768, None, linear=False),
    VAEPlan(),
    TextPlan(768, 12, 3072),
)


def blueprint(plan: Plan) -> dict[str, Shape]:
    """Return {name: shape} of every tensor of a checkpoint, without markers and extras."""
    found = {UNET + name: shape for name, shape in unet(plan.unet)}
    prefixes = TEXTS[plan.family]
    if plan.te1:
        found |= {prefixes["te1"] + name: shape for name, shape in clip(plan.te1)}
    if plan.te2:
        found |= {prefixes["te2"] + name: shape for name, shape in open_clip(plan.te2)}
    if plan.vae:
        found |= {VAE + name: shape for name, shape in vae(plan.vae)}
    return found


def unet(plan: UNetPlan) -> Named:
    """The UNet's tensors, in ldm's names below its prefix."""
    first, time = plan.widths[0], 4 * plan.widths[0]
    yield from _linear("time_embed.0", time, first)
    yield from _linear("time_embed.2", time, time)
    if plan.vector is not None:
        yield from _linear("label_emb.0.0", time, plan.vector)
        yield from _linear("label_emb.0.2", time, time)
    yield from _conv("input_blocks.0.0", first, plan.channels, 3)
    skips, block, width = [first], 1, first
    for level, (wide, depth) in enumerate(zip(plan.widths, plan.depths, strict=True)):
        for _ in range(plan.layers):
            yield from _cell(plan, f"input_blocks.{block}", width, wide, depth)
            skips.append(width := wide)
            block += 1
        if level + 1 < len(plan.widths):
            yield from _conv(f"input_blocks.{block}.0.op", wide, wide, 3)
            skips.append(wide)
            block += 1
    yield from _residual("middle_block.0", width, width, time)
    if plan.middle:
        yield from _transformer(plan, "middle_block.1", width, plan.middle)
    yield from _residual("middle_block.2", width, width, time)
    yield from _output(plan, width, skips)
    yield from _norm("out.0", first)
    yield from _conv("out.2", plan.out, first, 3)


def _output(plan: UNetPlan, width: int, skips: list[int]) -> Named:
    block = 0
    for level in reversed(range(len(plan.widths))):
        wide, depth = plan.widths[level], plan.depths[level]
        for layer in range(plan.layers + 1):
            yield from _cell(plan, f"output_blocks.{block}", width + skips.pop(), wide, depth)
            width = wide
            if level and layer == plan.layers:
                place = 2 if depth else 1
                yield from _conv(f"output_blocks.{block}.{place}.conv", wide, wide, 3)
            block += 1


def _cell(plan: UNetPlan, name: str, narrow: int, wide: int, depth: int) -> Named:
    yield from _residual(f"{name}.0", narrow, wide, 4 * plan.widths[0])
    if depth:
        yield from _transformer(plan, f"{name}.1", wide, depth)


def _residual(name: str, narrow: int, wide: int, time: int) -> Named:
    yield from _norm(f"{name}.in_layers.0", narrow)
    yield from _conv(f"{name}.in_layers.2", wide, narrow, 3)
    yield from _linear(f"{name}.emb_layers.1", wide, time)
    yield from _norm(f"{name}.out_layers.0", wide)
    yield from _conv(f"{name}.out_layers.3", wide, wide, 3)
    if narrow != wide:
        yield from _conv(f"{name}.skip_connection", wide, narrow, 1)


def _transformer(plan: UNetPlan, name: str, width: int, depth: int) -> Named:
    yield from _norm(f"{name}.norm", width)
    yield from _projection(plan, f"{name}.proj_in", width)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        for attention, context in (("attn1", width), ("attn2", plan.context)):
            yield f"{block}.{attention}.to_q.weight", (width, width)
            yield f"{block}.{attention}.to_k.weight", (width, context)
            yield f"{block}.{attention}.to_v.weight", (width, context)
            yield from _linear(f"{block}.{attention}.to_out.0", width, width)
        yield from _linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from _linear(f"{block}.ff.net.2", width, 4 * width)
        for norm in ("norm1", "norm2", "norm3"):
            yield from _norm(f"{block}.{norm}", width)
    yield from _projection(plan, f"{name}.proj_out", width)


def _projection(plan: UNetPlan, name: str, width: int) -> Named:
    yield from _linear(name, width, width) if plan.linear else _conv(name, width, width, 1)


def vae(plan: VAEPlan) -> Named:
    """The VAE's tensors, in ldm's names below its prefix."""
    widths, last = plan.widths, len(plan.widths) - 1
    yield from _conv("encoder.conv_in", widths[0], 3, 3)
    width = widths[0]
    for level, wide in enumerate(widths):
        for layer in range(plan.layers):
            yield from _vae_residual(f"encoder.down.{level}.block.{layer}", width, wide)
            width = wide
        if level < last:
            yield from _conv(f"encoder.down.{level}.downsample.conv", wide, wide, 3)
    yield from _vae_ends(plan, "encoder", width, 2 * plan.latent)
    yield from _conv("quant_conv", 2 * plan.latent, 2 * plan.latent, 1)
    yield from _conv("post_quant_conv", plan.latent, plan.latent, 1)
    yield from _conv("decoder.conv_in", width, plan.latent, 3)
    for level in reversed(range(len(widths))):
        for layer in range(plan.layers + 1):
            yield from _vae_residual(f"decoder.up.{level}.block.{layer}", width, widths[level])
            width = widths[level]
        if level:
            yield from _conv(f"decoder.up.{level}.upsample.conv", width, width, 3)
    yield from _vae_ends(plan, "decoder", width, 3)


def _vae_ends(plan: VAEPlan, side: str, width: int, out: int) -> Named:
    """Middle block, at the deepest width, and output layers of encoder or decoder."""
    deep = plan.widths[-1]
    yield from _vae_residual(f"{side}.mid.block_1", deep, deep)
    yield from _norm(f"{side}.mid.attn_1.norm", deep)
    for name in ("q", "k", "v", "proj_out"):
        path = f"{side}.mid.attn_1.{name}"
        yield from _linear(path, deep, deep) if plan.linear else _conv(path, deep, deep, 1)
    yield from _vae_residual(f"{side}.mid.block_2", deep, deep)
    yield from _norm(f"{side}.norm_out", width)
    yield from _conv(f"{side}.conv_out", out, width, 3)


def _vae_residual(name: str, narrow: int, wide: int) -> Named:
    yield from _norm(f"{name}.norm1", narrow)
    yield from _conv(f"{name}.conv1", wide, narrow, 3)
    yield from _norm(f"{name}.norm2", wide)
    yield from _conv(f"{name}.conv2", wide, wide, 3)
    if narrow != wide:
        yield from _conv(f"{name}.nin_shortcut", wide, narrow, 1)


def clip(plan: TextPlan) -> Named:
    """A CLIP text encoder in the names of transformers."""
    yield "embeddings.token_embedding.weight", (plan.vocabulary, plan.width)
    yield "embeddings.position_embedding.weight", (plan.positions, plan.width)
    for index in range(plan.layers):
        layer = f"encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", plan.width, plan.width)
        yield from _norm(f"{layer}.layer_norm1", plan.width)
        yield from _linear(f"{layer}.mlp.fc1", plan.hidden, plan.width)
        yield from _linear(f"{layer}.mlp.fc2", plan.width, plan.hidden)
        yield from _norm(f"{layer}.layer_norm2", plan.width)
    yield from _norm("final_layer_norm", plan.width)


def open_clip(plan: TextPlan) -> Named:
    """A CLIP text encoder in OpenCLIP's names: q, k, v stacked, the projection transposed."""
    yield "token_embedding.weight", (plan.vocabulary, plan.width)
    yield "positional_embedding", (plan.positions, plan.width)
    for index in range(plan.layers):
        block = f"transformer.resblocks.{index}"
        yield from _norm(f"{block}.ln_1", plan.width)
        yield f"{block}.attn.in_proj_weight", (3 * plan.width, plan.width)
        yield f"{block}.attn.in_proj_bias", (3 * plan.width,)
        yield from _linear(f"{block}.attn.out_proj", plan.width, plan.width)
        yield from _norm(f"{block}.ln_2", plan.width)
        yield from _linear(f"{block}.mlp.c_fc", plan.hidden, plan.width)
        yield from _linear(f"{block}.mlp.c_proj", plan.width, plan.hidden)
    yield from _norm("ln_final", plan.width)
    if plan.projection is not None:
        yield "text_projection", (plan.width, plan.projection)


def _linear(name: str, out: int, into: int) -> Named:
    yield f"{name}.weight", (out, into)
    yield f"{name}.bias", (out,)


def _conv(name: str, out: int, into: int, kernel: int) -> Named:
    yield f"{name}.weight", (out, into, kernel, kernel)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)
