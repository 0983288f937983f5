"""`--pairs`: a run takes dreams that are there, and only those that are this run's kind."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tests.convert import small
from tests.convert.test_convert_refusals import refused

from recast.convert import Job
from recast.convert.pairs import read_plan
from recast.convert.sources import dream_plan
from recast.dream import PLAN, shard_path
from recast.layout import open_checkpoint
from recast.recipe import dump_toml, override


def job(home: Path, out: Path, **data: object) -> Job:
    recipe = override(small.recipe(home, "flow", steps=2), data=data)
    return Job(home / "sd15.safetensors", out, recipe, measure=False)


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that dreamt its own pairs."""
    out = tmp_path_factory.mktemp("whole")
    small.convert(job(home, out))
    return out


def learnt(out: Path) -> list[tuple[object, ...]]:
    """What a run's log says of its steps, without the clock."""
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(row["step"], row["t"], row["losses"], row["grad_norm"]) for row in rows]


def test_a_run_with_the_pairs_of_another_one_learns_the_same(
    whole: Path, home: Path, tmp_path: Path
) -> None:
    # the folder's plan counts, not what this recipe would dream of
    other = job(home, tmp_path / "run", pictures=50, replay_steps=9, guidance=7.0)
    small.convert(replace(other, pairs=whole / "pairs"))
    assert not (tmp_path / "run" / "pairs").exists()
    assert learnt(tmp_path / "run") == learnt(whole)


def test_the_plan_beside_the_pairs_is_the_plan_they_were_dreamt_by(whole: Path, home: Path) -> None:
    with open_checkpoint(home / "sd15.safetensors") as checkpoint:
        wanted = dream_plan(job(home, whole), checkpoint, "flow")
        assert read_plan(whole / "pairs") == (wanted, checkpoint.sha256(), "eps")


def words(fit: Job) -> list[object]:
    """The command of a job."""
    file = fit.out.parent / "recipe.toml"
    file.write_text(dump_toml(fit.recipe), encoding="utf-8")
    found = ["convert", fit.model, "--out", fit.out, "--recipe", file, "--pairs", fit.pairs]
    found += ["--to", fit.recipe.target.objective]
    found += [word for name in fit.via for word in ("--via", name)]
    return found + (["--images", fit.images] if fit.images else [])


def test_pairs_that_are_not_this_run_s_kind_are_refused(
    whole: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs, other = tmp_path / "pairs", tmp_path / "other"
    shutil.copytree(whole / "pairs", pairs)
    other.mkdir()
    fit = replace(job(home, tmp_path / "run"), pairs=pairs)

    def told(wrong: Job) -> str:
        given = words(wrong)
        return refused(given, tmp_path, capsys)

    stranger = small.checkpoint(other, "sd15", name="other", about="another file")
    assert "another model" in told(replace(fit, model=stranger))
    assert "from eps to flow, and this run goes from eps to v" in told(changed(fit, "target", "v"))
    assert "are of 64 pixels" in told(changed(fit, "size", 32))
    assert "give one of the two" in told(replace(fit, via=("v-zsnr",)))
    assert "leave --pairs out" in told(
        replace(changed(fit, "source", "images"), images=home / "images")
    )
    plan = json.loads((pairs / PLAN).read_text())
    (pairs / PLAN).write_text(json.dumps({**plan, "steps": 4}))
    assert "another model or plan" in told(fit)
    for broken in ("", "[]", "{}", json.dumps({**plan, "prompts": 3})):
        (pairs / PLAN).write_text(broken)
        assert "has no plan.json that can be read" in told(fit)
    (pairs / PLAN).write_text(json.dumps(plan))
    shard_path(pairs, 0).unlink()
    assert "is missing" in told(fit)


@pytest.mark.slow
def test_finished_pictures_cannot_be_replayed(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = job(home, tmp_path / "whole", source="dreams")
    small.convert(made)
    pairs = tmp_path / "whole" / "pairs"
    fit = replace(job(home, tmp_path / "run"), pairs=pairs)
    assert "no states to replay" in refused(words(fit), tmp_path / "whole", capsys)
    small.convert(replace(made, out=tmp_path / "again", pairs=pairs))
    assert learnt(tmp_path / "again") == learnt(tmp_path / "whole")


def changed(fit: Job, key: str, value: object) -> Job:
    """The job with one key of its data or its target changed."""
    section = {"target": {"objective": value}} if key == "target" else {"data": {key: value}}
    return replace(fit, recipe=override(fit.recipe, **section))
