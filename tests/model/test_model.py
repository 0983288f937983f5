"""A tiny checkpoint of each family against diffusers, and everything that opening must refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny
from torch import Tensor

from recast.checkpoint import Checkpoint, write_dict
from recast.errors import Refused
from recast.layout import detect, keymap, to_file
from recast.layout.generate import generate
from recast.model import Model, cat, open_model
from recast.model.load import build, fill
from recast.objective import EPS, FLOW, OBJECTIVES
from recast.text.tokens import merges, vocabulary

STATED = {"recast.size": "64"}


def write_tiny(folder: Path, family: str, metadata: dict[str, str] = STATED) -> Path:
    """Write a tiny checkpoint with CLIP's whole vocabulary."""
    path = folder / f"{family}.safetensors"
    return tiny.checkpoint(path, family, vocabulary=49408, metadata=metadata)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("tiny")
    return {family: open_model(write_tiny(folder, family)) for family in tiny.PLANS}


@pytest.fixture(params=["sdxl", "sd15"])
def model(request: pytest.FixtureRequest, models: dict[str, Model]) -> Model:
    return models[request.param]


def test_every_weight_of_the_file_is_in_a_module_and_back(model: Model) -> None:
    file = model.checkpoint
    states = {name: part.state_dict() for name, part in model.parts.items()}
    entries = keymap(model.layout)
    found = dict(to_file(entries, states))
    assert len(found) == len({e.key for e in entries})
    for key, tensor in found.items():
        assert torch.equal(tensor.reshape(file[key].shape), file[key]), key
    for part in model.parts.values():
        assert not part.training
        assert not any(p.requires_grad or p.is_meta for p in part.parameters())
        assert not any(b.is_meta for b in part.buffers())


def test_parameters_do_not_share_memory(model: Model) -> None:
    for part in model.parts.values():
        places = [p.untyped_storage().data_ptr() for p in part.parameters()]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precisions(models: dict[str, Model], dtype: torch.dtype) -> None:
    full = models["sdxl"]
    half = open_model(full.checkpoint, dtype=dtype)
    assert {p.dtype for p in half.unet.parameters()} == {dtype}
    assert {p.dtype for p in half.vae.parameters()} == {torch.float32}
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        exact = full.net(full.condition(["a cat", "a dog"]))(x, t)
        rough = half.net(half.condition(["a cat", "a dog"]))(x, t)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.1 * exact.abs().max()


