"""The shipped checkpoints: names, sizes, what diffusers makes of them, and the VAE's ceiling."""

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs

from recast.checkpoint import Checkpoint
from recast.layout import blueprint, detect
from recast.pocket import NAMES, files, gate, path, vae
from recast.pocket.words import kept


@pytest.fixture(scope="module", params=NAMES)
def shipped(request):
    name = request.param
    return (name, *files.read_checkpoint(path(name), name))


def below(name: str, prefix: str) -> dict[str, torch.Tensor]:
    with Checkpoint(path(name)) as checkpoint:
        return {key: checkpoint[key].float() for key in checkpoint if key.startswith(prefix)}


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_the_familys(name):
    with Checkpoint(path(name)) as checkpoint:
        layout = detect(checkpoint)
        assert layout.plan == files.PLANS[name]
        assert {
            spec.dtype for key, spec in checkpoint.specs.items() if key in blueprint(layout.plan)
        } == {"F16"}


def test_diffusers_reads_the_same_unet_and_vae(shipped):
    name, net, autoencoder = shipped
    unet = theirs.convert_ldm_unet_checkpoint(
        below(name, "model.diffusion_model."), dict(net.unet.config)
    )
    found = theirs.convert_ldm_vae_checkpoint(
        below(name, "first_stage_model."), dict(autoencoder.config)
    )
    for module, state in ((net.unet, unet), (autoencoder, found)):
        wanted = module.state_dict()
        assert state.keys() == wanted.keys()
        assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_diffusers_reads_the_same_second_text_encoder():
    net, _ = files.read_checkpoint(path("pocket-xl"), "pocket-xl")
    prefix = "conditioner.embedders.1.model."
    state = theirs.convert_open_clip_checkpoint(
        net.text_2, below("pocket-xl", prefix), prefix=prefix
    )
    wanted = net.text_2.state_dict()
    state = {key: state[key] for key in state if not key.endswith("position_ids")}
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


def test_unused_words_are_zero(shipped):
    _, net, _ = shipped
    table = net.text.embeddings.token_embedding.weight
    used = table.abs().sum(1).nonzero().flatten()
    assert set(used.tolist()) == set(kept().tolist())


@pytest.mark.parametrize("held", [False, True])
def test_pictures_survive_the_vae(shipped, held):
    _, _, autoencoder = shipped
    figures, _ = vae.ceiling(autoencoder, gate.sample(held, 64, 31), 32)
    assert figures["shape"] >= 0.95
    assert figures["colour"] >= 0.95


def test_scaled_latents_are_white(shipped):
    name, _, autoencoder = shipped
    from recast.pocket.teacher import SCALES
    from recast.pocket.world import render

    pictures = render(gate.sample(False, 128, 33), torch.Generator().manual_seed(34))
    z = vae.encode(autoencoder, pictures) * SCALES[name]
    assert z.mean((0, 2, 3)).abs().max() < 0.15
    assert (z.std((0, 2, 3)) - 1).abs().max() < 0.15
