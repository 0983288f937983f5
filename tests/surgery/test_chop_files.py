"""Chopped files: exact deltas, true headers, and what other people's loaders make of them."""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.adapter.loaders import answer, by_diffusers, by_lycoris, by_peft, change, network
from torch import Tensor

from recast.adapter import Adapter, attach, export, read_adapter, write_adapter
from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.errors import Refused
from recast.layout import Layout, Site, detect
from recast.lowrank import Full, LowRank
from recast.surgery.blocks import spot
from recast.surgery.chop import chop
from recast.surgery.weights import Weights, only, parse, without

MIXED = "OUT*=0.5,MID1=-1,IN04=0,TE1.L00=0.25,attn2=0"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@dataclass(frozen=True)
class Case:
    checkpoint: Checkpoint
    layout: Layout
    sites: list[Site]
    adapter: Adapter
    folder: Path


@pytest.fixture(scope="module", params=["sdxl", pytest.param("sd15", marks=pytest.mark.slow)])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    folder = tmp_path_factory.mktemp("chop")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", request.param)) as checkpoint:
        layout = detect(checkpoint)
        sites = layout.sites(",".join(["all", *layout.text_parts]))
        adapter = change(checkpoint, sites, 2)
        write_adapter(folder / "k.safetensors", adapter)
        for form, name in (("peft", "peft"), ("diffusers", "d.safetensors")):
            export(folder / "k.safetensors", folder / name, form, layout=layout)
        yield Case(checkpoint, layout, sites, adapter, folder)


def adapter(*names: str, rank: int = 4) -> Adapter:
    """Random factors under names of SDXL; a name with a colon is a 3x3 convolution."""
    entries: dict[str, LowRank | Full] = {}
    for seed, name in enumerate(names):
        made = torch.Generator().manual_seed(seed)
        kernel = (3, 3) if name.endswith(":") else ()
        up = torch.randn(6, rank, generator=made) * 1e-4
        entries[f"{name.rstrip(':')}.weight"] = LowRank(
            up, torch.randn(rank, 5, *kernel, generator=made)
        )
    return Adapter(entries, {"recast.role": "delta"})


UNET = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_q"
CONV = "lora_unet_input_blocks_1_0_in_layers_2:"
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
HEAD = "lora_te2_text_model_encoder_layers_3_self_attn_"


def chopped(folder: Path, weights: Weights, dtype: str = "F32") -> tuple[Adapter, Adapter]:
    """A small adapter before and after."""
    write_adapter(folder / "a", adapter(UNET, CONV, TEXT), dtype=dtype)
    chop(folder / "a", folder / "b", weights)
    return read_adapter(folder / "a"), read_adapter(folder / "b")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("weight", [0.5, -1, 2, -0.25])
def test_a_power_of_two_scales_to_the_bit(tmp_path: Path, dtype: str, weight: float) -> None:
    """fp16's `up` of 1e-4 is near its smallest numbers, where halving rounds: `down` takes it."""
    before, after = chopped(tmp_path, parse(f"*={weight}"), dtype)
    assert before.entries.keys() == after.entries.keys()
    for name, entry in before.entries.items():
        assert torch.equal(after.entries[name].dense(), weight * entry.dense()), name
    old, new = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert {k: v.dtype for k, v in old.items()} == {k: v.dtype for k, v in new.items()}
    assert all(torch.equal(old[key], new[key]) for key in old if key.endswith(".alpha"))


def test_any_weight_scales_once_and_zero_drops(tmp_path: Path) -> None:
    before, after = chopped(tmp_path, parse("OUT01=0.3,IN01=0,te=-1"), "F16")
    assert f"{CONV[:-1]}.weight" not in after.entries
    gap = after.entries[f"{UNET}.weight"].dense() - 0.3 * before.entries[f"{UNET}.weight"].dense()
    assert gap.norm() < 2**-11 * 0.3 * before.entries[f"{UNET}.weight"].dense().norm()
    assert torch.equal(after.entries[f"{TEXT}.weight"].dense(),
                       -before.entries[f"{TEXT}.weight"].dense())  # fmt: skip
    assert sorted(load_file(tmp_path / "b")) == sorted(
        f"{lora}.{end}" for lora in (UNET, TEXT)
        for end in ("alpha", "lora_down.weight", "lora_up.weight")
    )  # fmt: skip


