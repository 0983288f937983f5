"""Folders that diffusers itself writes, read as the single file they would be."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.model.test_model import reference_pipeline

from recast.checkpoint import Checkpoint, write_dict
from recast.errors import Refused
from recast.inspection import describe
from recast.layout import SD15, SDXL, detect, open_checkpoint
from recast.layout.folder import Folder
from recast.layout.scheduler import SCHEDULERS, stated_by
from recast.markers import OBJECTIVES, read_objective
from recast.model import open_model

FAMILIES = ("sdxl", "sd15")
VOCABULARY = 49408
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """{family: (single file, the folder that diffusers saves of it)}."""
    root = tmp_path_factory.mktemp("saved")
    found = {}
    for family in FAMILIES:
        file = tiny.checkpoint(root / f"{family}.safetensors", family, vocabulary=VOCABULARY)
        reference_pipeline(open_model(file)).save_pretrained(root / family)
        found[family] = (file, root / family)
    return found


@pytest.fixture
def folder(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A copy of the smaller folder, to spoil."""
    return Path(shutil.copytree(saved["sd15"][1], tmp_path / "model", copy_function=_link))


def _link(source: str, target: str) -> None:
    """JSON is copied, since tests change it; weights are linked."""
    if source.endswith(".safetensors"):
        Path(target).hardlink_to(source)
    else:
        shutil.copy(source, target)


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_the_file_s(saved: dict[str, tuple[Path, Path]], family: str) -> None:
    file, path = saved[family]
    with Checkpoint(file) as single, open_checkpoint(path) as found:
        layout = detect(single)
        wanted = [key for key in single if key not in layout.extras]
        assert list(found) == wanted
        assert detect(found).plan == layout.plan
        for key in wanted:
            assert found.specs[key].shape == single.specs[key].shape
            assert torch.equal(found[key], single[key]), key
            assert found.raw(key) == single.raw(key)
        assert found.sha256() != single.sha256()
        assert found.nbytes == sum(path.stat().st_size for path in found.files)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_network_answers_as_diffusers_own(
    saved: dict[str, tuple[Path, Path]], family: str
) -> None:
    """UNet and text encoders as diffusers reads the folder, against ours."""
    import diffusers

    name = {"sdxl": "StableDiffusionXLPipeline", "sd15": "StableDiffusionPipeline"}[family]
    pipe = getattr(diffusers, name).from_pretrained(saved[family][1], safety_checker=None)
    ours = open_model(saved[family][1])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        condition = ours.condition(["a cat"], size=64)
        added = {"text_embeds": condition.pooled, "time_ids": condition.time_ids}
        theirs = pipe.unet(
            x, ours.objective.path.embed(t).float(), encoder_hidden_states=condition.context,
            added_cond_kwargs=added if family == "sdxl" else None,
        ).sample  # fmt: skip
        kept = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}
        context = pipe.encode_prompt("a cat", device="cpu", **kept)[0]
        assert torch.allclose(ours.net(condition)(x, t), theirs, atol=1e-5)
        assert torch.allclose(condition.context, context, atol=1e-5)
        latents = torch.randn(1, 4, 8, 8)
        decoded = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
        assert torch.allclose(ours.decode(latents), decoded, atol=1e-5)


