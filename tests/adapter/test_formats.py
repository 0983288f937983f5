"""The four formats of adapter files: what is read, kept and refused."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.adapter.loaders import by_diffusers, network
from torch import Tensor, nn

from recast.adapter import Adapter, export, read_adapter, write_adapter
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Layout, Site, detect
from recast.lowrank import Full, LowRank

FAMILIES = ["sdxl", "sd15"]


def values(*shape: int, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def change(sites: list[Site], rank: int = 4) -> Adapter:
    entries: dict[str, LowRank | Full] = {}
    for seed, site in enumerate(sites):
        out, into, *kernel = site.shape
        entries[f"{site.lora}.weight"] = LowRank(
            values(out, rank, seed=seed), values(rank, into, *kernel, seed=-seed)
        )
    return Adapter(entries, {"recast.role": "delta"})


def matrices(layout: Layout) -> list[Site]:
    return layout.sites(",".join(["all", *layout.text_parts]))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Checkpoint]]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    files = {f: Checkpoint(tiny.checkpoint(folder / f"{f}.safetensors", f)) for f in FAMILIES}
    yield files
    for file in files.values():
        file.close()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def same(a: Path, b: Path) -> None:
    before, after = load_file(a), load_file(b)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key], tensor), key


def round_trip(layout: Layout, start: Path, folder: Path) -> Path:
    export(start, folder / "peft", "peft", layout=layout)
    export(folder / "peft", folder / "d.safetensors", "diffusers", layout=layout)
    export(folder / "d.safetensors", folder / "c.safetensors", "comfy", layout=layout)
    export(folder / "c.safetensors", folder / "k.safetensors", "kohya", layout=layout)
    return folder / "k.safetensors"


def test_round_trip_through_all_formats_keeps_the_dtype(
    originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    layout = detect(originals["sdxl"])
    write_adapter(tmp_path / "a.safetensors", change(matrices(layout)), dtype="BF16")
    end = round_trip(layout, tmp_path / "a.safetensors", tmp_path)
    same(tmp_path / "a.safetensors", end)
    with safe_open(end, "pt") as file, safe_open(tmp_path / "d.safetensors", "pt") as between:
        about = file.metadata()
        assert about["recast.role"] == "delta"
        stale = [key for key in between.metadata() if key.startswith("sshs_")]
        assert stale == []
        length = int.from_bytes(end.read_bytes()[:8], "little")
        section = end.read_bytes()[8 + length :]
        assert about["sshs_model_hash"] == hashlib.sha256(section).hexdigest()


def test_another_trainers_alpha_comes_back(
    originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    layout = detect(originals["sdxl"])
    write_adapter(tmp_path / "a.safetensors", change(matrices(layout)))
    file = load_file(tmp_path / "a.safetensors")
    for key in file:
        if key.endswith(".alpha"):
            file[key] = torch.tensor(1.0)
    save_file(file, tmp_path / "b.safetensors")
    same(tmp_path / "b.safetensors", round_trip(layout, tmp_path / "b.safetensors", tmp_path))
    config = json.loads((tmp_path / "peft" / "unet" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 1)
    plain = load_file(tmp_path / "d.safetensors")
    assert not [key for key in plain if "alpha" in key]


def test_mixed_ranks_and_alphas_keep_their_meaning(
    originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    layout = detect(originals["sd15"])
    sites = matrices(layout)
    mixed = Adapter({**change(sites, 4).entries, **change(sites[:40:3], 8).entries},
                    {"recast.role": "delta"})  # fmt: skip
    write_adapter(tmp_path / "a.safetensors", mixed)
    file = load_file(tmp_path / "a.safetensors")
    odd = next(iter(file)).partition(".")[0]
    file[f"{odd}.alpha"] = torch.tensor(2.0)
    save_file(file, tmp_path / "b.safetensors")
    end = round_trip(layout, tmp_path / "b.safetensors", tmp_path)
    alphas = {v.item() for k, v in load_file(end).items() if k.endswith(".alpha")}
    assert len(alphas) == 1
    wanted = read_adapter(tmp_path / "b.safetensors").entries
    for path in (tmp_path / "peft", tmp_path / "d.safetensors", tmp_path / "c.safetensors", end):
        found = read_adapter(path, layout).entries
        assert found.keys() == wanted.keys()
        for name, entry in wanted.items():
            torch.testing.assert_close(found[name].dense(), entry.dense())
    export(end, tmp_path / "even.safetensors", "kohya", padded=True)
    even = read_adapter(tmp_path / "even.safetensors").entries
    assert {entry.rank for entry in even.values() if isinstance(entry, LowRank)} == {8}
    for name, entry in wanted.items():
        torch.testing.assert_close(even[name].dense(), entry.dense())


def test_attention_of_a_text_encoder_is_never_written_without_out_proj(
    originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    layout = detect(originals["sdxl"])
    sites = [s for s in layout.sites("te1,te2") if "out_proj" not in s.module]
    adapter = change(sites)
    write_adapter(tmp_path / "a.safetensors", adapter)
    for form in ("diffusers", "kohya"):
        out = tmp_path / f"{form}.safetensors"
        export(tmp_path / "a.safetensors", out, form, layout=layout)
        found = read_adapter(out, layout).entries
        added = found.keys() - adapter.entries.keys()
        assert len(added) == layout.plan.te1.layers + layout.plan.te2.layers
        assert not any(found[name].dense().any() for name in added)
    for form in ("diffusers", "kohya"):
        net = network(originals["sdxl"], "te1")
        count = by_diffusers(net, tmp_path / f"{form}.safetensors", "te1", "sdxl")
        assert count == 6 * layout.plan.te1.layers


def test_tucker_is_multiplied_out(originals: dict[str, Checkpoint], tmp_path: Path) -> None:
    from lycoris.modules import get_module, make_module

    site = next(s for s in detect(originals["sdxl"]).sites("all") if s.shape[2:] == (3, 3))
    out, into = site.shape[:2]
    file = {
        "lora_up.weight": values(out, 5, 1, 1), "lora_mid.weight": values(5, 5, 3, 3, seed=1),
        "lora_down.weight": values(5, into, 1, 1, seed=2), "alpha": torch.tensor(2.0),
    }  # fmt: skip
    named = {f"{site.lora}.{key}": tensor for key, tensor in file.items()}
    save_file(named, tmp_path / "t.safetensors")
    kind, parts = get_module(named, site.lora)
    base = nn.Conv2d(into, out, 3, bias=False)
    theirs = make_module(kind, parts, site.lora, base).get_diff_weight(1)[0].detach()
    ours = read_adapter(tmp_path / "t.safetensors").entries[f"{site.lora}.weight"]
    torch.testing.assert_close(ours.dense(), theirs, atol=1e-6, rtol=1e-5)
    export(tmp_path / "t.safetensors", tmp_path / "k.safetensors", "kohya")
    plain = load_file(tmp_path / "k.safetensors")
    assert plain[f"{site.lora}.lora_down.weight"].shape == (5, into, 3, 3)
    again = read_adapter(tmp_path / "k.safetensors").entries[f"{site.lora}.weight"]
    assert torch.equal(again.dense(), ours.dense())


def test_other_spellings_of_the_field(originals: dict[str, Checkpoint], tmp_path: Path) -> None:
    layout = detect(originals["sdxl"])
    up, down = values(64, 4), values(4, 64, seed=1)
    lora = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_out_0"
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1"
    spellings = [
        (f"unet.{path}.processor.to_out_lora.up.weight",
         f"unet.{path}.processor.to_out_lora.down.weight"),
        (f"unet.{path}.to_out.0.lora.up.weight", f"unet.{path}.to_out.0.lora.down.weight"),
        (f"{path}.to_out.0.lora_B.default.weight", f"{path}.to_out.0.lora_A.default.weight"),
        (f"lora_unet_{path.replace('.', '_')}_to_out_0.lora_up.weight",
         f"lora_unet_{path.replace('.', '_')}_to_out_0.lora_down.weight"),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_up.weight",
         "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_out.0.lora_down.weight"),
    ]  # fmt: skip
    for names in spellings:
        save_file(dict(zip(names, (up, down), strict=True)), tmp_path / "a.safetensors")
        found = read_adapter(tmp_path / "a.safetensors", layout).entries
        assert list(found) == [f"{lora}.weight"]
        assert torch.equal(found[f"{lora}.weight"].dense(), up @ down)


def test_the_architecture_is_found_by_names_and_sizes(tmp_path: Path) -> None:
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    for width, lora in (
        (2048, "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"),
        (768, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"),
    ):
        pair = {f"{path}.lora_B.weight": values(640, 2), f"{path}.lora_A.weight": values(2, width)}
        save_file(pair, tmp_path / "a.safetensors")
        assert list(read_adapter(tmp_path / "a.safetensors").entries) == [f"{lora}.weight"]
    save_file({"unet.x.lora_B.weight": values(6, 2), "unet.x.lora_A.weight": values(2, 3)},
              tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(Refused, match="--model"):
        read_adapter(tmp_path / "a.safetensors")


def test_peft_folders_are_checked(originals: dict[str, Checkpoint], tmp_path: Path) -> None:
    layout = detect(originals["sd15"])
    write_adapter(tmp_path / "a.safetensors", change(layout.sites("principal")[:3]))
    folder = tmp_path / "peft"
    export(tmp_path / "a.safetensors", folder, "peft", layout=layout)
    config = json.loads((folder / "adapter_config.json").read_text())
    before = read_adapter(folder, layout).entries
    rank = {**config, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps(rank))
    for name, entry in read_adapter(folder / "adapter_model.safetensors", layout).entries.items():
        torch.testing.assert_close(entry.dense(), 2 * before[name].dense())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(Refused, match="use_dora"):
        read_adapter(folder, layout)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(Refused, match="not beside it"):
        read_adapter(folder / "adapter_model.safetensors", layout)
    with pytest.raises(Refused, match="holds no adapter_config"):
        read_adapter(tmp_path, layout)


def test_what_a_format_cannot_hold_is_refused(
    originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    layout = detect(originals["sdxl"])
    full = Adapter({"lora_unet_out_0.weight": Full(values(32))}, {"recast.role": "full"})
    write_adapter(tmp_path / "f.safetensors", full)
    for form in ("peft", "diffusers"):
        with pytest.raises(Refused, match="has no place"):
            export(tmp_path / "f.safetensors", tmp_path / "no", form, layout=layout)
    export(tmp_path / "f.safetensors", tmp_path / "c.safetensors", "comfy", layout=layout)
    assert list(load_file(tmp_path / "c.safetensors")) == ["diffusion_model.out.0.diff"]
    with pytest.raises(Refused, match="no adapter format"):
        export(tmp_path / "f.safetensors", tmp_path / "no", "gguf")
    with pytest.raises(Refused, match="exists"):
        export(tmp_path / "f.safetensors", tmp_path / "c.safetensors", "kohya")
    assert not (tmp_path / "no").exists()


def test_a_matrix_for_a_1x1_convolution_is_reshaped_as_loaders_do(
    originals: dict[str, Checkpoint], tmp_path: Path
) -> None:
    for family in FAMILIES:  # proj_in is a convolution in SD 1.5 and a matrix in SDXL
        layout = detect(originals[family])
        site = next(s for s in layout.sites("all") if s.module.endswith("proj_in"))
        out, into = site.shape[:2]
        ones = (1, 1) if family == "sdxl" else ()
        up, down = values(out, 4), values(4, into, seed=1)
        file = {
            f"{site.lora}.lora_up.weight": up.reshape(out, 4, *ones),
            f"{site.lora}.lora_down.weight": down.reshape(4, into, *ones),
        }
        save_file(file, tmp_path / "a.safetensors")
        found = read_adapter(tmp_path / "a.safetensors", layout).entries[f"{site.lora}.weight"]
        assert found.shape == site.shape
        assert torch.equal(found.dense((out, into)), up @ down)
        save_file({f"{site.lora}.diff": (up @ down).reshape(out, into, *ones)},
                  tmp_path / "a.safetensors")  # fmt: skip
        found = read_adapter(tmp_path / "a.safetensors", layout).entries[f"{site.lora}.weight"]
        assert isinstance(found, Full)
        assert torch.equal(found.delta, (up @ down).reshape(site.shape))


def test_simpletuners_names_are_read(originals: dict[str, Checkpoint], tmp_path: Path) -> None:
    layout = detect(originals["sdxl"])
    site = next(s for s in layout.sites("OUT04") if s.kind == "linear" and s.param == "weight")
    head = "lycoris_" + site.module.replace(".", "_")
    pair = {f"{head}.lora_up.weight": values(site.shape[0], 2),
            f"{head}.lora_down.weight": values(2, site.shape[1])}  # fmt: skip
    save_file(pair, tmp_path / "a.safetensors")
    assert list(read_adapter(tmp_path / "a.safetensors", layout).entries) == [f"{site.lora}.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_narrow_numbers_are_read_and_kept(
    originals: dict[str, Checkpoint], tmp_path: Path, dtype: torch.dtype
) -> None:
    layout = detect(originals["sd15"])
    file = {}
    for seed, site in enumerate(layout.sites("te1,OUT08")):
        if site.kind in ("linear", "conv") and site.param == "weight":
            down = values(2, *site.shape[1:], seed=-seed)
            ones = (1,) * (down.ndim - 2)
            file[f"{site.lora}.lora_up.weight"] = values(site.shape[0], 2, *ones, seed=seed)
            file[f"{site.lora}.lora_down.weight"] = down
    file = {key: tensor.to(dtype) for key, tensor in file.items()}
    save_file(file, tmp_path / "a.safetensors")
    for name, entry in read_adapter(tmp_path / "a.safetensors").entries.items():
        lora = name.removesuffix(".weight")
        up, down = (file[f"{lora}.lora_{side}.weight"].float() for side in ("up", "down"))
        assert torch.equal(entry.dense().flatten(1), up.flatten(1) @ down.flatten(1))
    for form in ("kohya", "diffusers"):
        export(tmp_path / "a.safetensors", tmp_path / form, form, layout=layout, padded=True)
        after = load_file(tmp_path / form)
        assert {t.dtype for key, t in after.items() if "alpha" not in key} == {dtype}
    same_tensors = {k: v for k, v in load_file(tmp_path / "kohya").items() if "alpha" not in k}
    assert same_tensors.keys() == file.keys()
    assert all(torch.equal(same_tensors[k].float(), v.float()) for k, v in file.items())


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("dora_scale", "DoRA"),
        ("lora_magnitude_vector", "DoRA"),
        ("hada_w1_a", "LoHa"),
        ("lokr_w2", "LoKr"),
        ("oft_blocks", "OFT"),
        ("a1.weight", "GLoRA"),
        ("on_input", "IA3"),
        ("set_weight", "replaced weights"),
        ("bias_indices", "sparse biases"),
        ("lora_B.bias", "LoRA biases"),
    ],
)
def test_other_parametrizations_are_refused_by_their_name(
    tmp_path: Path, key: str, kind: str
) -> None:
    pair = {"a.lora_up.weight": values(8, 4), "a.lora_down.weight": values(4, 6)}
    save_file({**pair, f"a.{key}": values(2)}, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match=rf"1 keys .*\({kind}\), first a\.{key}"):
        read_adapter(tmp_path / "a.safetensors")
