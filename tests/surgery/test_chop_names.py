"""Names of blocks and modules, and the vectors of other tools."""

import random
import re

import pytest
from tests import tiny

from recast.errors import Refused
from recast.layout import SD15, SDXL, Plan
from recast.layout.sites import every, sites
from recast.pocket.files import PLANS
from recast.surgery.blocks import Spot, architecture, blocks, spot
from recast.surgery.vectors import BASE, DIALECTS, PRESETS, read_vector, write_vector, write_vectors
from recast.surgery.weights import Weights, only, parse, refuse_unknown, without

ALL = [tiny.XL, tiny.ONE, *PLANS.values(), SDXL, SD15]


def spots(plan: Plan, profile: str) -> list[Spot]:
    found = [spot(site.lora, plan.unet.layers) for site in sites(plan, profile)]
    assert None not in found
    return [each for each in dict.fromkeys(found) if each]


def here(lora: str) -> Spot:
    found = spot(lora)
    assert found
    return found


@pytest.mark.parametrize("plan", ALL, ids=lambda plan: f"{plan.family}-{plan.unet.widths[0]}")
def test_blocks_read_off_names_are_those_of_the_network(plan: Plan) -> None:
    """In kohya's and in diffusers' spelling of every module."""
    for site in every(plan):
        names = {site.lora}
        if site.part == "unet":
            names.add("lora_unet_" + site.module.replace(".", "_"))
        for name in names:
            assert spot(name, plan.unet.layers) == Spot(name, site.part, site.block)
    assert {site.block for site in every(plan)} == set(blocks(plan))


def test_architecture_is_voted_by_names_that_one_family_has() -> None:
    for plan in (SDXL, SD15):
        names = [each.lora for each in spots(plan, "lycoris-full,te1")]
        assert architecture(names, {}, "x") is plan
    mixed = ["lora_te2_text_model_encoder_layers_0_mlp_fc1", "lora_te_text_model_x"]
    mixed[1] = "lora_unet_down_blocks_3_resnets_0_conv1"
    with pytest.raises(Refused, match=r"mixes architectures: 1 modules are SDXL's"):
        architecture(mixed, {}, "x")
    with pytest.raises(Refused, match=r"says it is for sd_v1"):
        architecture(mixed[:1], {"ss_base_model_version": "sd_v1"}, "x")


OUT01 = "lora_unet_output_blocks_1_1_transformer_blocks_3_attn2_to_out_0"


@pytest.mark.parametrize(
    ("text", "lora", "weight"),
    [
        ("OUT01=0.5", OUT01, 0.5),
        ("out1=0.5", OUT01, 0.5),
        ("OUT*=0.5,OUT01=-1", OUT01, -1),
        ("OUT01=-1,OUT*=0.5", OUT01, 0.5),
        ("attn2=2", OUT01, 2),
        ("attn1=2", OUT01, 1),
        ("OUT01.attn2=2", OUT01, 2),
        ("OUT01.attn1=2", OUT01, 1),
        ("OUT01.to_out.0=2", OUT01, 2),
        ("transformer_blocks.3=2", OUT01, 2),
        ("OUT=0", OUT01, 1),  # the layer at the end, not the `out` of to_out
        ("OUT=0", "lora_unet_out_2", 0),
        ("time=0", "lora_unet_time_embed_0", 0),
        ("time=0", "lora_unet_down_blocks_0_resnets_0_time_emb_proj", 1),
        ("unet=0", OUT01, 0),
        ("lora_unet_output_blocks_1_1_*=0", OUT01, 0),
        ("lora_unet_output_blocks_1_1_*=0", OUT01.replace("1_1", "1_0"), 1),
        ("MID=0", "lora_unet_middle_block_2_in_layers_2", 0),
        ("MID1=0", "lora_unet_middle_block_2_in_layers_2", 1),
        ("IN00=0", "lora_unet_input_blocks_0_0", 0),
        ("INP07=0", "lora_unet_input_blocks_7_1_proj_in", 0),
        ("TE2.L3=0", "lora_te2_text_model_encoder_layers_3_mlp_fc1", 0),
        ("TE2.L3=0", "lora_te2_text_model_encoder_layers_31_mlp_fc1", 1),
        ("TE2.L3?=0", "lora_te2_text_model_encoder_layers_31_mlp_fc1", 0),
        ("encoder_layers_1=0", "lora_te1_text_model_encoder_layers_10_mlp_fc1", 1),
        ("te=0,TE1.mlp=1", "lora_te1_text_model_encoder_layers_10_mlp_fc1", 1),
        ("te=0,TE1.mlp=1", "lora_te1_text_model_encoder_layers_10_self_attn_q_proj", 0),
        ("0,OUT01=1", OUT01, 1),
        ("0,OUT01=1", "lora_unet_out_2", 0),
    ],
)
def test_names(text: str, lora: str, weight: float) -> None:
    assert parse(text).of(here(lora)) == weight


