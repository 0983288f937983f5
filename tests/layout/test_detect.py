"""Architectures read off tensors: recognised at any width, refused with the names that decided."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests import tiny

from recast.checkpoint import Spec
from recast.errors import Refused
from recast.layout import SD15, SDXL, Layout, Plan, blueprint, detect

Shapes = dict[str, tuple[int, ...]]


def opened(shapes: Shapes, dtype: str = "F16") -> SimpleNamespace:
    """Something with the header of a checkpoint."""
    specs = {key: Spec(dtype, shape, 0, 0) for key, shape in shapes.items()}
    return SimpleNamespace(path=Path("model.safetensors"), specs=specs, metadata={})


def found(shapes: Shapes) -> Layout:
    return detect(opened(shapes))


WIDER = replace(SDXL, unet=replace(SDXL.unet, widths=(64, 96, 160), depths=(1, 1, 3), middle=3))
PLANS = {"SDXL": SDXL, "SD15": SD15, "tiny XL": tiny.XL, "tiny 1.5": tiny.ONE}


@pytest.mark.parametrize("plan", [*PLANS.values(), WIDER], ids=[*PLANS, "other widths"])
def test_a_plan_is_read_back_from_its_blueprint(plan: Plan) -> None:
    layout = found(blueprint(plan))
    assert layout.plan == plan
    assert (layout.missing, layout.extras) == ((), ())
    assert layout.text_parts == (("te1", "te2") if plan.te2 else ("te1",))


def test_real_sizes_have_the_published_counts() -> None:
    def count(plan: Plan, prefix: str) -> int:
        total = 0
        for key, shape in blueprint(plan).items():
            if key.startswith(prefix):
                size = 1
                for side in shape:
                    size *= side
                total += size
        return total

    assert count(SDXL, "model.diffusion_model.") == 2_567_463_684
    assert count(SD15, "model.diffusion_model.") == 859_520_964
    assert count(SDXL, "conditioner.embedders.0.") == 123_060_480
    assert count(SDXL, "conditioner.embedders.1.") == 694_659_840
    assert count(SD15, "first_stage_model.") == 83_653_863


def test_configurations_of_the_real_sizes() -> None:
    xl, one = found(blueprint(SDXL)), found(blueprint(SD15))
    assert xl.unet["transformer_layers_per_block"] == [1, 2, 10]
    assert xl.unet["attention_head_dim"] == [5, 10, 20]
    assert xl.unet["addition_time_embed_dim"] == 256
    assert xl.scaling == 0.13025
    assert [text["num_attention_heads"] for text in xl.texts] == [12, 20]
    assert [text["hidden_act"] for text in xl.texts] == ["quick_gelu", "gelu"]
    assert one.unet["attention_head_dim"] == 8
    assert one.unet["down_block_types"][-1] == "DownBlock2D"
    assert not one.unet["use_linear_projection"]
    assert one.scaling == 0.18215


EXTRAS = [
    "model_ema.diffusion_modelout2weight",
    "alphas_cumprod",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.1.model.logit_scale",
    "first_stage_model.loss.logvar",
]


def test_known_extras_are_carried_and_markers_are_not_extras() -> None:
    shapes = {**blueprint(tiny.XL), **dict.fromkeys(EXTRAS, (1,)), "v_pred": (0,), "ztsnr": (0,)}
    layout = found(shapes)
    assert list(layout.extras) == EXTRAS


@pytest.mark.parametrize("part", ["vae", "te1", "te2"])
def test_a_whole_part_may_be_missing(part: str) -> None:
    layout = found(blueprint(replace(tiny.XL, **{part: None})))
    assert layout.missing == (part,)
    assert (layout.vae is None) == (part == "vae")
    assert part not in layout.text_parts


def drop(key: str) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {k: s for k, s in shapes.items() if k != key}


def add(key: str, shape: tuple[int, ...] = (1,)) -> Callable[[Shapes], Shapes]:
    return lambda shapes: {**shapes, key: shape}


BROKEN: dict[str, Callable[[Shapes], Shapes]] = {
    "1 tensors missing (model.diffusion_model.out.0.bias)": drop(
        "model.diffusion_model.out.0.bias"
    ),
    "'out.2.weight'": drop("model.diffusion_model.out.2.weight"),
    "belong to no part (model.diffusion_model.strange.weight)": add(
        "model.diffusion_model.strange.weight"
    ),
    "another shape": add("model.diffusion_model.time_embed.2.bias", (3,)),
    "text encoder whose tensor": drop(
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    ),
    "VAE whose tensor": drop("first_stage_model.decoder.conv_in.weight"),
    "inpainting": lambda shapes: {
        **shapes,
        "model.diffusion_model.input_blocks.0.0.weight": (32, 9, 3, 3),
    },
    "pooled text": add("model.diffusion_model.label_emb.0.0.weight", (128, 137)),
    "an SDXL refiner": add("conditioner.embedders.0.model.ln_final.weight"),
}


@pytest.mark.parametrize("words", BROKEN)
def test_differences_are_listed(words: str) -> None:
    with pytest.raises(Refused) as refusal:
        found(BROKEN[words](blueprint(tiny.XL)))
    assert words in str(refusal.value)
    assert str(refusal.value).startswith("model.safetensors")


STRANGERS = {
    "a Flux model (model.": "model.diffusion_model.double_blocks.0.x",
    "a Stable Diffusion 3 model": "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
    "a diffusers UNet": "down_blocks.0.resnets.0.conv1.weight",
    "a VAE alone": "first_stage_model.decoder.conv_in.weight",
    "a ControlNet": "control_model.input_blocks.0.0.weight",
    "a textual inversion": "emb_params",
    "a LoRA or another adapter": "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight",
    "no UNet that Recast knows": "something.else",
}


@pytest.mark.parametrize("words", STRANGERS)
def test_other_files_are_named(words: str) -> None:
    with pytest.raises(Refused) as refusal:
        found({STRANGERS[words]: (1,)})
    assert words in str(refusal.value)


def test_stable_diffusion_2_is_named() -> None:
    shapes = blueprint(replace(tiny.ONE, unet=replace(tiny.ONE.unet, linear=True)))
    with pytest.raises(Refused, match="Stable Diffusion 2"):
        found(shapes)
    with pytest.raises(Refused, match="Stable Diffusion 2"):
        found({**blueprint(tiny.ONE), "cond_stage_model.model.ln_final.bias": (1,)})


def test_integer_weights_are_refused_and_fp8_is_not() -> None:
    shapes = blueprint(tiny.ONE)
    with pytest.raises(Refused, match="as I8"):
        detect(opened(shapes, "I8"))
    assert detect(opened(shapes, "F8_E4M3")).family == "sd15"


def test_detection_does_not_need_torch() -> None:
    code = "import sys, recast.inspection; assert 'torch' not in sys.modules"
    source = str(Path(__file__).parents[2] / "src")
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": source}
    )
