"""Runs on a quantised base: the files are made from the original, and the same command resumes."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.convert import command, small
from tests.convert.test_convert_resume import Stop

from recast import quantise
from recast.adapter import read_adapter, rebuild
from recast.checkpoint import Checkpoint
from recast.convert import Job
from recast.errors import Stopped
from recast.layout import detect
from recast.recipe import override

needs_library = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
RUNS: dict[str, dict[str, object]] = {
    "8bit": {"rank": 2, "profile": "principal"},
    "4bit": {},
}


def job(home: Path, out: Path, base: str, *, measure: bool = False) -> Job:
    recipe = override(small.recipe(home, **RUNS[base]), base=base)
    return Job(home / "sdxl.safetensors", out, recipe, images=home / "images", measure=measure)


@needs_library
@pytest.mark.parametrize("base", ["4bit", pytest.param("8bit", marks=pytest.mark.slow)])
def test_the_quantised_weights_are_in_no_file_and_a_stopped_run_goes_on(
    base: str, home: Path, tmp_path: Path
) -> None:
    small.convert(job(home, tmp_path / "whole", base))
    broken = job(home, tmp_path / "broken", base)
    with pytest.raises(Stopped):
        Stop("train").follow(broken)
    assert not (tmp_path / "broken" / "adapter.safetensors").exists()
    small.convert(broken)
    assert small.contents(tmp_path / "broken") == small.contents(tmp_path / "whole")

    profile = f"{RUNS[base].get('profile', 'readout')},time"
    start = tmp_path / "whole" / "initial.safetensors"
    initial = read_adapter(start) if start.exists() else None
    with (
        Checkpoint(home / "sdxl.safetensors") as before,
        Checkpoint(tmp_path / "whole" / "model.safetensors") as after,
    ):
        wanted = rebuild(before, initial, read_adapter(tmp_path / "whole" / "adapter.safetensors"))
        for key, tensor in wanted:
            assert after[key].equal(tensor), key
        trained = {site.key for site in detect(before).sites(profile)}
        changed = {key for key in before if not before[key].equal(after[key])}
        assert changed
        assert changed <= trained


@needs_library
def test_the_report_says_what_was_quantised_and_how_far_off_it_is(
    home: Path, tmp_path: Path
) -> None:
    small.convert(job(home, tmp_path, "4bit", measure=True))
    facts = json.loads((tmp_path / "base.json").read_text())
    assert facts["library"].startswith("bitsandbytes ")
    assert 0.9 < facts["quantised"] / facts["numbers"] < 1
    assert 0 < facts["after"] < facts["before"]
    assert 0 < facts["forward_error"] < 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert any("Trained on a base in 4bit" in note for note in report["notes"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--base", "4bit"], "needs bitsandbytes"),
        (["--base", "2bit"], "permitted are 'full', '8bit' or '4bit'"),
    ],
)
def test_a_base_that_cannot_be_had_ends_in_one_sentence(
    words: list[str],
    said: str,
    home: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent() -> None:
        raise ModuleNotFoundError("No module named 'bitsandbytes'")

    monkeypatch.setattr(quantise, "_bitsandbytes", absent)
    out = tmp_path / "run"
    model = home / "sdxl.safetensors"
    command.run(["convert", model, "--images", home / "images", "--out", out, *words], code=2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not out.exists()
