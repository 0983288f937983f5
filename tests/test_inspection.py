"""Facts about a file, from its header alone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.checkpoint import write_dict
from recast.header import header_bytes, place
from recast.inspection import describe
from recast.layout import SDXL, Plan, blueprint
from recast.layout.generate import generate
from recast.markers import marker_specs, stamp


def hollow(path: Path, plan: Plan, objective: str = "eps", **metadata: str) -> Path:
    """A checkpoint whose data is a hole in the file: whole to the reader, no space on the disk."""
    specs = {key: ("F16", shape) for key, shape in blueprint(plan).items()}
    placed = place(specs | marker_specs(objective))
    said = stamp(metadata, objective, family=plan.family) if objective != "eps" else metadata
    head = header_bytes(placed, said)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + max(spec.end for spec in placed.values()))
    return path


def test_a_tiny_checkpoint(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "a.safetensors", "sdxl", metadata={"ss_steps": "3"})
    facts = describe(path, hashed=True)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["kind"], facts["family"], facts["full_size"]) == ("checkpoint", "sdxl", False)
    assert facts["bytes"] == path.stat().st_size
    assert sum(part["parameters"] for part in facts["components"].values()) == facts["parameters"]
    assert facts["sizes"]["unet_transformer_blocks"] == [0, 1, 2, 2]
    assert facts["objective"]["name"] == "eps"
    assert facts["provenance"]["trainer"] == {"ss_steps": "3"}
    assert (facts["missing"], facts["problems"]) == ([], [])
    assert len(facts["sha256"]) == 64


@pytest.mark.parametrize(
    ("objective", "comfy", "remedy"),
    [
        ("eps", "eps", None),
        ("v-zsnr", "v-zsnr", None),
        ("flow", "eps", "ModelSamplingSD3"),
        ("x0", "eps", "ModelSamplingDiscrete"),
    ],
)
def test_what_loaders_believe(
    tmp_path: Path, objective: str, comfy: str, remedy: str | None
) -> None:
    facts = describe(hollow(tmp_path / "a.safetensors", SDXL, objective))
    assert facts["full_size"]
    assert facts["objective"] == {**facts["objective"], "name": objective, "contradictions": []}
    believed = {entry["loader"]: entry for entry in facts["loaders"]}
    assert believed["ComfyUI"]["objective"] == comfy
    assert (remedy or "") in believed["ComfyUI"].get("note", "")
    assert ("note" in believed["diffusers"]) == (objective != "eps")


def test_contradictions_and_missing_parts_are_named(tmp_path: Path) -> None:
    said = {"modelspec.prediction_type": "v"}
    path = hollow(tmp_path / "a.safetensors", replace(tiny.XL, vae=None, te2=None), **said)
    facts = describe(path)
    assert facts["missing"] == ["vae", "te2"]
    assert "v_pred tensor is absent" in facts["objective"]["contradictions"][0]
    assert facts["provenance"]["modelspec"] == {"prediction_type": "v"}


def test_what_detection_refuses_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_dict(path, {"model.diffusion_model.double_blocks.0.w": torch.zeros(1)})
    facts = describe(path)
    assert facts["family"] is None
    assert "Flux" in facts["problems"][0]
    write_dict(path, {"x": torch.zeros(1)}, force=True)
    assert describe(path)["kind"] == "unknown"
    write_dict(path, {"decoder.conv_in.weight": torch.zeros(1)}, force=True)
    assert describe(path)["kind"] == "vae"


def test_residuals_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    generate(path, tiny.ONE, metadata={"recast.role": "residual", "recast.split": "unet=4,te1=2"})
    assert "residual" in describe(path)["problems"][0]
    assert "weights of its UNet and text encoder and" in describe(path)["problems"][0]


@pytest.mark.parametrize(
    ("names", "kind", "family", "modules"),
    [
        (["lora_te2_x.lora_up.weight", "lora_te2_x.lora_down.weight", "lora_te2_x.alpha"],
         "adapter", "sdxl", {"te2": 1}),
        (["lora_unet_down_blocks_3_x.lora_up.weight", "lora_te_x.lora_up.weight"],
         "adapter", "sd15", {"unet": 1, "te1": 1}),
        (["unet.a.b.lora_A.weight", "unet.a.b.lora_B.weight", "text_encoder.c.lora_A.weight"],
         "adapter", None, {"unet": 1, "te1": 1}),
        (["lora_unet_input_blocks_1_0_x.diff", "lora_unet_input_blocks_1_0_x.diff_b"],
         "patch", "sdxl", {"unet": 1}),
    ],
)  # fmt: skip
def test_adapters(
    tmp_path: Path, names: list[str], kind: str, family: str | None, modules: dict[str, int]
) -> None:
    path = tmp_path / "a.safetensors"
    write_dict(path, {name: torch.zeros(4, 4) for name in names})
    facts = describe(path)
    assert (facts["kind"], facts["family"], facts["modules"]) == (kind, family, modules)
    refused = any("refuses" in entry["note"] for entry in facts["loaders"])
    assert refused == (kind == "patch")


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
def test_a_file_of_real_size_takes_little_time_and_memory(tmp_path: Path) -> None:
    """6.9 GB in a fresh process; torch is never imported."""
    path = hollow(tmp_path / "a.safetensors", SDXL)
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from recast.inspection import describe\n"
        "facts = describe(sys.argv[1])\n"
        "assert 'torch' not in sys.modules and facts['bytes'] > 6.9e9\n"
        "status = open('/proc/self/status').read()\n"
        "print(time.perf_counter() - start, status.partition('VmHWM:')[2].split()[0])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    command = [sys.executable, "-c", code, str(path)]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    seconds, kilobytes = map(float, out.split())
    assert seconds < 5  # 0.3 on an idle machine; tests share theirs
    assert kilobytes < 200_000


def test_a_patch_s_fingerprint_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / "patch.safetensors"
    about = {"recast.role": "full", "recast.source": "eps"}
    about["recast.fingerprint"] = json.dumps({"version": 1, "tensors": {"a": [1, "x" * 999]}})
    write_dict(path, {"lora_unet_out_2.diff": torch.zeros(1)}, about)
    facts = describe(path)["provenance"]["recast"]
    assert facts["source"] == "eps"
    assert facts["fingerprint"] == "of its base: the UNet, and 1 tensors singly"
