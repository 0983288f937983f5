"""What is looked at during a run: it resumes bit for bit, stops by itself, and stops a collapse."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.convert import command, small
from tests.convert.test_convert_resume import Stop

from recast.checkpoint import Checkpoint
from recast.convert import Job, run
from recast.convert.fixed import FIXED, PREVIEWS, hold_out
from recast.convert.watch import scalars, told
from recast.data.dataset import Made
from recast.errors import Diverged, Refused, Stopped
from recast.evaluate.report import load_report
from recast.evaluate.validation import Reading
from recast.events import Event, Measured, Note, Stage
from recast.recipe import Recipe, load, override
from recast.train import latest
from recast.train.plateau import IN_A_ROW, WINDOW, Pace

WATCH = {"validate_every": 1, "validate_on": 1}
PREVIEW = {"previews_every": 2, "previews": 2, "preview_steps": 2}


def recipe(home: Path, watch: dict[str, object], **train: object) -> Recipe:
    return override(small.recipe(home, "flow", **train), watch=watch)


def job(home: Path, out: Path, how: Recipe, *, images: bool = True) -> Job:
    folder = home / "images" if images else None
    return Job(home / "sdxl.safetensors", out, how, images=folder, measure=False)


@dataclass(frozen=True)
class Whole:
    out: Path
    recipe: Recipe
    told: list[Event]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """A watched run from its start to its report, and what it told."""
    how = recipe(home, WATCH | PREVIEW, ema=0.9, checkpoint_every=3)
    out = tmp_path_factory.mktemp("whole")
    return Whole(out, how, list(run(replace(job(home, out, how), measure=True))))


def test_a_watched_run_stopped_after_every_step_ends_with_the_same_bytes(
    whole: Whole, home: Path, tmp_path: Path
) -> None:
    how = whole.recipe
    broken = job(home, tmp_path / "broken", how)
    for _ in range(2):
        with pytest.raises(Stopped):
            Stop("train").follow(broken)
    small.convert(broken)
    names = (*small.NAMES, "log.jsonl", FIXED, PREVIEWS, "previews/step00000002.png")
    assert small.contents(tmp_path / "broken", names) == small.contents(whole.out, names)
    rows = lines(whole.out)
    assert [row["validation"]["step"] for row in rows] == [1, 2, 3]
    assert rows[0]["untrained"]["validation"]["step"] == 0
    assert [row["step"] for row in rows if "previews" in row] == [2, 3]
    assert {"psnr", "colours"} <= rows[1]["previews"].keys()


def test_the_report_shows_the_course_and_both_null_conditions(whole: Whole) -> None:
    assert [event.step for event in whole.told if isinstance(event, Measured)] == [1, 2, 2, 3, 3]
    report = load_report(whole.out)
    assert report.course is not None
    assert report.course.steps == (0, 1, 2, 3)
    assert [each.step for each in report.course.previews] == [2, 3]
    assert report.null is not None
    assert all(0 < level.distance < 2 for level in report.null.original)
    captions = [shot.caption for shot in report.null_shots[::2]]
    assert captions == ["empty prompt", "zeroed conditioning"]
    assert report.likeness["sharpness"] > 0
    page = (whole.out / "report.html").read_text(encoding="utf-8")
    assert "While it trained" in page
    assert "Without a prompt" in page


@pytest.mark.slow
def test_watching_does_not_change_what_is_trained(home: Path, tmp_path: Path) -> None:
    blind = recipe(home, {"validate_every": 0}, optimizer="prodigyplus", lr=1.0)
    seen = override(blind, watch=WATCH | PREVIEW)
    for name, how in (("blind", blind), ("seen", seen)):
        small.convert(job(home, tmp_path / name, how))
    one, other = (Checkpoint(tmp_path / name / "adapter.safetensors") for name in ("blind", "seen"))
    with one, other:
        assert list(one) == list(other)
        assert all(one.raw(key) == other.raw(key) for key in one)
    assert not (tmp_path / "blind" / "watch").exists()


def test_a_run_too_short_for_a_validation_prepares_none(home: Path, tmp_path: Path) -> None:
    small.convert(job(home, tmp_path, small.recipe(home)))
    assert not (tmp_path / "watch").exists()
    assert "validation" not in lines(tmp_path)[-1]


@pytest.mark.slow
def test_the_rates_of_an_open_run_and_its_end(home: Path, tmp_path: Path) -> None:
    """A tiny network's drift hardly moves: level at the first reading that can say so."""
    how = recipe(home, WATCH | {"alarm": False}, steps="auto", max_steps=40, checkpoint_every=4)
    told = list(run(job(home, tmp_path / "whole", how)))
    began = 2 * WINDOW + IN_A_ROW - 1
    pace = Pace(40, 1, "linear")
    rows = lines(tmp_path / "whole")
    assert len(rows) == pace.cooled(began)
    rates = [row["lr"] / 1e-3 for row in rows]
    assert rates == pytest.approx([pace.factor(k, began) for k in range(len(rows))])
    assert rates[began - 1] == 1.0 > rates[began + 1]
    assert Note(f"The drift has stopped falling; the run ends at step {len(rows)}.") in told
    assert Stage("cool down", len(rows), "steps", began) in told

    broken = job(home, tmp_path / "broken", how)
    for stage in ("train", "cool down"):
        with pytest.raises(Stopped):
            Stop(stage).follow(broken)
    small.convert(broken)
    names = (*small.NAMES, "log.jsonl")
    assert small.contents(tmp_path / "broken", names) == small.contents(tmp_path / "whole", names)


