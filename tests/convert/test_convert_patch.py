"""A patch on a related checkpoint: added as it is, polished, or as a conversion's start."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.adapter.test_fingerprint import relative
from tests.convert import command, small
from tests.convert.test_convert_refusals import refused
from tests.convert.test_convert_resume import Stop, tree

from recast.adapter import read_adapter, rebuild
from recast.adapter.patch import FAR, combined, patch_from
from recast.checkpoint import Checkpoint, write_dict
from recast.convert import Job
from recast.errors import Stopped
from recast.lowrank import LowRank
from recast.markers import read_objective

MODEL = "model.safetensors"
CHANGED = ("model.diffusion_model.out", "model.diffusion_model.time_embed")


@pytest.fixture(scope="module")
def base(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a conversion to v-zsnr, whose marker tensors the patched file must have too."""
    out = tmp_path_factory.mktemp("base")
    how = small.recipe(home, "v-zsnr", steps=2, checkpoint_every=2)
    small.convert(
        Job(home / "sdxl.safetensors", out, how, images=home / "images", measure=False)
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def kin(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A relative of the base, 10 % of its norm away."""
    out = tmp_path_factory.mktemp("kin") / "kin.safetensors"
    return relative(home / "sdxl.safetensors", out, 0.1)


@pytest.fixture(scope="module")
def recipe(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.toml"
    prompts = small.prompts(home)
    path.write_text(
        f"[train]\nbatch = 2\ncheckpoint_every = 1\n[data]\npictures = 2\nreplay_steps = 3\n"
        f"prompts = {json.dumps(str(prompts))}\n[evaluate]\npictures = 2\nsteps = 2\n"
        f"prompts = {json.dumps(str(prompts))}\n",
        encoding="utf-8",
    )
    return path


def test_the_patch_alone_converts_a_relative(
    base: Path, kin: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "kin-v.safetensors"
    words = ["patch", kin, base / "patch.safetensors", "--out", out, "--recipe", recipe]
    command.run(words)
    told = capsys.readouterr()
    apart = re.search(r"in its norms: ([\d.]+) over the UNet", told.err)
    assert apart
    assert float(apart[1]) == pytest.approx(0.1, rel=0.1)
    assert "Nothing was trained" in told.out
    assert str(out) in told.out
    with Checkpoint(kin) as before, Checkpoint(out) as after:
        evidence = read_objective(after.specs, after.metadata)
        assert (evidence.objective, evidence.contradictions) == ("v-zsnr", ())
        assert {"v_pred", "ztsnr"} <= after.specs.keys()
        assert after.metadata["recast.base_sha256"] == before.sha256()
        patch = read_adapter(base / "patch.safetensors")
        assert patch.base != before.sha256()
        for key in before:
            changed = not torch.equal(before[key], after[key])
            assert changed <= key.startswith(CHANGED)
        new = read_adapter(tmp_path / "new" / "kin-v" / "patch.safetensors")
        for name, entry in patch.entries.items():
            torch.testing.assert_close(new.entries[name].dense(), entry.dense())
        for key, tensor in rebuild(before, None, new):
            assert torch.equal(tensor, after[key]), key
    report = json.loads((out.with_suffix("") / "report.json").read_text(encoding="utf-8"))
    assert report["psnr_same_noise_db"]["converted"] > 0
    assert report["command"].startswith("recast patch ")
    assert report["files"][0]["name"] == "../kin-v.safetensors"
    assert report["losses"] is None
    assert 'config="kin-v/diffusers"' in report["howto"][1]["code"]
    assert any(apart[1] in note for note in report["notes"])
    before_again = tree(tmp_path)
    command.run(words)
    assert tree(tmp_path) == before_again


@pytest.mark.slow
def test_polish_goes_on_from_the_patch_and_resumes(
    base: Path, kin: Path, recipe: Path, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "polished.safetensors"
    patch = base / "patch.safetensors"
    command.run(
        ["patch", kin, patch, "--out", out, "--recipe", recipe, "--polish", 2]
    )  # fmt: skip
    start = read_adapter(out.with_suffix("") / "start.safetensors")
    given = read_adapter(patch)
    assert start.entries.keys() == given.entries.keys()
    for name, entry in given.entries.items():
        assert torch.equal(start.entries[name].dense(), entry.dense())
    # convert --from is the same run with the model inside its folder
    how = small.recipe(home, "v-zsnr", steps=2, checkpoint_every=1)
    job = Job(
        kin, tmp_path / "from", how, images=home / "images", start=patch, measure=False
    )  # fmt: skip
    with pytest.raises(Stopped):
        Stop("train").follow(job)
    small.convert(job)
    small.convert(
        Job(kin, tmp_path / "whole", how, images=home / "images", start=patch, measure=False)
    )  # fmt: skip
    assert small.contents(tmp_path / "from") == small.contents(tmp_path / "whole")
    trained = read_adapter(tmp_path / "from" / "adapter.safetensors")
    assert json.loads(trained.metadata["recast.start"])["base_sha256"] == given.base


def test_layers_that_only_the_patch_has_are_kept(home: Path, base: Path, tmp_path: Path) -> None:
    how = small.recipe(home, "v-zsnr", steps=1, profile="OUT")
    small.convert(
        Job(
            home / "sdxl.safetensors", tmp_path, how, images=home / "images",
            start=base / "patch.safetensors", measure=False,
        )
    )  # fmt: skip
    given, found = (read_adapter(path / "patch.safetensors").entries for path in (base, tmp_path))
    assert given.keys() == found.keys()
    for name, entry in given.items():
        same = torch.equal(found[name].dense(), entry.dense())
        assert same == ("output_blocks" in name or "time_embed" in name), name


@pytest.mark.slow
def test_a_low_rank_conversion_s_patch_can_be_a_start_too(home: Path, tmp_path: Path) -> None:
    model, images = home / "sdxl.safetensors", home / "images"
    how = small.recipe(home, "flow", "flow-dadaptlion", rank=2, steps=1)
    small.convert(Job(model, tmp_path / "one", how, images=images, measure=False))
    patch = tmp_path / "one" / "patch.safetensors"
    how = small.recipe(home, "flow", steps=1)
    small.convert(Job(model, tmp_path / "two", how, images=images, start=patch, measure=False))
    found = read_adapter(tmp_path / "two" / "patch.safetensors")
    assert any(isinstance(entry, LowRank) for entry in found.entries.values())
    assert found.role == "delta"


def test_changes_add_up_whatever_their_form() -> None:
    generator = torch.Generator().manual_seed(0)

    def low(rank: int) -> LowRank:
        return LowRank(
            torch.randn(6, rank, generator=generator), torch.randn(rank, 4, generator=generator)
        )

    from recast.adapter.file import Adapter
    from recast.lowrank import Full

    one = {"a.weight": low(2), "b.weight": low(1), "c.bias": Full(torch.ones(3))}
    two = {"a.weight": low(1), "b.weight": Full(torch.ones(6, 4)), "c.bias": Full(torch.ones(3))}
    about = {"recast.role": "delta", "recast.base_sha256": "first"}
    parts = [patch_from(None, Adapter(entries, about)) for entries in (one, two)]
    whole = combined(parts)
    assert whole.base == "first"
    assert whole.entries["a.weight"].rank == 3
    for name in one:
        wanted = one[name].dense() + two[name].dense()
        torch.testing.assert_close(whole.entries[name].dense(), wanted)


def other_family(folder: Path, home: Path, base: Path) -> list[object]:
    return [home / "sd15.safetensors", base / "patch.safetensors"]


def other_source(folder: Path, home: Path, base: Path) -> list[object]:
    return [home / "sdxl.safetensors", base / "patch.safetensors", "--source", "v"]


def a_checkpoint(folder: Path, home: Path, base: Path) -> list[object]:
    return [home / "sdxl.safetensors", home / "sdxl.safetensors"]


def a_lora(folder: Path, home: Path, base: Path) -> list[object]:
    write_dict(folder / "lora.safetensors", {"lora_unet_x.diff": torch.zeros(1)}, {})
    return [home / "sdxl.safetensors", folder / "lora.safetensors"]


def a_trained_adapter(folder: Path, home: Path, base: Path) -> list[object]:
    return [home / "sdxl.safetensors", base / "adapter.safetensors"]


def a_stranger(folder: Path, home: Path, base: Path) -> list[object]:
    path = tiny.checkpoint(
        folder / "other.safetensors", seed=7, dtype="F16", vocabulary=49408,
        metadata={"recast.size": "64"},
    )  # fmt: skip
    return [path, base / "patch.safetensors"]


def no_file(folder: Path, home: Path, base: Path) -> list[object]:
    return [home / "sdxl.safetensors", base / "patch.safetensors", "--out", folder / "run"]


def images_alone(folder: Path, home: Path, base: Path) -> list[object]:
    return [
        home / "sdxl.safetensors", base / "patch.safetensors", "--images", home / "images"
    ]  # fmt: skip


def my_file(folder: Path, home: Path, base: Path) -> list[object]:
    (folder / "out.safetensors").write_text("mine", encoding="utf-8")
    return [home / "sdxl.safetensors", base / "patch.safetensors"]


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (other_family, "is for sdxl and"),
        (other_source, "turns eps into v-zsnr"),
        (a_checkpoint, "is no patch"),
        (a_lora, "is no patch"),
        (a_trained_adapter, "is no patch"),
        (a_stranger, f"{FAR} is the most"),
        (no_file, "give the file to write"),
        (images_alone, "--polish"),
        (my_file, "exists and is no file of this run"),
    ],
)
def test_what_the_patch_verb_refuses(
    make: object, wanted: str, home: Path, base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = make(tmp_path, home, base)  # type: ignore[operator]
    line = ["patch", "--out", tmp_path / "out.safetensors", *words]
    assert wanted in refused(line, tmp_path, capsys)


def test_far_takes_a_stranger(home: Path, base: Path, tmp_path: Path) -> None:
    model, patch = a_stranger(tmp_path, home, base)
    out = tmp_path / "out.safetensors"
    how = small.recipe(home, "v-zsnr")
    small.convert(
        Job(
            model, tmp_path / "out", how, start=patch, trains=False, far=True, file=out,
            measure=False,
        )
    )  # fmt: skip
    assert out.exists()


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--to", "flow"], "makes v-zsnr and flow is asked for"),
        (["--to", "v-zsnr", "--recipe", "flow-dadaptlion"], "train.rank to 0"),
    ],
)
def test_what_a_start_refuses(
    words: list[str], wanted: str, home: Path, base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    line = ["convert", home / "sdxl.safetensors", "--from", base / "patch.safetensors", *words]
    assert wanted in refused([*line, "--out", tmp_path / "run"], tmp_path, capsys)


@pytest.mark.slow
def test_a_training_leaves_no_patch_of_a_conversion(home: Path, tmp_path: Path) -> None:
    words = ["train", home / "sd15.safetensors", home / "images", "--out", tmp_path]
    command.run([*words, "--rank", 1, "--steps", 1])
    with Checkpoint(tmp_path / "patch.safetensors") as file:
        assert "recast.fingerprint" not in file.metadata


def test_merge_mixes_files_and_says_so(
    home: Path, kin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mixed.safetensors"
    words = ["merge", home / "sdxl.safetensors", kin, "--weight", 0.5, "--weight", "OUT08=1"]
    command.run([*words, "--out", out, "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["weights"] == ["0.5", "OUT08=1"]
    key = "model.diffusion_model.output_blocks.8.0.in_layers.2.weight"
    with Checkpoint(kin) as wanted, Checkpoint(out) as found:
        assert torch.equal(found[key], wanted[key])
    assert "exists" in refused([*words, "--out", out], tmp_path, capsys)
