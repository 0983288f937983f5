"""The adapter verbs from the command line to files on disk."""

import json
import re
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.adapter import Adapter, decompose, read_adapter, write_adapter, write_rebuilt
from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.layout import detect
from recast.lowrank import LowRank


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with an original, an initial and a trained adapter, and a tuned checkpoint."""
    torch.set_num_threads(1)
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors")) as original:
        sites = [s for s in detect(original).sites("principal") if s.block in ("OUT04", "OUT05")]
        start = decompose(original, sites, 2)
        entries = {
            name: LowRank(entry.up + 0.01, entry.down)
            for name, entry in start.entries.items()
            if isinstance(entry, LowRank)
        }
        about = {**start.metadata, "recast.role": "pissa-trained"}
        write_adapter(tmp_path / "initial.safetensors", start)
        write_adapter(tmp_path / "trained.safetensors", Adapter(entries, about))
        read = [read_adapter(tmp_path / f"{n}.safetensors") for n in ("initial", "trained")]
        write_rebuilt(original, *read, tmp_path / "tuned.safetensors")
    return tmp_path


def recast(capsys: pytest.CaptureFixture[str], *words: object) -> object:
    with pytest.raises(SystemExit) as left:
        main([*map(str, words), "--json"])
    assert not left.value.code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_extract_from_a_run_and_from_two_files_agree(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = recast(
        capsys,
        "extract",
        run / "o.safetensors",
        "--initial",
        run / "initial.safetensors",
        "--trained",
        run / "trained.safetensors",
        "--out",
        run / "a",
        "--dtype",
        "fp32",
    )
    b = recast(
        capsys,
        "extract",
        run / "o.safetensors",
        "--tuned",
        run / "tuned.safetensors",
        "--rank",
        "energy:0.9999",
        "--out",
        run / "b",
        "--dtype",
        "fp32",
    )
    assert isinstance(a, dict)
    assert isinstance(b, dict)
    assert a["relative_error"] == 0
    assert b["relative_error"] < 2e-2
    assert a["modules"] == b["modules"] > 10
    first, second = read_adapter(run / "a").entries, read_adapter(run / "b").entries
    for name, entry in first.items():
        gap = (entry.dense() - second[name].dense()).norm() / entry.dense().norm()
        assert gap < 3e-2


def test_export_and_dry_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run / "o.safetensors"
    files = recast(
        capsys,
        "export",
        run / "trained.safetensors",
        "--to",
        "peft",
        "--out",
        run / "peft",
        "--model",
        model,
    )
    assert isinstance(files, list)
    assert [Path(f).name for f in files] == ["adapter_model.safetensors", "adapter_config.json"]
    seen = recast(
        capsys,
        "split",
        model,
        "--rank",
        "4",
        "--rank",
        "conv=2",
        "--dry-run",
        "--out",
        run / "split",
        "--resolution",
        "64",
    )
    assert isinstance(seen, dict)
    assert seen["blocks"][-1]["ranks"] == [2, 4]
    trunks = [seen["memory_bytes"][base]["trunk"] for base in ("full", "8bit", "4bit")]
    assert trunks == sorted(trunks, reverse=True)
    assert (seen["resolution"], seen["batch"]) == (64, 1)
    assert not (run / "split").exists()
    words = ["--rank", "2", "--profile", "OUT01", "--dry-run"]
    seen = recast(capsys, "split", model, *words)
    assert [row["block"] for row in seen["blocks"]] == ["OUT01", "all"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["extract", "MODEL", "--out", "x"], "give either --trained"),
        (["extract", "MODEL", "--out", "MODEL", "--tuned", "y"], "also the source"),
        (
            ["extract", "MODEL", "--out", "x", "--tuned", "y", "--parts", "vae"],
            "does not exist|vae",
        ),
        (["export", "MODEL", "--to", "kohya", "--out", "x"], "no adapter entry"),
        (["split", "MODEL", "--out", "x", "--rank", "-3"], "at least 1"),
        (["split", "MODEL"], "give --out, or --dry-run"),
    ],
)
def test_mistakes_end_in_one_sentence(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:

    names = {"MODEL": str(run / "o.safetensors"), "x": str(run / "x")}
    with pytest.raises(SystemExit) as left:
        main([names.get(word, word) for word in words])
    error = capsys.readouterr().err
    assert left.value.code == 2, error
    assert re.search(message, error)
    assert not (run / "x").exists()


def test_verify_asks_for_answers_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.checkpoint(run / "m.safetensors", dtype="F16", vocabulary=49408)
    recast(capsys, "split", model, "--rank", "4", "--out", run / "split")
    files = ["--residual", run / "split/residual.safetensors",
             "--adapter", run / "split/adapter.safetensors"]  # fmt: skip
    seen = recast(capsys, "verify", model, *files, "--level", "2")
    assert isinstance(seen, dict)
    assert seen["verdict"] == "passed"
    assert 0 < seen["answers"]["output"] < 1e-2


def test_a_peft_folder_rebuilds_and_a_split_text_encoder_is_noted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run / "o.safetensors"
    words = ["extract", model, "--initial", run / "initial.safetensors", "--trained"]
    recast(capsys, *words, run / "trained.safetensors", "--out", run / "a", "--dtype", "fp32")
    recast(capsys, "export", run / "a", "--to", "peft", "--out", run / "peft", "--model", model)
    for name in ("a", "peft"):
        out = run / f"{name}.safetensors"
        recast(capsys, "rebuild", model, "--trained", run / name, "--out", out)
    with Checkpoint(run / "a.safetensors") as a, Checkpoint(run / "peft.safetensors") as b:
        assert all(a.raw(key) == b.raw(key) for key in a.specs)
    for profile, noted in (("kohya-conv,te1", True), ("lycoris-full", False)):
        made = recast(
            capsys, "split", model, "--rank", "1", "--out", run / profile, "--profile", profile
        )
        assert isinstance(made, dict)
        assert ("captions" in (made["note"] or "")) == noted
