"""A run of `recast assessor train` on tiny networks; the command line on a pocket checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.convert import command, small

from recast.assessing import Job, features, fingerprint, latents, opened, randomised, run
from recast.assessing.latents import Source, parts_of
from recast.assessing.record import load, page
from recast.assessing.settings import Settings
from recast.checkpoint import Checkpoint
from recast.distill.store import read_assessor
from recast.dream import Plan
from recast.errors import CheckFailed, Refused
from recast.events import Note
from recast.inspection import describe

HOW = Settings(samples=96, test=40, bins=2, patterns=2, d=8, hidden=8, prototypes="shared",
               steps=30, batch=32, lr=1e-2)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "CHUNK", 16)
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("assessing")
    model = small.checkpoint(folder, "sdxl")
    images = small.images(folder / "images", 12)
    return Job(model, folder / "run", Source(images), HOW, objective="eps")


@pytest.fixture(scope="module")
def done(job: Job) -> Job:
    """Stopped in the middle of its features, then finished by the same job."""
    left = 3

    def stopped() -> int:
        nonlocal left
        chunks = len(list(job.out.rglob("teacher-*.safetensors")))
        return 15 if chunks >= left else 0

    list(run(job, stopped))
    made = {p: p.stat().st_mtime_ns for p in job.out.rglob("teacher-*.safetensors")}
    assert len(made) == 3
    assert not (job.out / "report.json").exists()
    list(run(job))
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    return job


def test_it_leaves_an_assessor_that_reads_its_teacher_and_no_other(done: Job) -> None:
    model = opened(done)
    made, facts = read_assessor(done.out / "assessor.safetensors", fingerprint(model, HOW))
    assert made.blocks == ("down_0", "down_1", "down_2", "mid", "up_0", "up_1", "up_2")
    assert facts["teacher"] == model.checkpoint.sha256()
    assert len(facts["accuracy"]) == len(facts["active"]) == len(facts["difficulty"]) == 2
    assert sum(facts["n"]) == sum(facts["blocks"]["mid"]["n"]) == 40
    other = replace(done, objective="v")
    with pytest.raises(Refused, match="its objective is 'eps' and not 'v'"):
        read_assessor(done.out / "assessor.safetensors", fingerprint(opened(other), HOW))


def test_inspect_says_what_it_reads(done: Job) -> None:
    facts = describe(done.out / "assessor.safetensors")
    assert facts["kind"] == "assessor"
    assert facts["reads"]["objective"] == "eps"
    assert len(facts["found"]["active"]) == 2
    assert "objective" not in facts


def test_the_report_has_every_figure_and_control(done: Job) -> None:
    said = load(done.out)
    assert said["blocks"].keys() == said["random"].keys() == said["mismatch"].keys()
    block = said["blocks"]["mid"]
    assert {"top1", "within1", "ce", "ece", "pattern_ce", "usage", "quality", "alpha", "n"} <= {
        *block
    }
    assert len(block["bins"]["n"]) == 2
    assert said["shifted"] < 1e-3
    assert said["shuffled"].keys() == {"before", "after"}
    assert 0 <= said["untrained"]["saturated"] <= 1
    text = "\n".join(page(said))
    for word in (
        "mid",
        "random weights",
        "was never trained",
        "told t'",
        "other samples",
        "bound 3",
    ):
        assert word in text
    assert (done.out / "report.md").read_text(encoding="utf-8") == text + "\n"


def test_the_same_command_finds_it_done_and_another_is_refused(done: Job) -> None:
    before = (done.out / "assessor.safetensors").read_bytes()
    (said,) = run(done)
    assert isinstance(said, Note)
    assert "already" in said.text
    with pytest.raises(Refused, match="holds another assessor"):
        list(run(replace(done, settings=replace(HOW, steps=31))))
    assert (done.out / "assessor.safetensors").read_bytes() == before


def test_an_unusable_assessor_leaves_its_report_only(job: Job, done: Job, tmp_path: Path) -> None:
    features_of = done.out / "features"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "features").symlink_to(features_of, target_is_directory=True)
    (tmp_path / "run" / "cache").symlink_to(done.out / "cache", target_is_directory=True)
    strict = replace(job, out=tmp_path / "run", settings=replace(HOW, threshold=0.999))
    with pytest.raises(CheckFailed, match=r"only 0 of its 2 time bins.*report\.md"):
        list(run(strict))
    assert not (tmp_path / "run" / "assessor.safetensors").exists()
    assert "Not usable: the assessor is unusable" in "\n".join(page(load(tmp_path / "run")))


def test_only_the_mismatch_control_tells_another_time(done: Job) -> None:
    (folder,) = (done.out / "features").iterdir()
    for path in folder.iterdir():
        with Checkpoint(path) as file:
            same = torch.equal(file["t"], file["fed"])
        assert same == ("mismatch" not in path.name), path.name


def test_for_the_noise_level_every_split_tells_another_time(done: Job) -> None:
    model = opened(done)
    tap = features.FeatureTap(model.unet)

    class Grey:
        def batch(self, number: int, size: int, seed: int):  # type: ignore[no-untyped-def]
            return torch.randn(size, 4, 8, 8), model.condition([""] * size)

    how = replace(HOW, t_signal="noise_level")
    with tap:
        made = features.chunk(model, tap, Grey(), how, "train", 0)
    assert not torch.equal(made["t"], made["fed"])
    assert made["mid"].shape == (16, 64)


def test_the_random_network_is_not_the_teacher(done: Job) -> None:
    model = opened(done)
    other = randomised(model, 0)
    key = "mid_block.resnets.0.conv1.weight"
    assert not torch.equal(other.unet.state_dict()[key], model.unet.state_dict()[key])
    again = randomised(model, 0).unet.state_dict()[key]
    assert torch.equal(other.unet.state_dict()[key], again)


def test_parts_share_no_picture_and_none_is_left_out() -> None:
    parts = parts_of(43, 0)
    assert sorted(k for part in parts.values() for k in part) == list(range(43))
    assert [len(parts[name]) for name in ("train", "validate", "test")] == [35, 4, 4]


def test_dreams_of_another_plan_lie_apart(
    done: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Path] = []

    def dreamt(model: object, folder: Path, plan: Plan, **rest: object) -> Iterator[Note]:
        places.append(folder)
        yield Note("")

    monkeypatch.setattr("recast.distillation.dreams.dream", dreamt)
    model = opened(done)
    for pictures in (10, 11):
        how = replace(HOW, pictures=pictures)
        list(latents.gather(model, Source(), how, tmp_path, lambda: 1))
    assert places[0] != places[1]
    assert places[0].parent == places[1].parent == tmp_path / "pairs"


# what is refused


def test_without_pictures_there_is_no_assessor(job: Job, tmp_path: Path) -> None:
    nothing = replace(job, out=tmp_path / "out", source=Source(), settings=replace(HOW, pictures=0))
    with pytest.raises(Refused, match="never on noise"):
        list(run(nothing))
    few = replace(nothing, source=Source(small.images(tmp_path / "few", 3)))
    with pytest.raises(Refused, match="3 pictures: an assessor needs 10"):
        list(run(few))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"t_signal": "luck"}, "t_signal is one of clock, noise_level"),
        ({"where": "before"}, "where is one of"),
        ({"pooling": "max"}, "pooling is one of mean, mean_std"),
        ({"pattern_head": "lotus"}, "no pattern head 'lotus'"),
        ({"prototypes": "own"}, "per_bin or shared"),
        ({"feature_similarity_weight": 0.4}, "feature_similarity_weight is 0 or absent"),
        ({"samples": 8}, "8 samples are less than one batch of 32"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, object], said: str) -> None:
    with pytest.raises(Refused, match=said):
        replace(HOW, **wrong)


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"has no report\.json: make one with recast assessor train"):
        load(tmp_path)
    (tmp_path / "report.json").write_text("{", encoding="utf-8")
    with pytest.raises(Refused, match="cannot be read"):
        load(tmp_path)


@pytest.mark.slow
def test_an_assessor_of_pocket_xl_trains_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--bins", 8, "--pictures", 20, "--samples", 1024, "--test", 512, "--steps", 60,
             "--batch", 128, "--prototypes", "shared"]  # fmt: skip
    command.run(["assessor", "train", "pocket-xl", "--out", out, *words])
    assert "of 8 bins can be believed" in capsys.readouterr().out
    command.run(["assessor", "report", out, "--json"])
    found = json.loads(capsys.readouterr().out)
    told = [each["fed"] - each["true"] for each in found["mismatch"].values()]
    assert sum(told) / len(told) > 0.2, "pooled features tell the clock"
    assert found["shuffled"]["after"] > found["shuffled"]["before"] + 0.5