def test_keep_and_drop() -> None:
    assert only("OUT01,te1").of(here(OUT01)) == 1
    assert only("te1").of(here(OUT01)) == 0
    assert without("attn2").of(here(OUT01)) == 0
    assert without("te1").of(here(OUT01)) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("OUT12=0", "did you mean OUT02"),
        ("TE2.L40=0", r"TE2\.L\d\d"),
        ("atn2=0", "attn2"),
        ("OUT01.attn3=1", "OUT01.attn3"),
        ("output_blocks_3=1", "OUT"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(Refused, match=said):
        refuse_unknown(parse(text), SDXL, [here(OUT01)])


def test_a_block_that_the_file_lacks_is_no_mistake() -> None:
    refuse_unknown(parse("IN07=0,attn1=0,TE1.L11=2,OUT0?.ff=1,time=0"), SDXL, [here(OUT01)])


@pytest.mark.parametrize("text", ["OUT01", "OUT01=x", "OUT01=nan", "OUT01=inf"])
def test_a_weight_is_a_finite_number(text: str) -> None:
    with pytest.raises(Refused, match=r"weight|number"):
        parse(text)


@pytest.mark.parametrize("length", DIALECTS)
@pytest.mark.parametrize("missing", [False, True])
def test_every_vector_comes_back(length: int, missing: bool) -> None:
    """Whatever the file has: a number stands for its names."""
    drawn, dialect = random.Random(length), DIALECTS[length]
    plan = {"sdxl": SDXL, "sd15": SD15}[dialect.family]
    there = [each for each in spots(plan, "all,te1")
             if each.block in {*dialect.covered, "TE1.L00", "OUT"}]  # fmt: skip
    if missing:
        there = [each for each in there if each.block in ("OUT04", "MID1", "TE1.L00")]
    for _ in range(5):
        text = ",".join(f"{round(drawn.uniform(-2, 2), 2):.10g}" for _ in dialect.labels)
        weights = read_vector(text, plan, there)
        assert write_vector(length, weights, plan, there) == text
        assert write_vectors(weights, plan, there)[length] == text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_vector_of_its_family(name: str) -> None:
    plan = SD15 if name.startswith("SD-") else SDXL
    length = PRESETS[name].count(",") + 1
    assert DIALECTS[length].family == plan.family
    text = write_vector(length, read_vector(name, plan, []), plan, [])
    assert text
    if not re.search("[A-Z]", PRESETS[name]):
        assert text == PRESETS[name]


def test_letters_of_presets() -> None:
    weights = read_vector("SD-AB", SD15, [], a=3, b=-1)
    assert write_vector(17, weights, SD15, []) == "3," + "-1," * 11 + "3,3,3,3,3"
    drawn = [read_vector("SD-ROUT", SD15, [], seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(Refused, match="by names"):
        read_vector("1 0.5" + ",1" * 11, SDXL, [])


def test_positions_among_the_blocks_of_a_file() -> None:
    """Inspire's own form counts what is there; the names that come out are the file's."""
    there = [Spot("x", "unet", block) for block in ("IN04", "IN05", "IN08", "MID1", "OUT01")]
    weights = read_vector("%default=0.5,base=2,in2-3=0,out=-1", SDXL, there)
    assert [weights.of(each) for each in there] == [0.5, 0, 0, 0.5, -1]
    assert weights.of(here("lora_te1_text_model_encoder_layers_0_mlp_fc1")) == 2
    with pytest.raises(Refused, match="is none of default=1"):
        read_vector("%foo=1", SDXL, there)


@pytest.mark.parametrize(
    ("text", "plan", "said"),
    [
        ("1,0,1", SDXL, "12 for SDXL .*17 for SD 1.5 .*20 .*21 .*26 .*27 "),
        (",".join("1" * 17), SDXL, "is for SD 1.5 and the file for SDXL: give one of 12, 20, 21"),
        (",".join("1" * 12), SDXL, "no number for IN01, which the file has: give one of 20 or 21"),
        ("SDXL-NOPE", SDXL, "no vector and no preset: choose SD-NONE"),
        ("1,,1,1,1,1,1,1,1,1,1,1", SDXL, "empty place|IN01"),
    ],
)
def test_vectors_that_are_refused(text: str, plan: Plan, said: str) -> None:
    with pytest.raises(Refused, match=said):
        read_vector(text, plan, [Spot("x", "unet", "IN01")])


def test_the_layers_around_follow_the_first_number() -> None:
    """Everything outside the numbered blocks; IN00 has its own where the vector has it."""
    vector = [0.0] * 21
    vector[0] = 0.5
    weights = read_vector(",".join(map(str, vector)), SDXL, [])
    for lora in ("lora_unet_time_embed_0", "lora_unet_out_2", "lora_unet_input_blocks_0_0"):
        assert weights.of(here(lora)) == 0.5
    weights = read_vector("0.5,0.25" + ",0" * 18, SDXL, [])
    assert weights.of(here("lora_unet_time_embed_0")) == 0.25
    assert weights.of(here("lora_unet_out_2")) == 0.5
    assert DIALECTS[20].labels[0] == BASE


def test_what_a_vector_cannot_say_is_left_out() -> None:
    there = spots(SDXL, "lycoris-full")
    assert sorted(write_vectors(Weights(), SDXL, there)) == [20, 21]
    assert write_vectors(parse("attn2=0"), SDXL, there) == {}
    assert sorted(write_vectors(parse("MID1=0"), SDXL, there)) == [21]


def test_the_guide_s_vector_keeps_the_guide_s_keys() -> None:
    """The fast LoRA of the guide: 788 modules, the text encoders without attention.

    Its tool counts 318 keys in a block of 106 modules, 2364 in all, 264 outside; a vector of 1,
    zeros and two ones keeps those of the sorted blocks, and what is outside.
    """
    loras = [site.lora for site in sites(SDXL, "lycoris-full")]
    loras += [site.lora for site in sites(SDXL, "te1,te2") if "_mlp_" in site.lora]
    keys = [f"{lora}.{end}" for lora in loras for end in ("alpha", "lora_down.weight", "x")]
    pattern = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_(\d+)_")
    of = {key: (found[1], int(found[2])) for key in keys if (found := pattern.match(key))}
    order = sorted(set(of.values()))
    assert (len(order), len(keys) - len(of), len(of)) == (20, 264, 2364)
    assert sum(place == ("input_blocks", 7) for place in of.values()) == 318
    vector = [1.0] + [0.0] * 20
    vector[1 + order.index(("input_blocks", 8))] = 1
    vector[1 + order.index(("output_blocks", 1))] = 1
    theirs = {key for key in keys if key not in of or vector[1 + order.index(of[key])]}
    weights = read_vector(",".join(f"{w:g}" for w in vector), SDXL, [here(lora) for lora in loras])
    ours = {key for key in keys if weights.of(here(key.partition(".")[0]))}
    assert ours == theirs
    assert 264 < len(ours) < 1000
