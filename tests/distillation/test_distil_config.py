"""The config of a distillation: strict, over a preset, and what names a run."""

from pathlib import Path

import pytest

from recast.distillation.config import dump_toml, load, presets
from recast.errors import Refused

HEAD = '[run]\nmodel = "pocket-15"\nout = "runs/x"\n'
TOWARD = '[times]\ntoward = "noise"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "distil.toml"
    path.write_text(text)
    return path


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(Refused) as caught:
        load(written(tmp_path, text))
    return str(caught.value)


def test_every_preset_is_whole_but_for_what_only_the_user_knows(tmp_path: Path) -> None:
    assert presets() == ("default", "literal", "pocket")
    for name in presets():
        found = load(written(tmp_path, f'preset = "{name}"\n' + HEAD + TOWARD))
        again = load(written(tmp_path, dump_toml(found)))
        assert again == found


def test_the_presets_are_the_published_run_and_its_repairs(tmp_path: Path) -> None:
    usual = load(written(tmp_path, HEAD + TOWARD))
    how = usual.optimizer
    assert (how.lr, how.weight_decay, how.clip, how.schedule) == (1e-4, 1e-3, 1.0, "cosine")
    assert (usual.run.batch, usual.blocks.weight, usual.blocks.kd_weight) == (64, 0.05, 0.25)
    assert (usual.blocks.signals, usual.blocks.normalise) == ("relative", "sum")
    assert (usual.times.eta, usual.times.importance) == (0.2, True)
    literal = load(written(tmp_path, 'preset = "literal"\n' + HEAD + TOWARD))
    blocks, times = literal.blocks, literal.times
    assert (blocks.signals, blocks.normalise, blocks.kd) == ("literal", "none", "pooled")
    assert (blocks.weight, literal.target.kind) == (0.05, "teacher_v")
    assert (times.shift, times.bins, times.profile, times.importance) == (3.0, 100, 2500, False)


def test_mistakes_are_named_with_what_is_nearest(tmp_path: Path) -> None:
    assert "'blocks.assessor'" in refusal(tmp_path, HEAD + TOWARD + '[blocks]\nasessor = "x"\n')
    assert "the nearest is 'blocks'" in refusal(tmp_path, HEAD + TOWARD + "[block]\nweight = 1.0\n")
    assert "'uniform' or 'assessor'" in refusal(tmp_path, HEAD + TOWARD + 'sampler = "even"\n')
    assert "the nearest is 'literal'" in refusal(tmp_path, 'preset = "litteral"\n' + HEAD + TOWARD)
    assert "run.model is missing" in refusal(tmp_path, '[run]\nout = "x"\n' + TOWARD)
    assert "not valid TOML" in refusal(tmp_path, "[run\n")
    assert "blocks.assessor is empty" in refusal(tmp_path, HEAD + TOWARD + 'sampler = "assessor"\n')
    assert "swap them" in refusal(tmp_path, HEAD + TOWARD + "[blocks]\nlow = 4.0\n")
    with pytest.raises(Refused, match="cannot be read"):
        load(tmp_path / "absent.toml")


def test_the_direction_of_the_shift_has_no_default(tmp_path: Path) -> None:
    said = refusal(tmp_path, HEAD)
    assert "times.toward is missing" in said
    assert "'noise'" in said
    assert "'clean'" in said


def test_the_digest_is_of_what_the_result_depends_on(tmp_path: Path) -> None:
    one = load(written(tmp_path, HEAD + TOWARD))
    kept = load(written(tmp_path, HEAD.replace("runs/x", "runs/y") + TOWARD + "[save]\nkeep = 9\n"))
    other = load(written(tmp_path, HEAD + TOWARD + "[optimizer]\nlr = 2e-4\n"))
    assert one.digest() == kept.digest() != other.digest()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEAD, "times.toward is missing"),
        (HEAD.replace("pocket-15", "absent.safetensors") + TOWARD, "does not exist"),
        (HEAD + TOWARD + '[save]\nupload = "hf:nobody"\n', "names no repository"),
        (HEAD + TOWARD + '[run2]\nmodel = "x"\n', "no key 'run2'"),
    ],
)
def test_the_command_line_says_one_sentence_and_ends_with_two(
    text: str, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recast.cli import main

    text = text.replace("runs/x", str(tmp_path / "out"))
    with pytest.raises(SystemExit) as caught:
        main(["distill", "--config", str(written(tmp_path, text))])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert why in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_check_prints_every_key_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from recast.cli import main

    text = HEAD.replace("runs/x", str(tmp_path / "out")) + TOWARD
    with pytest.raises(SystemExit) as caught:
        main(["distill", "--check", "--config", str(written(tmp_path, text))])
    assert not caught.value.code
    said = capsys.readouterr().out
    assert load(written(tmp_path, said)) == load(written(tmp_path, text))
    assert not (tmp_path / "out").exists()