def test_shards_and_variants(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    file, path = saved["sdxl"]
    copy = Path(shutil.copytree(path, tmp_path / "model"))
    unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet")
    shutil.rmtree(copy / "unet")
    unet.half().save_pretrained(copy / "unet", variant="fp16", max_shard_size="300KB")
    assert len(list((copy / "unet").glob("*.fp16-0*.safetensors"))) > 2
    key = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    with Checkpoint(file) as single, open_checkpoint(copy) as found:
        assert found.specs[key].dtype == "F16"
        assert torch.equal(found[key], single[key].half())
    shutil.copy(path / UNET_FILE, copy / UNET_FILE)
    with open_checkpoint(copy) as found:
        assert found.specs[key].dtype == "F32", "the one without a variant is taken"
    (copy / UNET_FILE).unlink()
    next((copy / "unet").glob("*00002*.safetensors")).unlink()
    with pytest.raises(Refused, match=r"shards, diffusion_pytorch_model\.fp16-00002.* is absent"):
        open_checkpoint(copy)
    next((copy / "unet").glob("*.index*.json")).unlink()
    with pytest.raises(Refused, match="has shards and no"):
        open_checkpoint(copy)


def test_names_that_older_versions_wrote(folder: Path) -> None:
    """SD 1.5's own folder has these: query and key in the VAE, text_model. in the encoder."""
    with open_checkpoint(folder) as found:
        before = {key: found.raw(key) for key in found}
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    with Checkpoint(path) as file:
        for name in file:
            new = name
            for now, then in old.items():
                new = new.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
            tensors[new] = file[name]
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    path.unlink()
    write_dict(path, tensors)
    path = folder / "text_encoder" / "model.safetensors"
    with Checkpoint(path) as file:
        tensors = {"text_model." + name: file[name] for name in file}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    path.unlink()
    write_dict(path, tensors)
    with open_checkpoint(folder) as found:
        assert {key: found.raw(key) for key in found} == before


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_scheduler_says_the_objective(folder: Path, objective: str) -> None:
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(SCHEDULERS[objective]))
    with open_checkpoint(folder) as found:
        evidence = read_objective(found.specs, found.metadata)
    assert (evidence.objective, evidence.contradictions) == (objective, ())
    assert evidence.reasons[0] == f"scheduler_config.json: {objective}"
    assert open_model(folder, parts=("unet",)).objective.name == objective


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "flow"),
        ({"_class_name": "PNDMScheduler"}, "eps"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "linear"}, "of its own"),
        ({"_class_name": "EDMEulerScheduler"}, "EDM"),
        ({"rescale_betas_zero_snr": True}, "epsilon with rescaled betas"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction of"),
    ],
)
def test_other_schedulers(folder: Path, config: dict, word: str) -> None:
    assert word in stated_by(config)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with open_checkpoint(folder) as found:
        evidence = read_objective(found.specs, found.metadata)
    if word in OBJECTIVES:
        assert (evidence.objective, evidence.contradictions) == (word, ())
    else:
        assert word in evidence.contradictions[0]
        with pytest.raises(Refused, match="--source"):
            open_model(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_inspection_needs_no_torch(saved: dict[str, tuple[Path, Path]], family: str) -> None:
    path = saved[family][1]
    facts = describe(path, hashed=True)
    assert (facts["kind"], facts["family"], facts["problems"]) == ("checkpoint", family, [])
    assert facts["components"]["unet"]["dtypes"] == {"F32": facts["components"]["unet"]["tensors"]}
    assert facts["format"] == "diffusers folder"
    assert [entry["objective"] for entry in facts["loaders"]] == [None, "eps"]
    code = (
        f"import sys; from recast.inspection import describe; describe({str(path)!r}); "
        "print('torch' in sys.modules)"
    )
    src = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": src}
    )
    assert done.stdout == "False\n", done.stderr


# what is done to a folder: (a sentence, an edit)
SPOILT = {
    "has no model_index.json, so the download": lambda f: (f / "model_index.json").unlink(),
    "is a FluxPipeline folder": lambda f: change(
        f / "model_index.json", _class_name="FluxPipeline"
    ),
    "lists vae in its model_index.json": lambda f: shutil.rmtree(f / "vae"),
    r"vae/config\.json is absent": lambda f: (f / "vae" / "config.json").unlink(),
    "has no diffusion_pytorch_model.safetensors": lambda f: (f / UNET_FILE).unlink(),
    "is a pickle, .*save_pretrained": lambda f: (f / UNET_FILE).rename(
        (f / UNET_FILE).with_suffix(".bin")
    ),
    "no JSON text": lambda f: (f / "unet" / "config.json").write_text("<html>"),
    "has \\[32\\] as block_out_channels|as down_block_types": lambda f: change(
        f / "unet" / "config.json", block_out_channels=[32]
    ),
    "block_out_channels": lambda f: change(f / "unet" / "config.json", block_out_channels="x"),
    "1000000 as layers_per_block": lambda f: change(
        f / "unet" / "config.json", layers_per_block=10**6
    ),
    r"has \[4, 4, 4, 4\] as attention_head_dim, and Recast builds": lambda f: change(
        f / "unet" / "config.json", attention_head_dim=4
    ),
    "has 0 as scaling_factor": lambda f: change(f / "vae" / "config.json", scaling_factor=0),
    "has gelu as hidden_act": lambda f: change(
        f / "text_encoder" / "config.json", hidden_act="gelu"
    ),
    "a Stable Diffusion 2 UNet": lambda f: change(
        f / "unet" / "config.json", use_linear_projection=True
    ),
    "takes 9 channels, so it is an inpainting": lambda f: change(
        f / "unet" / "config.json", in_channels=9
    ),
    "has a T5EncoderModel as its text_encoder": lambda f: change(
        f / "model_index.json", text_encoder=["transformers", "T5EncoderModel"]
    ),
}