def reference_pipeline(model: Model):
    """Put the modules into diffusers' own pipeline."""
    from diffusers import (
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
    )
    from transformers import CLIPTokenizer

    pairs = merges()
    made = [
        CLIPTokenizer(vocabulary(pairs), merges=pairs, model_max_length=77, pad_token=pad)
        for pad in ("<|endoftext|>", "!")
    ]
    steps = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    if model.layout.family == "sdxl":
        return StableDiffusionXLPipeline(
            model.vae,
            model.texts[0],
            model.texts[1],
            *made,
            model.unet,
            steps,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )
    return StableDiffusionPipeline(
        model.vae,
        model.texts[0],
        made[0],
        model.unet,
        steps,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def test_one_step_of_diffusers_pipeline_is_ours(model: Model) -> None:
    """Guided DDIM from t = 1 in a pipeline and by hand: text, size ids, clock, VAE all agree."""
    pipe = reference_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    seen: list[Tensor] = []

    def keep(pipe, step, clock, values):
        seen.append(values["latents"].clone())
        return values

    theirs = pipe(
        "a photo of a cat",
        negative_prompt="a dog",
        height=64,
        width=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        latents=noise,
        output_type="pt",
        callback_on_step_end=keep,
    ).images
    x = noise
    with torch.no_grad():
        net = model.net(model.condition(["a photo of a cat", "a dog"], size=64))
        clocks = [int(c) for c in pipe.scheduler.timesteps]
        for clock in clocks:
            t = torch.tensor([(clock + 1) / 1000], dtype=torch.float64)
            wanted, unwanted = net(torch.cat([x, x]), t.expand(2)).chunk(2)
            x0, eps = EPS.split(x, unwanted + 3 * (wanted - unwanted), t)
            at = max(clock - 500, 0)
            alpha, sigma = EPS.path(torch.tensor([(at + 1) / 1000], dtype=torch.float64))
            x = (alpha * x0 + sigma * eps).float()
            torch.testing.assert_close(x, seen[clocks.index(clock)], atol=2e-4, rtol=1e-4)
        mine = (model.decode(x) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=0)


def test_sdxl_is_told_the_size(models: dict[str, Model]) -> None:
    model = models["sdxl"]
    own = model.condition(["a cat"])
    assert own.time_ids.tolist() == [[64, 64, 0, 0, 64, 64]]
    wide = model.condition(["a cat"], size=(16, 48))
    assert wide.time_ids.tolist() == [[16, 48, 0, 0, 16, 48]]
    cropped = model.condition(["a cat"], time_ids=[(90, 80, 2, 1, 32, 32)])
    assert cropped.time_ids.tolist() == [[90, 80, 2, 1, 32, 32]]
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        assert not torch.allclose(model.net(own)(x, t), model.net(cropped)(x, t))
    assert models["sd15"].condition(["a cat"]).time_ids is None


def test_net_binds_rows_clock_and_dtype(model: Model) -> None:
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    one, two = model.condition(["a cat"]), model.condition(["a dog, " * 40])
    with torch.no_grad():
        together = model.net(cat([one, two, one]))(x, t)
        alone = torch.cat([model.net(c)(x[i : i + 1], t[i : i + 1])
                           for i, c in enumerate((one, two, one))])  # fmt: skip
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
        shared = model.net(one)(x, t)
        torch.testing.assert_close(shared[2:], together[2:], atol=1e-4, rtol=1e-4)
        flow = model.net(one, FLOW)(x, EPS.path.embed(t) / 1000)
        torch.testing.assert_close(flow, shared, atol=1e-4, rtol=1e-4)
        assert model.net(one)(x.double(), t.double()).dtype == torch.float64


def test_null_conditions_differ(model: Model) -> None:
    cat_ = model.condition(["a cat"])
    empty, zero = model.condition([""]), cat_.zeros()
    assert not zero.context.any()
    assert empty.context.any()


def test_gradients_reach_an_adapter_but_no_weight(model: Model) -> None:
    extra = torch.zeros(1, requires_grad=True)
    out = model.net(model.condition(["a cat"]))(torch.randn(1, 4, 8, 8) + extra, torch.ones(1))
    out.sum().backward()
    assert extra.grad is not None


def test_latents_scale_shift_and_slices(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.factor == 8
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        latents = model.encode(images)
        raw = model.vae.encode(images).latent_dist.mean
        torch.testing.assert_close(latents, raw * model.layout.scaling)
        drawn = model.encode(images, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(drawn, latents)
        whole = model.decode(latents)
        torch.testing.assert_close(whole, model.vae.decode(raw).sample, atol=1e-4, rtol=1e-4)
        monkeypatch.setattr("recast.model.networks.SLICED", 64 * 64)
        torch.testing.assert_close(model.decode(latents), whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.encode(images), latents, atol=1e-4, rtol=1e-4)


def test_latent_shape(model: Model) -> None:
    assert model.latent_shape() == (4, 8, 8)
    assert model.latent_shape(128) == (4, 16, 16)
    assert model.latent_shape((16, 48)) == (4, 2, 6)
    with pytest.raises(Refused, match="multiples of 8"):
        model.latent_shape((16, 44))


def test_size_is_the_familys_unless_stated(tmp_path: Path) -> None:
    path = write_tiny(tmp_path, "sd15", {})
    assert open_model(path, parts=()).size == 512
    path.unlink()
    write_tiny(tmp_path, "sd15", {"recast.size": "big"})
    with pytest.raises(Refused, match=r"recast\.size"):
        open_model(path, parts=())


def test_parts_that_are_absent(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    generate(path, replace(tiny.plan("sdxl", vocabulary=49408), vae=None, te2=None))
    with pytest.raises(Refused, match="has no second text encoder and no VAE"):
        open_model(path, parts=("unet", "te2", "vae"))
    model = open_model(path)
    assert set(model.parts) == {"unet", "te1"}
    with pytest.raises(Refused, match="has no VAE"):
        model.decode(torch.zeros(1, 4, 8, 8))
    with pytest.raises(Refused, match="has no second text encoder"):
        model.condition(["a cat"])
    with pytest.raises(Refused, match="without its text encoder"):
        open_model(path, parts=("unet",)).part("te1")


def test_sd15_has_no_second_encoder_to_miss(models: dict[str, Model]) -> None:
    parts = ("unet", "te1", "te2", "vae")
    assert set(open_model(models["sd15"].checkpoint, parts=parts).parts) == {"unet", "te1", "vae"}


def test_objective_comes_from_the_markers(tmp_path: Path, models: dict[str, Model]) -> None:
    assert models["sdxl"].objective is OBJECTIVES["eps"]
    path = write_tiny(tmp_path, "sd15", {"recast.objective": "flow"})
    assert open_model(path, parts=()).objective is OBJECTIVES["flow"]
    assert open_model(path, parts=(), objective="v").objective is OBJECTIVES["v"]
    with pytest.raises(Refused, match="no objective"):
        open_model(path, parts=(), objective="velocity")
    path.unlink()
    stated = {"recast.objective": "eps", "modelspec.prediction_type": "v"}
    write_tiny(tmp_path, "sd15", stated)
    with pytest.raises(Refused, match="--source"):
        open_model(path, parts=())


def test_loose_ends_are_named(models: dict[str, Model]) -> None:
    layout = models["sd15"].layout
    state = dict(models["sd15"].part("te1").state_dict())
    device = torch.device("cpu")

    def load(items: list[tuple[str, Tensor]]) -> None:
        fill(build(layout, "te1"), iter(items), torch.float32, device, "te1")

    name = "encoder.layers.1.mlp.fc1.bias"
    items = list(state.items())
    load(items)
    with pytest.raises(Refused, match=f"1 parameters of the text encoder unset: {name}"):
        load([item for item in items if item[0] != name])
    with pytest.raises(Refused, match=f"no place left for {name}"):
        load([*items, (name, state[name])])
    with pytest.raises(Refused, match=rf"{name} is \(3,\) in the file, \(64,\) in the network"):
        load([(k, v[:3] if k == name else v) for k, v in items])
    with pytest.raises(Refused, match="no place left for stranger"):
        load([*items, ("stranger", state[name])])


def test_other_precision_is_refused(models: dict[str, Model]) -> None:
    with pytest.raises(Refused, match="no precision"):
        open_model(models["sd15"].checkpoint, dtype=torch.int8)


def test_a_checkpoint_with_a_renamed_tensor_is_refused(
    tmp_path: Path, models: dict[str, Model]
) -> None:
    file = models["sd15"].checkpoint
    tensors = {key: file[key] for key in file}
    name = "model.diffusion_model.out.2.bias"
    tensors["model.diffusion_model.out.2.offset"] = tensors.pop(name)
    path = tmp_path / "renamed.safetensors"
    write_dict(path, tensors, {})
    with pytest.raises(Refused, match=r"out\.2\."):
        open_model(path)
    with Checkpoint(path) as opened, pytest.raises(Refused):
        detect(opened)


def test_fingerprints_tell_weights_apart(models: dict[str, Model]) -> None:
    model = models["sd15"]
    again = open_model(model.checkpoint, parts=("vae",))
    assert again.fingerprint("vae") == model.fingerprint("vae")
    with torch.no_grad():
        next(again.vae.parameters()).view(-1)[0] += 1e-3
    again._fingerprints.clear()
    assert again.fingerprint("vae") != model.fingerprint("vae")
