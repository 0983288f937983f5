"""resize and slice from the command line to files on disk."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from recast.cli import main

NAMES = (
    "lora_unet_input_blocks_8_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q",
    "lora_unet_output_blocks_1_1_transformer_blocks_0_ff_net_2",
    "lora_te1_text_model_encoder_layers_3_mlp_fc1",
)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    made = torch.Generator().manual_seed(0)
    found = {}
    for name in NAMES:
        found[f"{name}.lora_up.weight"] = torch.randn(40, 8, generator=made).half()
        found[f"{name}.lora_down.weight"] = torch.randn(8, 30, generator=made).half()
    save_file(found, tmp_path / "lora.safetensors")  # without metadata and alpha
    return tmp_path / "lora.safetensors"


def recast(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    with pytest.raises(SystemExit) as left:
        main([*map(str, words), "--json"])
    assert not left.value.code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one sentence of a mistake, with exit code 2."""
    with pytest.raises(SystemExit) as left:
        main(list(map(str, words)))
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_resize_to_a_rank(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (facts,) = recast(capsys, "resize", lora, "--rank", 2, "--out", tmp_path / "o.safetensors")
    assert (facts["modules"], facts["ranks"], facts["vanished"]) == (4, "2", 0)
    assert facts["bytes"] == (tmp_path / "o.safetensors").stat().st_size
    assert 0.3 < facts["relative_error"] < 1
    assert load_file(tmp_path / "o.safetensors")[f"{NAMES[0]}.lora_down.weight"].shape == (2, 30)


def test_several_recipes_fill_a_folder(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    facts = recast(
        capsys, "resize", lora, "--recipe", "params,thr=-0.4:spn_lora,size=0.01", "--out", out
    )
    names = ["lora-params-thr-0.4.safetensors", "lora-spn_lora-size0.01.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [Path(each["files"][0]).name for each in facts] == names
    assert facts[1]["bytes"] <= 0.01 * 2**20


def test_slice_and_join(lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    style, rest = tmp_path / "style.safetensors", tmp_path / "rest.safetensors"
    facts = recast(capsys, "slice", lora, "--trait", "style", "--strength", 0.5, "--out", style)
    assert facts["modules"] == {str(lora): 1}
    recast(capsys, "slice", lora, "--drop", "*output_blocks_1_*attn*", "--out", rest)
    both = tmp_path / "both.safetensors"
    assert recast(capsys, "slice", style, rest, "--out", both)["modules"] == {
        str(style): 1,
        str(rest): 3,
    }
    before, after = load_file(lora), load_file(both)
    assert before.keys() == after.keys()
    assert torch.equal(
        after[f"{NAMES[1]}.lora_up.weight"], before[f"{NAMES[1]}.lora_up.weight"] * 0.5
    )
    assert torch.equal(after[f"{NAMES[2]}.lora_up.weight"], before[f"{NAMES[2]}.lora_up.weight"])
    split = recast(capsys, "slice", lora, "--split", "--out", tmp_path / "parts")
    assert [Path(file).name for file in split["files"]] == ["unet.safetensors", "te1.safetensors"]


def test_a_trait_for_each_file_in_order(
    lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other.safetensors", tmp_path / "o.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(lora).items()}, other)
    recast(capsys, "slice", lora, other, "--trait", "layout", "--trait", "te", "--out", out)
    after = load_file(out)
    wanted = {0: load_file(lora), 3: load_file(other)}
    assert {key.partition(".")[0] for key in after} == {NAMES[0], NAMES[3]}
    for place, source in wanted.items():
        key = f"{NAMES[place]}.lora_up.weight"
        assert torch.equal(after[key], source[key])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("resize", "LORA"), "--rank, --rule or --recipe"),
        (("resize", "LORA", "--rank", "0"), "at least 1"),
        (("resize", "LORA", "--rule", "sv_max=3"), "sv_ratio=NUMBER"),
        (("resize", "LORA", "--rank", "4", "--recipe", "params,thr=1"), "leave out --rank"),
        (("resize", "LORA", "--recipe", "fro_ckpt=1,thr=-3.5"), "--model"),
        (("resize", "LORA", "--recipe", "params,thr=99"), "nothing is left"),
        (("resize", "LORA", "--recipe", "params,size=0.001"), "not one direction fits"),
        (("resize", "LORA", "--rank", "4", "--to", "onnx"), "no adapter format"),
        (("resize", "LORA", "--rank", "4", "--like-kohya"), "--like-kohya is about --rule"),
        (("slice", "LORA", "--trait", "stile"), "did you mean style"),
        (("slice", "LORA", "--keep", "nothing*"), "none of its 4 modules"),
        (("slice", "LORA", "LORA"), "both hold"),
        (("slice", "LORA", *("--strength", "1") * 3), "3 times"),
        (("slice", "LORA", "--split", "--te", "LORA"), "leave out --te"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_and_writes_nothing(
    words: tuple[str, ...],
    said: str,
    lora: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(lora) if word == "LORA" else word for word in words]
    told = refused(capsys, *given, "--out", tmp_path / "o.safetensors")
    assert said in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]