@pytest.mark.parametrize("sentence", list(SPOILT))
def test_what_is_refused(folder: Path, sentence: str) -> None:
    SPOILT[sentence](folder)
    with pytest.raises(Refused, match=sentence) as refusal:
        open_checkpoint(folder)
    assert "\n" not in str(refusal.value)


def test_other_folders_are_named(tmp_path: Path) -> None:
    for name, sentence in {
        "adapter_config.json": "a LoRA's folder",
        "snapshots": "a download cache",
        "config.json": "one component",
        "x": "no diffusers folder",
    }.items():
        path = tmp_path / name.partition(".")[0]
        path.mkdir()
        (path / name).touch()
        with pytest.raises(Refused, match=sentence):
            open_checkpoint(path)
    with pytest.raises(Refused, match="does not exist"):
        open_checkpoint(tmp_path / "absent")


def test_tensors_that_do_not_fit_are_listed(folder: Path) -> None:
    path = folder / UNET_FILE
    with Checkpoint(path) as file:
        tensors = {name: file[name] for name in file}
    path.unlink()
    write_dict(path, {"extra.weight": torch.zeros(1), **tensors})
    with pytest.raises(Refused, match=r"1 tensors that belong to no part \(extra.weight\)"):
        open_checkpoint(folder)
    first, second = "time_embedding.linear_1.weight", "time_embedding.linear_1.bias"
    turned = {**tensors, first: tensors[first].T.contiguous()}
    turned["renamed"] = turned.pop(second)
    write_dict(path, turned, force=True)
    wrong = pytest.raises(Refused, match=r"linear_1\.bias.*\(renamed\).*misshapen")
    with open_checkpoint(folder) as found, wrong:  # the counts are right: the first tensor tells
        found.raw("model.diffusion_model.out.2.bias")


def test_parts_that_a_folder_leaves_out_are_missing(folder: Path) -> None:
    change(folder / "model_index.json", vae=[None, None])
    with open_checkpoint(folder) as found:
        assert detect(found).missing == ("vae",)


@pytest.mark.parametrize("plan", [SDXL, SD15], ids=["sdxl", "sd15"])
def test_configurations_of_the_real_sizes(plan, tmp_path: Path) -> None:
    """What the hub's folders say, as far as it differs from what Recast would write."""
    from recast.layout.configs import text_config, unet_config, vae_config
    from recast.layout.pipeline import CLASSES, SUBFOLDERS, read_plan

    unet = {**unet_config(plan), "num_class_embeds": None, "upcast_attention": None}
    if plan is SD15:
        unet.pop("transformer_layers_per_block")
    parts = {"unet": unet, "vae": vae_config(plan.vae, plan.family)}
    parts["te1"] = {**text_config(plan.te1, "te1"), "projection_dim": 768, "eos_token_id": 2}
    if plan.te2:
        parts["te2"] = text_config(plan.te2, "te2")
    index = {SUBFOLDERS[part]: ["diffusers", CLASSES[part]] for part in parts}
    for part, config in parts.items():
        (tmp_path / SUBFOLDERS[part]).mkdir()
        (tmp_path / SUBFOLDERS[part] / "config.json").write_text(json.dumps(config))
    assert read_plan(tmp_path, index) == (plan, 1024 if plan is SDXL else 512)


def test_a_folder_is_closed_with_its_checkpoint(saved: dict[str, tuple[Path, Path]]) -> None:
    store = Folder(saved["sd15"][1])
    with Checkpoint(saved["sd15"][1], store=store) as found:
        key = next(iter(found))
        assert found.raw(key)
    with pytest.raises(Refused, match="cannot be read"):
        store.raw(key)


ODD = [None, True, 0, -1, 10**30, 0.5, "x", [], [None], {}, {"a": 1}, [[1]], [2] * 4, 1 << 20, 100]


def test_whatever_the_configurations_hold_is_read_or_refused(folder: Path) -> None:
    chance, refused = random.Random(0), 0
    for _ in range(50):
        part = chance.choice(["unet", "vae", "text_encoder", ""])
        path = folder / part / ("config.json" if part else "model_index.json")
        before = path.read_text()
        change(path, **{chance.choice(list(json.loads(before))): chance.choice(ODD)})
        try:
            with open_checkpoint(folder) as found:
                detect(found)
        except Refused:
            refused += 1
        path.write_text(before)
    assert refused > 8
