"""What `inspect` says of adapters: formats, parts, ranks, alphas, and who would misread them."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor

from recast.adapter import Adapter, export, split, write_adapter
from recast.adapter_facts import grouped
from recast.checkpoint import Checkpoint
from recast.inspection import describe
from recast.layout import Layout, Site, detect
from recast.lowrank import LowRank

FORMS = {"kohya": "a.safetensors", "diffusers": "d.safetensors", "comfy": "c.safetensors",
         "peft": "peft"}  # fmt: skip


def adapter(sites: list[Site], rank: int = 4) -> Adapter:
    entries = {
        f"{site.lora}.weight": LowRank(
            torch.ones(site.shape[0], rank), torch.ones(rank, *site.shape[1:])
        )
        for site in sites
    }
    return Adapter(entries, {"recast.role": "delta"})


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of every matrix and text encoder in all four formats."""
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("lora") / request.param
    path.mkdir()
    with Checkpoint(tiny.checkpoint(path / "o.safetensors", request.param)) as original:
        layout: Layout = detect(original)
    sites = layout.sites(",".join(["all", *layout.text_parts]))
    write_adapter(path / "a.safetensors", adapter(sites))
    for form, name in FORMS.items():
        if form != "kohya":
            export(path / "a.safetensors", path / name, form, layout=layout)
    return path


