"""Forecasts of a conversion's memory against what autograd and a quantised network really hold."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter import attach
from recast.adapter.attach import quantiser
from recast.adapter.decompose import zeros_full
from recast.adapter.forecast import Memory, readout
from recast.checkpoint import Checkpoint
from recast.layout import SDXL, detect
from recast.model import open_model

SIDE = 512  # pixels: latents of 64 x 64


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_the_readout_keeps_what_was_forecast_and_the_trunk_nothing(
    tmp_path: Path, family: str
) -> None:
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors", family)) as checkpoint:
        layout = detect(checkpoint)
        net = open_model(checkpoint, parts=("unet",)).unet
        sites = layout.sites("readout")
        attached = attach({"unet": net}, zeros_full(checkpoint, sites), sites)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    at_door: list[int] = []
    net.up_blocks[-1].register_forward_pre_hook(lambda *_: at_door.append(len(kept)))
    more = {}
    if layout.plan.te2 is not None:
        pooled = torch.randn(1, layout.plan.te2.projection)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}}
    context = torch.randn(1, 77, layout.unet["cross_attention_dim"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(1, 4, 64, 64), torch.tensor(400.5), context, **more)
    assert at_door == [0]
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    sums = 4 * sum(p.numel() for p in attached.parameters())
    foreseen = readout(layout, "full", SIDE, trunk_bytes=4)
    assert foreseen.activations + sums == pytest.approx(total, rel=0.05)


def test_weights_of_a_quantised_conversion_are_as_forecast(tmp_path: Path) -> None:
    from recast.quantise import tally

    pytest.importorskip("bitsandbytes")
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors")) as checkpoint:
        sites = detect(checkpoint).sites("readout")
        how = quantiser(zeros_full(checkpoint, sites), sites, "8bit", dtype=torch.bfloat16)
        model = open_model(checkpoint, parts=("unet",), dtype=torch.bfloat16, quantiser=how)
    widest = max(site.shape[0] * site.shape[1] * 9 for site in model.layout.sites("unet")
                 if len(site.shape) == 4)  # fmt: skip
    found = readout(model.layout, "8bit", SIDE).trunk
    assert tally(model.unet, model.dtype).after == pytest.approx(found - 2 * widest, rel=0.02)


def test_sdxl_is_converted_on_the_cards_that_the_documentation_names(tmp_path: Path) -> None:
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors")) as checkpoint:
        layout = replace(detect(checkpoint), plan=SDXL)

    def of(base: str, side: int = 1024, batch: int = 1) -> Memory:
        return readout(layout, base, side, batch=batch)

    assert of("full").total < 6.2e9
    assert of("8bit").total < 3.9e9
    assert of("4bit").total < 2.7e9
    assert of("full", batch=4).activations == 4 * of("full").activations
    assert of("full", side=512).activations == of("full").activations / 4
