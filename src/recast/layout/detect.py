"""Which architecture a file holds, read off the names and shapes of its tensors.

The plan is read from a few of them; then the blueprint of that plan must equal the file, tensor by
tensor, or the file is refused with what differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

from recast.checkpoint import FLOATS, Spec
from recast.errors import Refused
from recast.layout.blueprint import Plan, TextPlan, UNetPlan, VAEPlan, blueprint
from recast.layout.configs import text_config, unet_config, vae_config
from recast.layout.latents import configured, stated
from recast.layout.layout import Layout
from recast.layout.names import PART_NAMES, TEXTS, UNET, VAE, is_adapter, is_extra
from recast.markers import MARKERS

Shapes = Mapping[str, tuple[int, ...]]
Read = TypeVar("Read", VAEPlan, TextPlan)

# names that decide: (beginning of a tensor's name, what such a file is)
STRANGERS = (
    ("model.diffusion_model.double_blocks.", "a Flux model"),
    ("double_blocks.", "a Flux model"),
    ("model.diffusion_model.joint_blocks.", "a Stable Diffusion 3 model"),
    ("joint_blocks.", "a Stable Diffusion 3 model"),
    ("cond_stage_model.model.", "a Stable Diffusion 2 model"),
    ("conditioner.embedders.0.model.", "an SDXL refiner"),
    ("down_blocks.", "a diffusers UNet without the rest of its pipeline"),
    ("control_model.", "a ControlNet"),
    ("emb_params", "a textual inversion"),
    ("string_to_param", "a textual inversion"),
    ("model.layers.", "a language model"),
    ("decoder.", "a VAE alone"),
    ("first_stage_model.", "a VAE alone"),
    ("blocks.", "a transformer model"),
)
NEEDED = "Recast converts SDXL and SD 1.5 checkpoints in the single-file layout"


class Opened(Protocol):
    """What detection needs of a checkpoint: its header."""

    @property
    def path(self) -> Path: ...
    @property
    def specs(self) -> Mapping[str, Spec]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


def detect(checkpoint: Opened) -> Layout:
    """Return a checkpoint's layout.

    A whole text encoder or the VAE may be absent (`layout.missing`). Raises Refused for adapters,
    other architectures (naming the tensors that decided), and any tensor missing, of another shape,
    unexplained, or of integer numbers.
    """
    shapes = {key: spec.shape for key, spec in checkpoint.specs.items()}
    _refuse_strangers(checkpoint.path, shapes)
    plan = _read_plan(checkpoint.path, shapes)
    expected = blueprint(plan)
    _refuse_differences(checkpoint.path, plan, expected, shapes)
    _refuse_integers(checkpoint, expected)
    known = {*expected, *MARKERS}
    try:
        scaling, shift = stated(checkpoint.metadata, plan.family)
        extras = tuple(key for key in shapes if key not in known)
        return _layout(plan, extras, scaling, shift)
    except Refused as error:
        raise Refused(f"{checkpoint.path}: {error}") from error


def _layout(plan: Plan, extras: tuple[str, ...], scaling: float, shift: float) -> Layout:
    found = {"te1": plan.te1, "te2": plan.te2}
    texts = {part: text for part, text in found.items() if text is not None}
    parts = {"vae": plan.vae, **found}
    return Layout(
        family=plan.family,
        plan=plan,
        unet=unet_config(plan),
        vae=configured(vae_config(plan.vae, plan.family), scaling, shift) if plan.vae else None,
        texts=tuple(text_config(text, part) for part, text in texts.items()),
        text_parts=tuple(texts),
        scaling=scaling,
        shift=shift,
        missing=tuple(part for part in ("vae", *TEXTS[plan.family]) if parts[part] is None),
        extras=extras,
    )


def _refuse_strangers(path: Path, shapes: Shapes) -> None:
    adapter = [key for key in shapes if is_adapter(key)]
    if len(adapter) > len(shapes) // 2:
        raise Refused(
            f"{path} is a LoRA or another adapter ({_few(adapter)}): give the "
            "checkpoint it was made for."
        )
    if UNET + "input_blocks.0.0.weight" in shapes:
        for prefix in ("cond_stage_model.model.", "conditioner.embedders.0.model."):
            if found := [key for key in shapes if key.startswith(prefix)]:
                what = dict(STRANGERS)[prefix]
                raise Refused(f"{path} is {what} ({_few(found)}): {NEEDED}.")
        return
    for prefix, what in STRANGERS:
        if found := [key for key in shapes if key.startswith(prefix)]:
            raise Refused(f"{path} is {what} ({_few(found)}): {NEEDED}.")
    raise Refused(
        f"{path} holds no UNet that Recast knows ({UNET}input_blocks.0.0.weight is absent, "
        f"it has {_few(shapes) or 'no tensors'}): {NEEDED}."
    )


def _read_plan(path: Path, shapes: Shapes) -> Plan:
    try:
        unet = _read_unet(shapes)
    except (KeyError, IndexError, ValueError) as error:
        raise Refused(
            f"{path} has a UNet whose tensor {error} is absent or of a strange shape: {NEEDED}."
        ) from error
    family = "sd15" if unet.vector is None else "sdxl"
    if family == "sd15" and unet.linear:
        raise Refused(
            f"{path} is a Stable Diffusion 2 UNet (no label_emb, proj_in is a matrix): {NEEDED}."
        )
    texts = TEXTS[family]
    return Plan(
        family,
        unet,
        _read_part(path, shapes, "vae", VAE, read_vae),
        _read_part(path, shapes, "te1", texts["te1"], _read_clip),
        _read_part(path, shapes, "te2", texts["te2"], _read_open_clip) if "te2" in texts else None,
    )


def _read_part(
    path: Path, shapes: Shapes, part: str, prefix: str, read: Callable[[Shapes], Read]
) -> Read | None:
    """The plan of the tensors below a prefix, None where there are none."""
    inside = {k.removeprefix(prefix): s for k, s in shapes.items() if k.startswith(prefix)}
    if all(is_extra(prefix + key) for key in inside):
        return None
    try:
        return read(inside)
    except (KeyError, IndexError, ValueError) as error:
        raise Refused(
            f"{path} has a {PART_NAMES[part]} whose tensor {error} below {prefix} is absent or of "
            f"a strange shape: {NEEDED}."
        ) from error


def _read_unet(shapes: Shapes) -> UNetPlan:
    inside = {k.removeprefix(UNET): s for k, s in shapes.items() if k.startswith(UNET)}
    levels: list[list[tuple[int, int]]] = [[]]
    for block in range(1, 100):
        name = f"input_blocks.{block}"
        if f"{name}.0.op.weight" in inside:
            levels.append([])
        elif f"{name}.0.in_layers.2.weight" in inside:
            width = inside[f"{name}.0.in_layers.2.weight"][0]
            levels[-1].append((width, _count(inside, f"{name}.1.transformer_blocks.")))
        else:
            break
    attention = next(k for k in [*inside, "attn2"] if "attn2.to_k.weight" in k or k == "attn2")
    projection = attention.partition("transformer_blocks.")[0] + "proj_in.weight"
    return UNetPlan(
        widths=tuple(level[0][0] for level in levels),
        depths=tuple(level[0][1] for level in levels),
        middle=_count(inside, "middle_block.1.transformer_blocks."),
        context=_at(inside, attention, 1),
        vector=_at(inside, "label_emb.0.0.weight", 1) if "label_emb.0.0.weight" in inside else None,
        linear=len(inside[projection]) == 2,
        layers=len(levels[0]),
        channels=_at(inside, "input_blocks.0.0.weight", 1),
        out=_at(inside, "out.2.weight", 0),
    )


def read_vae(inside: Shapes) -> VAEPlan:
    """The plan of a VAE in ldm's names."""
    levels = _count(inside, "encoder.down.")
    deep = range(levels)
    return VAEPlan(
        widths=tuple(_at(inside, f"encoder.down.{i}.block.0.conv1.weight", 0) for i in deep),
        layers=_count(inside, "encoder.down.0.block."),
        latent=_at(inside, "decoder.conv_in.weight", 1),
        linear=len(inside["encoder.mid.attn_1.q.weight"]) == 2,
    )


