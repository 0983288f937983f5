"""The places that can be trained: counts, blocks, and names that other tools agree with."""

import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tests import tiny

from recast.errors import Refused
from recast.layout import SD15, SDXL, Plan, Site
from recast.layout.configs import unet_config
from recast.layout.sites import sites

TEXT_SUFFIX = re.compile(r"(\.lora_linear_layer|_lora|\.lora)\.(up|down)\.weight$")


@pytest.mark.parametrize(
    ("plan", "profile", "count"),
    [
        (SDXL, "lycoris-full", 788),
        (SDXL, "principal", 788),
        (SDXL, "kohya-conv", 788),
        (SD15, "kohya-conv", 278),
        (SDXL, "kohya", 722),
        (SD15, "kohya", 192),
        (SDXL, "all", 794),
        (SDXL, "te1", 72),
        (SDXL, "te2", 192),
        (SDXL, "principal,te1,te2", 1052),
        (SD15, "lycoris-full", 282),
        (SD15, "all", 282),
        (SD15, "te1", 72),
        (SDXL, "time", 4),
        (SDXL, "IN00", 2),
        (SDXL, "OUT02,OUT08", 232),
        (SDXL, "OUT,OUT", 4),
    ],
)
def test_counts_of_the_real_sizes(plan: Plan, profile: str, count: int) -> None:
    assert len(sites(plan, profile)) == count


def test_the_share_that_lycoris_covers() -> None:
    total = sum(torch.Size(site.shape).numel() for site in sites(SDXL, "lycoris-full"))
    assert total == 2_558_566_400
    assert sum(torch.Size(site.shape).numel() for site in sites(SD15, "all")) == 859_077_120


@pytest.mark.parametrize(
    ("plan", "blocks"),
    [(SDXL, ["OUT", "OUT06", "OUT07", "OUT08"]), (SD15, ["OUT", "OUT09", "OUT10", "OUT11"])],
)
def test_the_read_out_is_the_last_up_block_and_the_output(plan: Plan, blocks: list[str]) -> None:
    found = sites(plan, "readout")
    assert sorted({site.block for site in found}) == blocks
    names = {site.name for site in found}
    assert {"conv_norm_out.weight", "conv_norm_out.bias", "conv_out.weight"} <= names
    rest = {name.split(".")[0] + name.split(".")[1] for name in names if name[:3] == "up_"}
    assert rest == {f"up_blocks{len(plan.unet.widths) - 1}"}
    assert {site.kind for site in found} >= {"norm", "conv", "linear"}


