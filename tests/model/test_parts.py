"""Networks that take turns: one kind on the device, the same answers, nothing opened in vain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.convert import small
from tests.model import turns

from recast.errors import Refused
from recast.model import Model, open_model
from recast.sample import sample_images

SDXL = ("unet", "te1", "te2", "vae")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.checkpoint(tmp_path_factory.mktemp("parts"), "sdxl")


def pictures(model: Model, **how: int) -> torch.Tensor:
    made = sample_images(model, small.PROMPTS, seeds=range(3), steps=2, batch=1, **how)
    return torch.stack([picture.image for picture in made])


def test_lazily_opened_networks_take_turns_and_answer_alike(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pictures(open_model(path))
    seen = turns.watch(monkeypatch)
    model = open_model(path, lazily=True)
    assert not seen.here
    assert set(model.parts) == set(SDXL)
    assert torch.equal(pictures(model), wanted)
    assert seen.together == {
        frozenset(each) for each in (("te1",), ("te1", "te2"), ("unet",), ("vae",))
    }
    assert max(seen.nbytes) == max(
        sum(p.nbytes for name in group for p in model.part(name).parameters())
        for group in (("te1", "te2"), ("unet",), ("vae",))
    )


def test_batches_ahead_change_places_seldom(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = turns.watch(monkeypatch)
    model = open_model(path, lazily=True)
    one_by_one = pictures(model, ahead=1)
    often = len(seen.moves)
    seen.moves.clear()
    assert torch.equal(pictures(model, ahead=3), one_by_one)
    # a round: the VAE leaves, text encoders come and go, the UNet comes and goes, the VAE comes
    assert often == 3 + 2 * 8
    assert len(seen.moves) == 8


def test_a_net_that_was_bound_before_its_network_left_still_answers(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = turns.watch(monkeypatch)
    model = open_model(path, lazily=True)
    x, t = torch.randn(1, *model.latent_shape()), torch.full((1,), 0.5)
    with torch.no_grad():
        net = model.net(model.condition([""]))
        first = net(x, t)
        model.decode(x)
        assert torch.equal(net(x, t), first)
    assert ("UNet2DConditionModel", "cpu") in seen.moves


def test_a_second_vae_shares_the_other_networks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recast.model import beside

    seen = turns.watch(monkeypatch)
    model = open_model(path, lazily=True)
    other = beside(model.parts, "vae", lambda: open_model(path, parts=("vae",)).vae)
    assert other["unet"] is model.parts["unet"]
    assert other["vae"] is not model.parts["vae"]
    assert seen.together == {frozenset(["unet"]), frozenset(["vae"])}
    assert model.parts["unet"] is other["unet"]
    assert len(seen.here[-1]) == 1
    assert isinstance(beside({}, "vae", lambda: other["vae"]), dict)


def test_on_a_cpu_nothing_moves_and_nothing_unasked_is_opened(path: Path) -> None:
    model = open_model(path, lazily=True, dtype=torch.bfloat16)
    assert model.unet is model.unet
    assert model.vae.dtype == torch.float32
    assert {name for name, place in model.parts.places.items() if place.module} == {"unet", "vae"}
    assert model.unet.dtype == torch.bfloat16
    with pytest.raises(Refused, match="opened without its VAE"):
        open_model(path, parts=("unet",), lazily=True).part("vae")


def test_networks_held_together_leave_only_for_large_pictures(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = turns.watch(monkeypatch)
    model = open_model(path, parts=("unet", "vae"), lazily=True, together=True)
    x, t = torch.randn(1, *model.latent_shape()), torch.full((1,), 0.5)
    condition = open_model(path).condition([""])
    with torch.no_grad():
        model.decode(x)
        first = model.net(condition)(x, t)
        small_ones = model.decode(x)
        assert set(seen.here[-1]) == {"unet", "vae"}
        monkeypatch.setattr("recast.model.networks.LARGE", 64 * 64 - 1)
        assert torch.equal(model.decode(x), small_ones)
        assert set(seen.here[-1]) == {"vae"}
        assert torch.equal(model.net(condition)(x, t), first)
    assert set(seen.here[-1]) == {"unet", "vae"}
    assert [where for _, where in seen.moves] == ["cpu", "cuda"]