def _read_clip(inside: Shapes) -> TextPlan:
    vocabulary, width = _matrix(inside, "embeddings.token_embedding.weight")
    return TextPlan(
        width,
        _count(inside, "encoder.layers."),
        _at(inside, "encoder.layers.0.mlp.fc1.weight", 0),
        vocabulary,
        _at(inside, "embeddings.position_embedding.weight", 0),
    )


def _read_open_clip(inside: Shapes) -> TextPlan:
    vocabulary, width = _matrix(inside, "token_embedding.weight")
    return TextPlan(
        width,
        _count(inside, "transformer.resblocks."),
        _at(inside, "transformer.resblocks.0.mlp.c_fc.weight", 0),
        vocabulary,
        _at(inside, "positional_embedding", 0),
        _at(inside, "text_projection", 1),
    )


def _count(inside: Iterable[str], prefix: str) -> int:
    """How many different numbers follow a prefix."""
    numbers = (key[len(prefix) :].partition(".")[0] for key in inside if key.startswith(prefix))
    return len({number for number in numbers if number.isdecimal()})


def _at(inside: Shapes, key: str, axis: int) -> int:
    try:
        return inside[key][axis]
    except IndexError as error:
        raise KeyError(key) from error


def _matrix(inside: Shapes, key: str) -> tuple[int, int]:
    return _at(inside, key, 0), _at(inside, key, 1)


def _refuse_differences(path: Path, plan: Plan, expected: Shapes, shapes: Shapes) -> None:
    absent = [key for key in expected if key not in shapes]
    strange = [k for k in shapes if k not in expected and not is_extra(k)]
    other = [k for k in expected if k in shapes and shapes[k] != expected[k]]
    told = []
    if absent:
        told.append(f"{len(absent)} tensors missing ({_few(absent)})")
    if strange:
        told.append(f"{len(strange)} that belong to no part ({_few(strange)})")
    if other:
        each = [f"{key} {list(shapes[key])} for {list(expected[key])}" for key in other]
        told.append(f"{len(other)} of another shape ({_few(each)})")
    if told:
        name = {"sdxl": "SDXL", "sd15": "SD 1.5"}[plan.family]
        raise Refused(
            f"{path} looks like {name} but has {', '.join(told)}: it is incomplete, or of an "
            "architecture that Recast does not know."
        )


def _refuse_integers(checkpoint: Opened, expected: Shapes) -> None:
    odd = [key for key in expected if checkpoint.specs[key].dtype not in FLOATS]
    if odd:
        formats = sorted({checkpoint.specs[key].dtype for key in odd})
        raise Refused(
            f"{checkpoint.path} stores {len(odd)} weights as {', '.join(formats)} "
            f"({_few(odd)}): give the fp32, fp16, bf16 or fp8 original."
        )


def _few(keys: Iterable[str], count: int = 3) -> str:
    names = list(keys)
    return ", ".join(names[:count]) + (", …" if len(names) > count else "")
