"""The traced map: a bijection, and what comes in goes out bit for bit."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import SD15, SDXL, Layout, Plan, blueprint, detect, from_file, keymap, to_file
from recast.layout.keymap import Entry, trace

FAMILIES = ("sdxl", "sd15")


def modules(layout: Layout) -> dict[str, torch.nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    kinds = {"te1": CLIPTextModel, "te2": CLIPTextModelWithProjection}
    texts = zip(layout.text_parts, layout.texts, strict=True)
    return {
        "unet": UNet2DConditionModel(**layout.unet),
        "vae": AutoencoderKL(**layout.vae),
        **{part: kinds[part](CLIPTextConfig(**config)) for part, config in texts},
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_a_file_goes_through_the_modules_unchanged(tmp_path: Path, family: str, dtype: str) -> None:
    file = Checkpoint(tiny.checkpoint(tmp_path / "a.safetensors", family, dtype=dtype))
    layout = detect(file)
    entries = keymap(layout)
    parts = modules(layout)
    for part, module in parts.items():
        module.to(getattr(torch, {"F32": "float32", "F16": "float16"}[dtype]))
        module.load_state_dict(dict(from_file(entries, file, part)), strict=True)
    back = dict(to_file(entries, {part: module.state_dict() for part, module in parts.items()}))
    assert list(back) == [key for key in file if key not in layout.extras]
    assert all(torch.equal(back[key], file[key]) for key in back)
    assert all(back[key].dtype == file[key].dtype for key in back)


@pytest.mark.parametrize("plan", [SDXL, SD15, tiny.XL, tiny.ONE], ids=["XL", "15", "xl", "15t"])
def test_every_value_has_one_parameter(plan: Plan) -> None:
    entries, shapes = trace(plan), blueprint(plan)
    assert {entry.key for entry in entries} == shapes.keys()
    assert len({(entry.part, entry.param) for entry in entries}) == len(entries)
    covered: Counter[str] = Counter()
    for entry in entries:
        first, last = entry.rows or (0, shapes[entry.key][0])
        covered[entry.key] += last - first
    assert covered == {key: shape[0] for key, shape in shapes.items()}


def test_what_openclip_stores_differently() -> None:
    entries = {entry.param: entry for entry in trace(SDXL) if entry.part == "te2"}
    key = "conditioner.embedders.1.model.transformer.resblocks.3.attn.in_proj_"
    name = "text_model.encoder.layers.3.self_attn."
    k = entries[name + "k_proj.weight"]
    assert k == Entry(key + "weight", "te2", name + "k_proj.weight", (1280, 2560))
    assert entries[name + "v_proj.bias"].rows == (2560, 3840)
    assert entries["text_projection.weight"].transpose
    squeezed = [entry.param for entry in trace(SDXL) if entry.squeeze]
    assert len(squeezed) == 8
    assert all("attentions.0.to_" in param for param in squeezed)


def test_a_converter_that_drops_tensors_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.loaders import single_file_utils as theirs

    real = theirs.convert_ldm_vae_checkpoint

    def forgetful(checkpoint: dict, config: dict) -> dict:
        found = real(checkpoint, config)
        found.pop("quant_conv.bias")
        return found

    monkeypatch.setattr(theirs, "convert_ldm_vae_checkpoint", forgetful)
    with pytest.raises(Refused, match=r"1 tensors .* first_stage_model\.quant_conv\.bias"):
        trace.__wrapped__(tiny.ONE)


def test_attention_stored_as_matrices_is_understood() -> None:
    plan = replace(tiny.ONE, vae=replace(tiny.VAE, linear=True))
    assert not any(entry.squeeze for entry in trace(plan))