def notes(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in describe(path)["loaders"]:
        found.setdefault(entry["loader"], []).append(entry["note"])
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_format_is_understood(folder: Path, form: str) -> None:
    facts = describe(folder / FORMS[form])
    assert json.loads(json.dumps(facts)) == facts
    sdxl = folder.name == "sdxl"
    texts = {"te1": 12, "te2": 18} if sdxl else {"te1": 12}
    assert (facts["kind"], facts["format"], facts["problems"]) == ("adapter", form, [])
    assert facts["modules"] == {"unet": 263 if sdxl else 281, **texts}
    assert facts["family"] == folder.name
    total = sum(facts["modules"].values())
    assert facts["ranks"] == {"4": total}
    assert facts["alphas"] == {"4": total}
    assert facts["kinds"]["low-rank convolution"] >= 20
    assert sum(facts["kinds"].values()) == total
    if form == "kohya":
        assert facts["loaders"] == []


def test_who_does_not_know_the_names(folder: Path) -> None:
    attention = sum(".to_" in key for key in load_file(folder / "d.safetensors")) // 2
    said = notes(folder / "d.safetensors")["ComfyUI"][0]
    assert f"does not know {attention} attention layers of the UNet" in said
    assert "ComfyUI's names" in notes(folder / "c.safetensors")["diffusers, kohya's tools"][0]
    assert "PEFT" in notes(folder / "peft")["ComfyUI, A1111, kohya's tools, load_lora_weights"][0]


def changed(folder: Path, tmp_path: Path, change: dict[str, Tensor | None]) -> Path:
    file = load_file(folder / "a.safetensors") | change
    save_file({k: v for k, v in file.items() if v is not None}, tmp_path / "b.safetensors")
    return tmp_path / "b.safetensors"


def test_alphas_that_diffusers_misreads(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "a.safetensors")
    alphas = [key for key in file if key.endswith(".alpha")]
    path = changed(folder, tmp_path, dict.fromkeys(alphas, None))
    assert describe(path)["alphas"] == {"none": len(alphas)}
    assert "scale 1" in notes(path)["all"][0]
    some: dict[str, Tensor | None] = {
        key: torch.tensor(2.0, dtype=torch.bfloat16) for key in alphas
    }
    path = changed(folder, tmp_path, some | {alphas[0]: None})
    assert describe(path)["alphas"] == {"2": len(alphas) - 1, "none": 1}
    assert "gives the 1 layers of the UNet without alpha" in notes(path)["diffusers"][0]
    path = changed(folder, tmp_path, {alphas[0]: torch.tensor([2.0])})
    assert "commonest of 2 alphas, 4" in notes(path)["diffusers"][0]


def test_text_attention_without_out_proj(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "a.safetensors")
    out = dict.fromkeys((key for key in file if "out_proj" in key), None)
    path = changed(folder, tmp_path, dict(out))
    assert "drops 6 attention layers of the text encoder" in notes(path)["diffusers"][0]
    mlp = dict.fromkeys((key for key in file if "_mlp_" in key), None)
    path = changed(folder, tmp_path, dict(out) | dict(mlp))
    assert "refuses the file for the text encoder" in notes(path)["diffusers"][0]


def test_entries_that_are_no_plain_factors(folder: Path, tmp_path: Path) -> None:
    file = load_file(folder / "a.safetensors")
    lora = next(key for key in file if file[key].ndim == 4 and "down" in key).partition(".")[0]
    path = changed(folder, tmp_path, {
        f"{lora}.lora_mid.weight": torch.ones(4, 4, 3, 3),
        f"{lora}.dora_scale": torch.ones(4),
        "lora_unet_x.diff": torch.ones(4), "lora_unet_y.w_norm": torch.ones(4),
        "lora_unet_z.diff": torch.ones(4, 4), "lora_unet_z.diff_b": torch.ones(4),
        "lora_unet_h.hada_w1_a": torch.ones(4, 4), "lora_unet_i.lora_up.weight": torch.ones(4, 4),
        "what.is.this": torch.ones(1), "lora_transformer_x.diff_b": torch.ones(4),
    })  # fmt: skip
    facts, said = describe(path), notes(path)
    wanted = {"Tucker": 1, "DoRA": 1, "norm": 2, "full weight": 1, "LoHa": 1, "bias alone": 1}
    assert wanted.items() <= facts["kinds"].items()
    assert [note.partition(":")[0] for note in said["diffusers"]] == [
        "refuses the file", "refuses the file", "drops dora_scale of 1 layers, so pictures differ",
    ]  # fmt: skip
    assert "1 are .diff" in said["LyCORIS"][0]
    assert "b_norm" in said["A1111, Forge"][0]
    assert "LoHa" in said["diffusers, kohya's networks.lora"][0]
    problems = " ".join(facts["problems"])
    for word in ("what.is.this", "first lora_unet_i", "first lora_transformer_x", "DoRA, LoHa"):
        assert word in problems


def test_several_ranks_and_roles(tmp_path: Path) -> None:
    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors", "sd15")) as original:
        sites = detect(original).sites("principal")
        split(original, sites, ["3", "conv=2"], tmp_path)
    said = notes(tmp_path / "adapter.safetensors")
    assert "residual" in said["all"][0]
    assert "ranks 2 to 3" in said["kohya's trainer"][0]
    assert set(describe(tmp_path / "adapter.safetensors")["ranks"]) == {"2", "3"}
    problem = describe(tmp_path / "residual.safetensors")["problems"][0]
    assert "weights of its UNet and" in problem


def test_many_ranks_are_grouped() -> None:
    assert grouped(Counter({64: 3, 4: 2})) == {"4": 2, "64": 3}
    assert grouped(Counter(range(1, 18))) == {
        "1": 1, "2": 1, "3 to 4": 2, "5 to 8": 4, "9 to 16": 8, "17 to 32": 1,
    }  # fmt: skip


def test_a_broken_peft_folder_is_a_problem(folder: Path, tmp_path: Path) -> None:
    source = folder / "peft" / "unet"
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes((source / "adapter_model.safetensors").read_bytes())
    assert "not beside it" in describe(path)["problems"][0]


def test_a_large_file_takes_under_a_second_and_no_torch(tmp_path: Path) -> None:
    """788 modules with their alphas, in a fresh process."""
    file = {}
    for n in range(788):
        name = f"lora_unet_input_blocks_4_1_transformer_blocks_{n}_attn1_to_q"
        file |= {f"{name}.lora_up.weight": torch.zeros(8, 2), f"{name}.alpha": torch.tensor(2.0),
                 f"{name}.lora_down.weight": torch.zeros(2, 8)}  # fmt: skip
    save_file(file, tmp_path / "a.safetensors")
    code = (
        "import sys, time; start = time.process_time()\n"
        "from recast.inspection import describe\n"
        "facts = describe(sys.argv[1])\n"
        "assert 'torch' not in sys.modules and facts['alphas'] == {'2': 788}\n"
        "print(time.process_time() - start)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-c", code, str(tmp_path / "a.safetensors")]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    assert float(out) < 1
