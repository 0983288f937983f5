"""How far weights moved over the saved steps of a run."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from recast.adapter import Adapter, decompose, read_adapter, write_adapter
from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.layout import detect
from recast.lowrank import LowRank

NAMES = ("lora_unet_output_blocks_1_1_proj_in", "lora_unet_input_blocks_4_1_proj_in",
         "lora_te1_text_model_encoder_layers_0_mlp_fc1")  # fmt: skip


def adapter(size: float, seed: int = 0) -> Adapter:
    made = torch.Generator().manual_seed(seed)
    entries = {f"{name}.weight": LowRank(size * torch.randn(6, 2, generator=made),
                                         torch.randn(2, 5, generator=made))
               for name in NAMES}  # fmt: skip
    return Adapter(dict(entries), {"recast.role": "delta"})


def recast(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    with pytest.raises(SystemExit) as left:
        main([*map(str, words), "--json"])
    assert not left.value.code, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_norms_are_those_of_the_dense_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With alphas other than the rank, in the steps' order, since the start and step by step."""
    (tmp_path / "saved").mkdir()
    for step in (10, 100, 20):
        path = tmp_path / "saved" / f"step{step:08d}.safetensors"
        write_adapter(path, adapter(step / 10, seed=step))
        tensors = load_file(path)
        tensors |= {key: torch.tensor(1.0) for key in tensors if key.endswith("alpha")}
        save_file(tensors, path)
    files = [tmp_path / f"saved/step{step:08d}.safetensors" for step in (10, 20, 100)]
    dense = [
        {name.partition(".")[0]: e.dense().double() for name, e in read_adapter(f).entries.items()}
        for f in files
    ]
    seen = recast(capsys, "track", tmp_path, "--out", tmp_path / "change.png")
    assert seen["steps"] == [10, 20, 100]
    assert list(seen["blocks"]) == ["TE1.L00", "IN04", "OUT01"]
    for name in NAMES:
        wanted = [found[name].norm().item() for found in dense]
        assert seen["modules"][name] == pytest.approx(wanted, rel=1e-6)
    assert seen["blocks"]["OUT01"] == seen["modules"][NAMES[0]]
    assert (tmp_path / "change.png").read_bytes().startswith(b"\x89PNG")
    seen = recast(capsys, "track", tmp_path, "--each")
    assert seen["steps"] == [20, 100]
    wanted = [(b[NAMES[0]] - a[NAMES[0]]).norm().item() for a, b in pairwise(dense)]
    assert seen["modules"][NAMES[0]] == pytest.approx(wanted, rel=1e-5)


def test_a_principal_run_is_measured_from_its_initial_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And relative to the weights of the model, where that is given."""
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors")) as original:
        sites = [site for site in detect(original).sites("principal") if site.block == "OUT04"]
        start = decompose(original, sites, 2)
        weights = {site.lora: original[site.key].float() for site in sites}
    write_adapter(tmp_path / "initial.safetensors", start)
    about = {**start.metadata, "recast.role": "pissa-trained"}
    for step in (1, 2):
        moved = {n: LowRank(e.up + 0.01 * step, e.down) for n, e in start.entries.items()
                 if isinstance(e, LowRank)}  # fmt: skip
        write_adapter(tmp_path / f"s-{step}.safetensors", Adapter(dict(moved), about))
    words = ["track", tmp_path, "--model", tmp_path / "o.safetensors"]
    (tmp_path / "saved").mkdir()
    for step in (1, 2):
        (tmp_path / f"s-{step}.safetensors").rename(tmp_path / f"saved/s-{step}.safetensors")
    seen = recast(capsys, *words)
    for name, entry in start.entries.items():
        lora = name.removesuffix(".weight")
        wanted = [
            (0.01 * k * torch.ones_like(entry.up) @ entry.down.flatten(1)).norm() for k in (1, 2)
        ]
        assert seen["modules"][lora] == pytest.approx([float(w) for w in wanted], rel=1e-3)
    whole = sum(weight.square().sum().item() for weight in weights.values()) ** 0.5
    assert seen["relative"]["OUT04"] == pytest.approx(seen["blocks"]["OUT04"][-1] / whole, rel=1e-4)
    with pytest.raises(SystemExit) as left:
        main(
            [
                "track",
                str(tmp_path / "saved/s-1.safetensors"),
                str(tmp_path / "saved/s-2.safetensors"),
            ]
        )
    assert left.value.code == 2
    assert "--initial" in capsys.readouterr().err


def test_mistakes_end_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    write_adapter(tmp_path / "a-1.safetensors", adapter(1))
    write_adapter(tmp_path / "b-1.safetensors", adapter(1))
    write_adapter(tmp_path / "plain.safetensors", adapter(1))
    few = Adapter(dict(list(adapter(1).entries.items())[:2]), {})
    write_adapter(tmp_path / "c-2.safetensors", few)
    for names, said in (
        (["empty"], "no adapter with a step"),
        (["a-1.safetensors"], "show no change"),
        (["a-1.safetensors", "b-1.safetensors"], "both of step 1"),
        (["a-1.safetensors", "plain.safetensors"], "says no step"),
        (["a-1.safetensors", "c-2.safetensors"], "has other modules"),
    ):
        with pytest.raises(SystemExit) as left:
            main(
                [
                    "track",
                    *(str(tmp_path / name) for name in names),
                    "--out",
                    str(tmp_path / "x.png"),
                ]
            )
        assert left.value.code == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "x.png").exists()
