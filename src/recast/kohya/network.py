"""What --network_module becomes, and the rows of --network_args."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from recast.errors import Refused
from recast.kohya.flag import (
    Flag,
    Given,
    Outcome,
    Settings,
    choice,
    idle,
    key,
    refused,
    settled,
    through,
)  # fmt: skip
from recast.kohya.turns import pairs, parts

MODULES = {"networks.lora": (0, 1.0), "lycoris.kohya": ("network.dim", "network.alpha")}
PRESETS = {"full": "lycoris-full", "attn-mlp": "kohya"}
DIM, ALPHA = 4, 1.0  # of both modules, and of argparse


def network(value: Any, given: Given) -> Outcome:
    """What is put into which layers; convolutions as the module does where nothing is said."""
    if value not in MODULES:
        raise Refused(
            f"{{flag}} {value} is not supported: {' and '.join(MODULES)} are, which train a LoRA "
            "or LoCon."
        )
    said = pairs(given.get("network_args") or [], "network_args")
    usual = {
        "network.dim": given.get("network_dim", DIM),
        "network.alpha": float(given.get("network_alpha", ALPHA)),
    }
    dim, alpha = (usual.get(str(default), default) for default in MODULES[value])
    convs: Settings = {"network.conv_dim": dim, "network.conv_alpha": alpha}
    for name in said.keys() & {"conv_dim", "conv_alpha"}:
        convs |= settled(ROWS[name], said[name], given, f"--network_args {name}")
    return {
        **usual,
        **convs,
        "network.kind": "lora",
        "train.profile": ",".join(layers(value, said, given)),
    }


def layers(module: str, said: Mapping[str, Any], given: Given) -> list[str]:
    """The profile of a module's layers: the UNet's, then the text encoders that are trained."""
    found = parts(given)
    texts = [part for part in found if part != "unet"]
    if "unet" not in found:
        return texts
    if module == "networks.lora":
        return ["kohya-conv" if said.get("conv_dim") else "kohya", *texts]
    preset = said.get("preset", "full")
    if preset not in PRESETS:
        raise Refused(
            f"--network_args preset={preset} has no equivalent here, only {' and '.join(PRESETS)}."
        )
    return [PRESETS[preset], *texts]


def network_arguments(value: Sequence[str], given: Given) -> Outcome:
    """What the arguments become, each by its own row; some belong to the module as a whole."""
    settings: Settings = {}
    read = pairs(value, "network_args")
    for name, said in read.items():
        if name not in ROWS:
            raise Refused(
                f"{{flag}} {name}: there is no such argument; did you mean "
                f"{get_close_matches(name, ROWS, 1, 0.0)[0]}?"
            )
        settings |= settled(ROWS[name], said, {**given, **read}, f"--network_args {name}")
    return settings


def rank_dropout(value: Any, given: Given) -> Outcome:
    """Directions that stay are scaled up, as networks.lora does always and LyCORIS if told."""
    plain = given.get("network_module") == "lycoris.kohya" and not given.get("rank_dropout_scale")
    if float(value) > 0 and plain:
        raise Refused(
            "{flag}: LyCORIS leaves the directions that stay as they are, Recast scales them up: "
            "add rank_dropout_scale=True for that."
        )
    return {"network.rank_dropout": float(value)}


# of --network_args: those of networks.lora, then those of LyCORIS
# fmt: off
NETWORK_ARGS = (
    Flag("conv_dim", "word", key("network.conv_dim", int)),
    Flag("conv_alpha", "word", key("network.conv_alpha", float)),
    Flag("dropout", "word", key("network.dropout", float)),
    Flag("rank_dropout", "word", through(rank_dropout, "network.rank_dropout"),
        "what stays is scaled up"),
    Flag("module_dropout", "word", key("network.module_dropout", float)),
    Flag("verbose", "word", idle("every layer is accounted for in any case")),
    Flag("block_dims", "word", refused("one rank holds for all blocks")),
    Flag("block_alphas", "word",
        refused("one alpha holds for all blocks: other loaders misread several")),
    Flag("conv_block_dims", "word", refused("one rank holds for all blocks")),
    Flag("conv_block_alphas", "word",
        refused("one alpha holds for all blocks: other loaders misread several")),
    Flag("down_lr_weight", "word", refused("give the blocks' rates as train.rates in a recipe")),
    Flag("mid_lr_weight", "word", refused("give the blocks' rates as train.rates in a recipe")),
    Flag("up_lr_weight", "word", refused("give the blocks' rates as train.rates in a recipe")),
    Flag("block_lr_zero_threshold", "word",
        refused("give the blocks' rates as train.rates in a recipe")),
    Flag("loraplus_lr_ratio", "word", refused("both factors of a layer have one rate", 1)),
    Flag("loraplus_unet_lr_ratio", "word", refused("both factors of a layer have one rate", 1)),
    Flag("loraplus_text_encoder_lr_ratio", "word",
        refused("both factors of a layer have one rate", 1)),
    Flag("algo", "word", choice("network.kind", {"locon": "lora", "lora": "lora"}),
        "a LoCon is a LoRA with convolutions"),
    Flag("preset", "word", through(lambda value, given: {}, "train.profile"),
        "`full`: `lycoris-full`; `attn-mlp`: `kohya`"),
    Flag("use_tucker", "word",
        refused("convolutions are factored in two, which every loader reads")),
    Flag("use_cp", "word", refused("convolutions are factored in two, which every loader reads")),
    Flag("use_scalar", "word", refused("a change has no scalar of its own")),
    Flag("rank_dropout_scale", "word", idle("what stays is scaled up in any case")),
    Flag("dora_wd", "word", refused("weights are not decomposed into length and direction")),
    Flag("wd_on_output", "word", idle("it says how --network_args dora_wd works")),
    Flag("train_norm", "word",
        refused("a LoRA's file has no place for norms that all loaders read")),
    Flag("bypass_mode", "word",
        idle("the change is always computed beside the layer, never merged")),
    Flag("rs_lora", "word", refused("the scale is alpha / dim")),
    Flag("constrain", "word", refused("it belongs to OFT", 0)),
    Flag("rescaled", "word", refused("it belongs to OFT")),
    Flag("factor", "word", refused("it belongs to LoKr", -1)),
    Flag("decompose_both", "word", refused("it belongs to LoKr")),
    Flag("full_matrix", "word", refused("it belongs to LoKr")),
    Flag("unbalanced_factorization", "word", refused("it belongs to LoKr")),
    Flag("block_size", "word", refused("it belongs to DyLoRA", 0)),
)
# fmt: on


ROWS = {row.name: row for row in NETWORK_ARGS}