def test_an_open_run_needs_validations(home: Path, tmp_path: Path) -> None:
    how = recipe(home, {"validate_every": 0}, steps="auto")
    with pytest.raises(Refused, match=r"watch\.validate_every of 1"):
        small.convert(job(home, tmp_path / "run", how))
    with pytest.raises(Refused, match=r"train\.steps is 'soon'; it should be .*\"auto\""):
        override(load(), steps="soon")
    assert not (tmp_path / "run").exists()


def test_an_absurd_rate_sets_off_the_alarm_and_the_last_good_state_is_kept(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "absurd.toml"
    file.write_text(
        "[train]\nsteps = 9\nbatch = 2\nlr = 30.0\ncheckpoint_every = 1\n"
        "[watch]\nvalidate_every = 1\nvalidate_on = 1\n"
        f'[evaluate]\nsteps = 2\nprompts = "{small.prompts(home)}"\n', encoding="utf-8",
    )  # fmt: skip
    words = ["convert", home / "sdxl.safetensors", "--images", home / "images"]
    command.run([*words, "--recipe", file, "--out", tmp_path / "told"], code=4)
    said = capsys.readouterr().err
    for word in ("collapse alarm at step", "outside", "no state was good yet"):
        assert word in " ".join(said.split())
    assert latest(tmp_path / "told" / "state") is None
    assert not (tmp_path / "told" / "adapter.safetensors").exists()


def test_a_run_that_breaks_on_the_way_goes_back_to_the_last_good_state(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Healthy for five steps, then the trained weights are thrown away."""
    from recast.convert import training

    how = recipe(home, WATCH, steps=20, checkpoint_every=1)
    log = training.append

    def wreck(file: object, line: dict[str, object]) -> None:
        log(file, line)  # type: ignore[arg-type]
        if line["step"] == 5:
            for parameter in held[0].parameters():
                with torch.no_grad():
                    parameter.add_(torch.randn_like(parameter) * 50)

    held: list = []

    def learn(model, attached, *rest: object):  # type: ignore[no-untyped-def]
        held.append(attached)
        return learnt(model, attached, *rest)

    learnt = training.learn
    monkeypatch.setattr(training, "learn", learn)
    monkeypatch.setattr(training, "append", wreck)
    with pytest.raises(Diverged, match="the state of step 5 is kept"):
        small.convert(job(home, tmp_path, how))
    found = latest(tmp_path / "state")
    assert found is not None
    assert found.step == 5


def test_images_are_held_out_where_there_are_enough(home: Path) -> None:
    how = override(load(), watch={"validate_on": 2})
    fit = type("Fit", (), {"target": (64, 64)})()
    wide = type("Fit", (), {"target": (64, 96)})()
    made = [Made(None, wide if k % 5 == 0 else fit, str(k), "made") for k in range(40)]  # type: ignore[arg-type]
    made.append(Made(None, fit, "", "made", "broken"))  # type: ignore[arg-type]
    taught, held = hold_out(made, how)
    assert len(held) == 2
    assert len(taught) == len(made) - 2
    assert all(entry.fit is fit and not entry.problem for entry in held)
    assert hold_out(made, how) == (taught, held)
    assert hold_out(made[:31], how) == (made[:31], [])
    assert hold_out(made, override(how, validate_every=0)) == (made, [])


@pytest.mark.parametrize("null", [pytest.param("zero", marks=pytest.mark.slow), "both"])
@pytest.mark.parametrize("images", [True, False], ids=["images", "dreams"])
def test_captions_are_dropped_to_the_null_condition_that_is_asked_for(
    null: str, images: bool, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recast.convert import training

    seen = {"zero": 0, "empty": 0, "prompt": 0}
    made = training.checked

    def watched(draws, objective):  # type: ignore[no-untyped-def]
        for draw in made(draws, objective):
            empty = job_null(home)
            for row in draw.condition.context:
                kind = "zero" if not row.any() else "empty" if torch.equal(row, empty) else "prompt"
                seen[kind] += 1
            yield draw

    monkeypatch.setattr(training, "checked", watched)
    how = override(
        small.recipe(home, steps=4, batch=8),
        data={"null": null, "caption_dropout": 0.7, "pictures": 6},
    )
    small.convert(job(home, tmp_path, how, images=images))
    assert seen["zero"] > 0
    assert seen["prompt"] > 0
    assert (seen["empty"] > 0) == (null == "both")


def job_null(home: Path, held: list[torch.Tensor] = []) -> torch.Tensor:  # noqa: B006
    """The empty prompt's context."""
    if not held:
        from recast.model import open_model

        model = open_model(home / "sdxl.safetensors", parts=("te1", "te2"))
        with torch.no_grad():
            held.append(model.condition([""]).context[0])
    return held[0]


def test_without_the_alarm_a_reading_has_no_figures_to_tell() -> None:
    reading = Reading(3, 0.5, 0.7, (), ((0.5, 0.7),))
    assert told(reading)["drift_by_level"] == [0.5]
    assert set(scalars(reading)) == {
        "drift/average", "drift/t00", "validation/data", "validation/t00",
    }  # fmt: skip
