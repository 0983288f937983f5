"""LyCORIS, PEFT and diffusers load our files and the networks answer as ours do, at 1e-5."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.adapter.loaders import answer, by_diffusers, by_lycoris, by_peft, change, network
from torch import Tensor

from recast import pocket
from recast.adapter import Adapter, attach, export, write_adapter
from recast.checkpoint import Checkpoint
from recast.layout import Layout, Site, detect
from recast.model.folder import write_config_folder

CASES = [
    "tiny-sdxl",
    "tiny-sd15",
    pytest.param("pocket-xl", marks=pytest.mark.slow),
    pytest.param("pocket-15", marks=pytest.mark.slow),
]
FILES = {"lycoris": "a.safetensors", "kohya": "a.safetensors", "peft": "peft",
         "diffusers": "d.safetensors", "comfy": "c.safetensors"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint, an adapter of all its matrices in every format, and our answers with it."""

    checkpoint: Checkpoint
    layout: Layout
    sites: list[Site]
    folder: Path
    ours: dict[str, Tensor]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("loaders")
    size, _, family = request.param.partition("-")
    path = pocket.path(request.param) if size == "pocket" else None
    path = path or tiny.checkpoint(folder / "o.safetensors", family)
    with Checkpoint(path) as checkpoint:
        layout = detect(checkpoint)
        sites = layout.sites(",".join(["all", *layout.text_parts]))
        adapter = change(checkpoint, sites)
        write_adapter(folder / "a.safetensors", adapter)
        for form in ("peft", "diffusers", "comfy"):
            export(folder / "a.safetensors", folder / FILES[form], form, layout=layout)
        ours = {}
        for part in ("unet", *layout.text_parts):
            net = network(checkpoint, part)
            before = answer(net, layout, part)
            mine = [site for site in sites if site.part == part]
            entries = {f"{s.lora}.weight": adapter.entries[f"{s.lora}.weight"] for s in mine}
            attach({part: net}, Adapter(entries, adapter.metadata), mine)
            ours[part] = answer(net, layout, part)
            assert (ours[part] - before).norm() > 0.1 * before.norm()
        yield Case(checkpoint, layout, sites, folder, ours)


@pytest.mark.parametrize("tool", ["lycoris", "peft", "kohya", "diffusers"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_other_loaders_answer_as_we_do(case: Case, tool: str) -> None:
    """kohya: diffusers' reader for kohya's names; diffusers: for its own."""
    file = case.folder / FILES[tool]
    for part, ours in case.ours.items():
        net = network(case.checkpoint, part)
        if tool == "lycoris":
            count = by_lycoris(net, file, part, case.sites)
        elif tool == "peft":
            net, count = by_peft(net, file, part)
        else:
            count = by_diffusers(net, file, part, case.layout.family)
        assert count == sum(site.part == part for site in case.sites)
        off = (answer(net, case.layout, part) - ours).norm() / ours.norm()
        assert off < 1e-5, (part, float(off))


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_round_trip_gives_the_same_tensors(
    case: Case, tmp_path: Path, alpha: float | None
) -> None:
    """kohya, PEFT, diffusers, ComfyUI and back, with our alphas and with another trainer's."""
    before = load_file(case.folder / "a.safetensors")
    if alpha is not None:
        before |= {key: torch.tensor(alpha) for key in before if key.endswith(".alpha")}
    save_file(before, tmp_path / "k.safetensors")
    names = ["k.safetensors", "peft", "d.safetensors", "c.safetensors", "again.safetensors"]
    forms = ["peft", "diffusers", "comfy", "kohya"]
    for form, source, target in zip(forms, names, names[1:], strict=False):
        export(tmp_path / source, tmp_path / target, form, layout=case.layout)
    after = load_file(tmp_path / "again.safetensors")
    assert after.keys() == before.keys()
    assert len(after) == 3 * len(case.sites)
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket-xl", "pocket-15"])
@pytest.mark.filterwarnings("ignore")
def test_a_diffusers_pipeline_loads_the_files(name: str, tmp_path: Path) -> None:
    """load_lora_weights as users call it, on the single file beside its configuration folder."""
    import diffusers

    torch.set_num_threads(1)
    with Checkpoint(pocket.path(name)) as checkpoint:
        layout = detect(checkpoint)
        write_config_folder(layout, tmp_path / "diffusers")
        sites = layout.sites(",".join(["all", *layout.text_parts]))
        adapter = change(checkpoint, sites)
        parts = {p: network(checkpoint, p) for p in ("unet", *layout.text_parts)}
    write_adapter(tmp_path / "k.safetensors", adapter)
    export(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers", layout=layout)
    attach(parts, adapter, sites)
    ours = {part: answer(net, layout, part) for part, net in parts.items()}
    cls = diffusers.StableDiffusionPipeline
    if layout.family == "sdxl":
        cls = diffusers.StableDiffusionXLPipeline
    pipe = cls.from_single_file(
        str(pocket.path(name)), config=str(tmp_path / "diffusers"), local_files_only=True,
        torch_dtype=torch.float32,
    )  # fmt: skip
    loaded = {"unet": pipe.unet, "te1": pipe.text_encoder}
    if "te2" in parts:
        loaded["te2"] = pipe.text_encoder_2
    for file in ("k.safetensors", "d.safetensors"):
        pipe.load_lora_weights(str(tmp_path), weight_name=file)
        for part, net in loaded.items():
            off = (answer(net, layout, part) - ours[part]).norm() / ours[part].norm()
            assert off < 1e-5, (file, part, float(off))
        pipe.unload_lora_weights()
        off = (answer(pipe.unet, layout, "unet") - ours["unet"]).norm() / ours["unet"].norm()
        assert off > 1e-2
