"""The second VAE: its file, what it claims to do, and a tuning that goes on where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from recast.checkpoint import Checkpoint
from recast.layout.latents import VAE_SCALE, VAE_SHIFT
from recast.layout.vae import exchanged
from recast.pocket import VAE, equivariant, gate, path
from recast.pocket.equivariant import RUN, SCALE, SHIFT, Change
from recast.pocket.world import render


def test_a_change_shrinks_and_turns():
    maps = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert Change(4)(maps).shape == (1, 1, 4, 4)
    torch.testing.assert_close(Change(turns=1)(maps), maps.rot90(1, (2, 3)))
    torch.testing.assert_close(Change(2)(maps.expand(1, 1, 8, 8)).mean(), maps.mean())


def test_the_shipped_vae_is_another_space_and_more_equivariant():
    with Checkpoint(VAE) as file:
        assert float(file.metadata[VAE_SCALE]) == SCALE
        assert float(file.metadata[VAE_SHIFT]) == SHIFT
        assert "decoder.conv_in.weight" in file
    with (
        Checkpoint(path("pocket-xl")) as original,
        exchanged(original, VAE, None, None, fold=True) as other,
    ):
        first, second = equivariant.fresh(original), equivariant.fresh(other)
    x = render(gate.sample(None, 24, 0), torch.Generator().manual_seed(0))
    one, two = ((net.quant_conv(net.encoder(x))[:, :4]) * 0.13025 for net in (first, second))
    assert 0.8 < two.std() < 1.25
    assert two.mean((0, 2, 3)).abs().max() < 0.3
    assert (one - two).norm() > 0.3 * one.norm()
    for turn in (1, 3):
        wanted = x.rot90(turn, (2, 3))
        errors = []
        for net, z in ((first, one), (second, two)):
            shown = net.decoder(net.post_quant_conv((z / 0.13025).rot90(turn, (2, 3))))
            errors.append((shown - wanted).square().mean())
        assert errors[1] < 0.8 * errors[0]


@pytest.mark.slow
def test_tuning_goes_on_where_it_stopped(tmp_path: Path):
    run = replace(RUN, steps=3, keep_every=2, batch=1)
    torch.manual_seed(0)
    whole = equivariant.first().requires_grad_(True)
    losses = list(equivariant.fit(whole, run, tmp_path / "whole.pt"))
    kept = tmp_path / "kept.pt"
    stopped = equivariant.fit(equivariant.first().requires_grad_(True), run, kept)
    for _ in range(3):
        next(stopped)
    again = equivariant.first().requires_grad_(True)
    assert list(equivariant.fit(again, run, kept))[2] == losses[2]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=0, rtol=0)


def test_the_file_is_small():
    assert VAE.stat().st_size < 4e6
    assert all(value.dtype == torch.float16 for value in load_file(VAE).values())