def test_blocks_and_names_of_sdxl() -> None:
    by_name = {site.part + ":" + site.name: site for site in sites(SDXL, "every")}
    q = by_name["unet:down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert q.block == "IN04"
    assert q.lora == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert by_name["unet:time_embedding.linear_1.weight"].lora == "lora_unet_time_embed_0"
    assert by_name["unet:add_embedding.linear_2.weight"].lora == "lora_unet_label_emb_0_2"
    assert by_name["unet:conv_in.weight"].lora == "lora_unet_input_blocks_0_0"
    assert by_name["unet:conv_out.weight"].block == "OUT"
    v = by_name["te2:text_model.encoder.layers.31.self_attn.v_proj.weight"]
    assert v.lora == "lora_te2_text_model_encoder_layers_31_self_attn_v_proj"
    assert (v.block, v.rows, v.shape) == ("TE2.L31", (2560, 3840), (1280, 1280))
    projection = by_name["te2:text_projection.weight"]
    assert (projection.transpose, projection.block) == (True, "TE2.PROJ")
    fc1 = by_name["te1:encoder.layers.0.mlp.fc1.weight"]
    assert fc1.lora == "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    assert by_name["te1:embeddings.token_embedding.weight"].kind == "embedding"
    assert Counter(site.part for site in by_name.values())["unet"] == 1680


def test_names_of_sd15_are_those_of_diffusers() -> None:
    names = {site.lora for site in sites(SD15, "all,te1")}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in names
    assert {"lora_unet_conv_in", "lora_unet_time_embedding_linear_1"} <= names
    assert "lora_te_text_model_encoder_layers_11_mlp_fc2" in names


@pytest.mark.parametrize("profile", ["readuot", "OUT9", "lora", ""])
def test_unknown_profiles_name_the_nearest(profile: str) -> None:
    with pytest.raises(Refused, match="did you mean") as refusal:
        sites(tiny.XL, profile)
    if profile == "readuot":
        assert "did you mean readout" in str(refusal.value)


def kohya(found: list[Site]) -> dict[str, torch.Tensor]:
    """A LoRA file of rank 1 whose values are the numbers of its sites."""
    file = {}
    for index, site in enumerate(found):
        ones = (1,) * (len(site.shape) - 2)
        file[f"{site.lora}.lora_up.weight"] = torch.full((1, 1, *ones), float(index))
        file[f"{site.lora}.lora_down.weight"] = torch.full((1, 1, *ones), float(index))
        file[f"{site.lora}.alpha"] = torch.tensor(1.0)
    return file


@pytest.mark.parametrize("plan", [SDXL, SD15], ids=["sdxl", "sd15"])
def test_diffusers_finds_the_same_module_by_our_names(plan: Plan) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
    from diffusers.utils import convert_unet_state_dict_to_peft

    sdxl = plan.family == "sdxl"
    mixin = StableDiffusionXLLoraLoaderMixin if sdxl else StableDiffusionLoraLoaderMixin
    found = sites(plan, "all,te1,te2" if sdxl else "all,te1")
    config = SimpleNamespace(**unet_config(plan))
    theirs, _ = mixin.lora_state_dict(kohya(found), unet_config=config)
    assert len(theirs) == 2 * len(found)
    unet = {k.removeprefix("unet."): v for k, v in theirs.items() if k.startswith("unet.")}
    for key, value in convert_unet_state_dict_to_peft(unet).items():
        assert key.partition(".lora_")[0] == found[int(value.flatten()[0])].module
    for key, value in theirs.items():
        if key.startswith("text_encoder"):
            site = found[int(value.flatten()[0])]
            part = "te2" if key.startswith("text_encoder_2.") else "te1"
            name = TEXT_SUFFIX.sub("", key.partition("encoder.layers.")[2])
            name = re.sub(r"to_(q|k|v|out)$", r"\1_proj", name)
            assert (site.part, site.module.partition("encoder.layers.")[2]) == (part, name)


@pytest.mark.parametrize("plan", [SDXL, SD15], ids=["sdxl", "sd15"])
def test_kohya_conv_is_what_its_module_classes_hold(plan: Plan) -> None:
    """kohya's networks.lora wraps the layers inside four classes of modules, diffusers' names."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        unet = UNet2DConditionModel(**unet_config(plan))
    holders = {"Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"}
    theirs = {
        f"{name}.{inside}"
        for name, module in unet.named_modules()
        if type(module).__name__ in holders
        for inside, layer in module.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }
    assert {site.module for site in sites(plan, "kohya-conv")} == theirs
    if plan.family == "sd15":
        rest = {site.lora for site in sites(plan, "lycoris-full")}
        rest -= {site.lora for site in sites(plan, "kohya-conv")}
        assert rest == {
            "lora_unet_conv_in", "lora_unet_conv_out",
            "lora_unet_time_embedding_linear_1", "lora_unet_time_embedding_linear_2",
        }  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lycoris_makes_the_same_modules_for_sd15() -> None:
    from diffusers import UNet2DConditionModel
    from lycoris.kohya import LycorisNetworkKohya

    targets = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
    unet = UNet2DConditionModel(**unet_config(tiny.ONE))
    LycorisNetworkKohya.apply_preset({"enable_conv": True, "unet_target_module": targets})
    network = LycorisNetworkKohya([], unet, lora_dim=2, conv_lora_dim=2)
    theirs = {module.lora_name for module in network.unet_loras}
    assert theirs == {site.lora for site in sites(tiny.ONE, "lycoris-full")}