def test_weight_one_copies_the_bytes(tmp_path: Path) -> None:
    chopped(tmp_path, parse("OUT01=1,IN07=0"))
    with Checkpoint(tmp_path / "a") as a, Checkpoint(tmp_path / "b") as b:
        assert list(a.specs) == list(b.specs)
        assert all(a.raw(key) == b.raw(key) for key in a.specs)


def test_full_changes_tucker_cores_and_files_without_alpha(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    names = {"lora_up.weight": (6, 2, 1, 1), "lora_down.weight": (2, 5, 1, 1),
             "lora_mid.weight": (2, 2, 3, 3)}  # fmt: skip
    tensors = {f"{CONV[:-1]}.{end}": torch.randn(shape, generator=made)
               for end, shape in names.items()}  # fmt: skip
    tensors["lora_unet_out_2.diff"] = torch.randn(4, 5, 3, 3, generator=made)
    tensors["lora_unet_out_2.diff_b"] = torch.randn(4, generator=made)
    tensors["lora_unet_out_0.w_norm"] = torch.randn(5, generator=made)
    save_file(tensors, tmp_path / "a")  # no metadata at all
    chop(tmp_path / "a", tmp_path / "b", parse("OUT=-1,IN01=0.5"))
    before, after = read_adapter(tmp_path / "a"), read_adapter(tmp_path / "b")
    assert len(before.entries) == 4
    for name, entry in before.entries.items():
        weight = 0.5 if "input" in name else -1
        torch.testing.assert_close(after.entries[name].dense(), weight * entry.dense())


@pytest.mark.parametrize(
    "tool", ["lycoris", "peft", pytest.param("kohya", marks=pytest.mark.slow), "diffusers"]
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_loaders_answer_with_the_weights_in(case: Case, tool: str, tmp_path: Path) -> None:
    """As our network does with every delta multiplied by its weight."""
    source, weights = {"peft": "peft", "diffusers": "d.safetensors"}.get(tool), parse(MIXED)
    out = tmp_path / (source or "k.safetensors")
    chop(case.folder / (source or "k.safetensors"), out, weights, layout=case.layout)
    entries, left = {}, []
    for site in case.sites:
        where = spot(site.lora, case.layout.plan.unet.layers)
        entry = case.adapter.entries[f"{site.lora}.weight"]
        assert where
        assert isinstance(entry, LowRank)
        if weight := weights.of(where):
            entries[f"{site.lora}.weight"] = LowRank(entry.up * weight, entry.down)
            left.append(site)
    assert 0.5 * len(case.sites) < len(left) < 0.9 * len(case.sites)
    for part in ("unet", "te1"):
        mine = [site for site in left if site.part == part]
        ours = _answer(case, part, {f"{s.lora}.weight": entries[f"{s.lora}.weight"] for s in mine})
        net = network(case.checkpoint, part)
        if tool == "lycoris":
            count = by_lycoris(net, out, part, left)
        elif tool == "peft":
            net, count = by_peft(net, out, part)
        else:
            count = by_diffusers(net, out, part, case.layout.family)
        assert count == len(mine)
        off = (answer(net, case.layout, part) - ours).norm() / ours.norm()
        assert off < 1e-5, (part, float(off))


def _answer(case: Case, part: str, entries: dict[str, LowRank | Full]) -> Tensor:
    net = network(case.checkpoint, part)
    sites = [site for site in case.sites if f"{site.lora}.weight" in entries]
    attach({part: net}, Adapter(entries, case.adapter.metadata), sites)
    return answer(net, case.layout, part)


def test_a_dropped_out_proj_stays_as_zeros(case: Case, tmp_path: Path) -> None:
    """diffusers leaves out an attention without one."""
    chop(case.folder / "k.safetensors", tmp_path / "a", without("out_proj"), layout=case.layout)
    tensors = load_file(tmp_path / "a")
    ups = [t for k, t in tensors.items() if "out_proj" in k and k.endswith("lora_up.weight")]
    assert len(ups) == sum("out_proj" in site.lora for site in case.sites)
    assert all(not tensor.any() for tensor in ups)
    chop(case.folder / "k.safetensors", tmp_path / "b", without("self_attn"), layout=case.layout)
    assert not [key for key in load_file(tmp_path / "b") if "out_proj" in key]


def test_the_header_is_true_afterwards(tmp_path: Path) -> None:
    both = adapter(UNET, TEXT, rank=8).entries | adapter(CONV, rank=4).entries
    args = json.dumps({"conv_dim": "4", "conv_alpha": "8.0", "algo": "locon"})
    old = {"ss_network_args": args, "ss_tag_frequency": "{}", "modelspec.hash_sha256": "0x1"}
    write_adapter(tmp_path / "a", Adapter(both, {"recast.role": "delta"}))
    tensors = load_file(tmp_path / "a")
    with safe_open(tmp_path / "a", "pt") as file:
        about = file.metadata() | {"ss_network_dim": "Dynamic", **old}
    save_file(tensors, tmp_path / "a", about)
    chop(tmp_path / "a", tmp_path / "b", without("IN01"))
    data = (tmp_path / "b").read_bytes()
    section = data[8 + int.from_bytes(data[:8], "little") :]
    with safe_open(tmp_path / "b", "pt") as file:
        new = file.metadata()
    assert new["sshs_model_hash"] == hashlib.sha256(section).hexdigest()
    assert new["ss_network_dim"] == "8"
    assert json.loads(new["ss_network_args"]) == {"algo": "locon"}
    assert new["ss_tag_frequency"] == "{}"
    assert "modelspec.hash_sha256" not in new
    digest = hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest()
    assert json.loads(new["recast.chop"]) == [{"weights": "IN01=0", "of": digest}]


def test_a_peft_folder_loses_what_was_dropped(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = chop(case.folder / "peft", tmp_path / "p", only("MID1"), layout=case.layout)
    assert [path.parent.name for path in done.files] == ["unet", "unet"]
    config = json.loads((tmp_path / "p/unet/adapter_config.json").read_text())
    assert config["target_modules"]
    assert all(name.startswith("mid_block.attentions") for name in config["target_modules"])
    words = ["chop", case.folder / "peft", "--keep", "te1", "--out", tmp_path / "p", "--model"]
    words += [case.checkpoint.path]
    (tmp_path / "p/text_encoder").mkdir()
    (tmp_path / "p/text_encoder/adapter_model.safetensors").write_bytes(b"old")
    assert "exists" in refused(capsys, *words)
    with pytest.raises(SystemExit) as left:
        main([*map(str, words), "--force"])
    assert not left.value.code, capsys.readouterr().err
    assert len(load_file(tmp_path / "p/text_encoder/adapter_model.safetensors")) > 10
    again = chop(case.folder / "d.safetensors", tmp_path / "d", only("te1"), layout=case.layout)
    with safe_open(tmp_path / "d", "pt") as file:
        configs = json.loads(file.metadata()["lora_adapter_metadata"])
    assert {key.partition(".")[0] for key in configs} == {"text_encoder"}
    assert again.kept + again.dropped == len(case.sites)


def test_dora_can_be_kept_or_dropped_but_not_scaled(tmp_path: Path) -> None:
    write_adapter(tmp_path / "k", adapter(UNET, TEXT))
    tensors = load_file(tmp_path / "k") | {f"{UNET}.dora_scale": torch.ones(6, 1)}
    tensors["lora_unet_middle_block_0_in_layers_2.lokr_w1"] = torch.ones(2, 2)
    tensors["lora_unet_middle_block_0_in_layers_2.lokr_w2"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "a")
    chop(tmp_path / "a", tmp_path / "b", parse("te=0.5"))
    after = load_file(tmp_path / "b")
    assert after.keys() == tensors.keys()
    chop(tmp_path / "a", tmp_path / "c", parse("unet=0"))
    assert {key.partition(".")[0] for key in load_file(tmp_path / "c")} == {TEXT}
    for text, said in (("OUT01=0.5", "dora_scale"), ("MID=2", "lokr_w1")):
        with pytest.raises(Refused, match=said):
            chop(tmp_path / "a", tmp_path / "d", parse(text))
    assert not (tmp_path / "d").exists()


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 2, capsys.readouterr()
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error
    return error


def test_mistakes_end_in_one_sentence_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", adapter(UNET, TEXT))
    for role, said in (("pissa-init", "--initial"), ("pissa-trained", "--trained")):
        write_adapter(tmp_path / role, adapter(UNET), metadata={"recast.role": role})
        said_then = refused(capsys, "chop", tmp_path / role, "--out", tmp_path / "x")
        assert "recast extract MODEL" in said_then
        assert said in said_then
    tensors = load_file(tmp_path / "a")
    mixed = {k.replace("te1", "te2"): v for k, v in tensors.items()}
    mixed |= {"lora_unet_down_blocks_3_resnets_0_conv1.diff": torch.ones(2, 2)}
    save_file(mixed, tmp_path / "mixed")
    save_file({"lora_unet_somewhere.diff": torch.ones(2, 2)}, tmp_path / "odd")
    broken = {k: v.clone().fill_(torch.nan) if "te1" in k else v for k, v in tensors.items()}
    save_file(broken, tmp_path / "nan")
    out = ["--out", tmp_path / "x"]
    for words, said in (
        ([tmp_path / "mixed"], "mixes architectures"),
        ([tmp_path / "odd"], "none of this architecture"),
        ([tmp_path / "nan"], "lora_te1_.* holds NaN"),
        ([tmp_path / "a", "--weights", "OUT13=0"], "did you mean"),
        ([tmp_path / "a", "--vector", "1,2,3"], "a vector of 3 .* 12 for SDXL"),
        ([tmp_path / "a", "--keep", "IN07"], "nothing would be left"),
        ([tmp_path / "a", "--keep", "OUT01", "--vector", "1,0"], "give one of them"),
        ([tmp_path / "a", "--drop", ","], "no block is named"),
        ([tmp_path / "no"], "exist"),
    ):
        assert re.search(said, refused(capsys, "chop", *words, *out)), said
    assert not (tmp_path / "x").exists()
    assert "also the source" in refused(capsys, "chop", tmp_path / "a", "--out", tmp_path / "a")


def test_the_listing_counts_and_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Energy from the thin factors is that of the dense change; alphas count."""
    write_adapter(tmp_path / "k", adapter(UNET, CONV, TEXT))
    tensors = load_file(tmp_path / "k")
    tensors[f"{UNET}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a")
    with pytest.raises(SystemExit) as left:
        main(["chop", str(tmp_path / "a"), "--json"])
    assert not left.value.code
    found = json.loads(capsys.readouterr().out)
    rows = {row["block"]: row for row in found["blocks"]}
    assert list(rows) == ["IN01", "OUT01", "TE1.L00", "all"]
    dense = {n.partition(".")[0]: e.dense().double().square().sum().item()
             for n, e in read_adapter(tmp_path / "a").entries.items()}  # fmt: skip
    for block, lora in (("IN01", CONV[:-1]), ("OUT01", UNET), ("TE1.L00", TEXT)):
        assert rows[block]["energy"] == pytest.approx(dense[lora] / sum(dense.values()), rel=1e-5)
    assert rows["OUT01"]["parameters"] == 4 * (6 + 5)
    assert rows["all"]["modules"] == 3
    assert found["vectors"]["21"] == "1,1" + ",0" * 11 + ",1" + ",0" * 7
    with pytest.raises(SystemExit):
        main(["chop", str(tmp_path / "a")])
    assert "21 (BASE, IN01 … OUT08): 1,1" in capsys.readouterr().out
