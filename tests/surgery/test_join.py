"""The sum of adapters: exact, by block, re-factored; in every form, as other loaders read it."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from tests.adapter.loaders import answer, by_diffusers, by_lycoris, by_peft, change, network

from recast.adapter import Adapter, attach, export, read_adapter, write_adapter
from recast.adapter.places import read_site
from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.layout import detect
from recast.lowrank import LowRank
from recast.surgery.join import Input, join
from recast.surgery.rules import cut
from recast.surgery.weights import parse

ONE = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
TWO = "lora_unet_input_blocks_1_0_in_layers_2"
TEXT = "lora_te1_text_model_encoder_layers_3_mlp_fc1"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def lora(path: Path, seed: int, rank: int, alpha: float | None, *names: str, **more: Any) -> Path:
    made = torch.Generator().manual_seed(seed)
    found = dict(more.get("tensors", {}))
    for name in names:
        kernel = (3, 3) if name == TWO else ()
        up = torch.randn(6, rank, *(1,) * len(kernel), generator=made)
        down = torch.randn(rank, 5, *kernel, generator=made)
        found[f"{name}.lora_up.weight"] = up.to(more.get("dtype", torch.float32))
        found[f"{name}.lora_down.weight"] = down.to(more.get("dtype", torch.float32))
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(found, path, more.get("about"))
    return path


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    a = lora(tmp_path / "a.safetensors", 0, 4, 2.0, ONE, TWO)
    return a, lora(tmp_path / "b.safetensors", 1, 2, None, ONE, TEXT)


def dense(path: Path, name: str) -> torch.Tensor:
    entries = read_adapter(path).entries
    return entries[f"{name}.weight"].dense().double()


def test_the_sum_is_exact(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    out = tmp_path / "o.safetensors"
    inputs = [Input(a, 0.7, parse("IN01=0.5")), Input(b, -0.3, parse("te=2"))]
    done = join(inputs, out)
    assert (done.modules, done.shared, sorted(done.ranks)) == (3, 1, [2, 4, 6])
    wanted = {ONE: 0.7 * dense(a, ONE) - 0.3 * dense(b, ONE), TWO: 0.35 * dense(a, TWO),
              TEXT: -0.6 * dense(b, TEXT)}  # fmt: skip
    for name, delta in wanted.items():
        assert (dense(out, name) - delta).norm() < 1e-6 * delta.norm(), name
    tensors = load_file(out)
    assert len({float(t) for key, t in tensors.items() if key.endswith(".alpha")}) == 1
    with Checkpoint(out) as file, Checkpoint(a) as first:
        about = json.loads(file.metadata["recast.join"])
        assert about["inputs"][0]["sha256"] == first.sha256()
        assert about["inputs"][1]["weights"] == "te=2"
        assert file.metadata["ss_network_dim"] == "Dynamic"
        assert file.metadata["recast.role"] == "delta"


def test_factors_of_one_scale_keep_their_bits(tmp_path: Path) -> None:
    a = lora(tmp_path / "a", 0, 4, 2.0, ONE, dtype=torch.float16)
    b = lora(tmp_path / "b", 1, 2, 1.0, ONE, dtype=torch.float16)
    join([Input(a), Input(b)], tmp_path / "o")
    found, one, other = (load_file(tmp_path / name) for name in ("o", "a", "b"))
    for end, axis in (("up", 1), ("down", 0)):
        key = f"{ONE}.lora_{end}.weight"
        assert torch.equal(found[key], torch.cat([one[key], other[key]], axis))
    assert found[f"{ONE}.alpha"] == 3.0


def test_a_rank_keeps_the_best_of_the_sum(two: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = two
    done = join([Input(a), Input(b)], tmp_path / "o", cut=cut(3, None, None))
    assert sorted(done.ranks) == [2, 3, 3]
    whole = dense(a, ONE) + dense(b, ONE)
    u, s, vh = torch.linalg.svd(whole)
    best = u[:, :3] * s[:3] @ vh[:3]
    assert (dense(tmp_path / "o", ONE) - best).norm() < 1e-5 * whole.norm()
    whole = dense(a, TWO).flatten(1)
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    assert (dense(tmp_path / "o", TWO).flatten(1) - u[:, :3] * s[:3] @ vh[:3]).norm() < 1e-5 * 30


def test_opposites_leave_nothing_of_a_rank(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="nothing is left"):
        join([Input(two[0]), Input(two[0], -1.0)], tmp_path / "o", cut=cut(3, None, None))
    assert not (tmp_path / "o").exists()


def test_full_changes_and_norms_are_summed(two: tuple[Path, Path], tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(5)
    more = {f"{ONE}.diff": torch.randn(6, 5, generator=made),
            f"{ONE}.diff_b": torch.randn(6, generator=made)}  # fmt: skip
    b = lora(tmp_path / "full", 2, 2, 2.0, TEXT, tensors=more)
    join([Input(two[0], 0.5), Input(b, 2.0)], tmp_path / "o")
    found = load_file(tmp_path / "o")
    wanted = 0.5 * dense(two[0], ONE) + 2 * more[f"{ONE}.diff"].double()
    assert (found[f"{ONE}.diff"] - wanted).norm() < 1e-6 * wanted.norm()
    assert torch.equal(found[f"{ONE}.diff_b"], 2 * more[f"{ONE}.diff_b"])
    assert f"{ONE}.lora_up.weight" not in found


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd15", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "tool",
    ["lycoris", "peft", *(pytest.param(t, marks=pytest.mark.slow) for t in ("diffusers", "kohya"))],
)
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_loaders_answer_as_with_both(tool: str, family: str, tmp_path: Path) -> None:
    """A kohya file and a diffusers or PEFT one of the same layers, added up for each loader."""
    with Checkpoint(tiny.checkpoint(tmp_path / "m.safetensors", family)) as checkpoint:
        layout = detect(checkpoint)
        sites = layout.sites(",".join(["lycoris-full", *layout.text_parts]))
        one, other = change(checkpoint, sites, 2), change(checkpoint, sites[::-1], 3)
        write_adapter(tmp_path / "k.safetensors", one)
        write_adapter(tmp_path / "n.safetensors", other)
        export(tmp_path / "n.safetensors", tmp_path / "p", "peft", layout=layout)
        inputs = [Input(tmp_path / "k.safetensors", 0.5), Input(tmp_path / "p", -0.25)]
        form = {"peft": "peft", "diffusers": "diffusers"}.get(tool, "kohya")
        out = tmp_path / ("o" if tool == "peft" else "o.safetensors")
        join(inputs, out, base=checkpoint, form=form)
        entries = {}
        for name, entry in one.entries.items():
            also = other.entries[name]
            assert isinstance(entry, LowRank)
            assert isinstance(also, LowRank)
            entries[name] = LowRank(torch.cat([0.5 * entry.up, -0.25 * also.up], 1),
                                    torch.cat([entry.down, also.down]))  # fmt: skip
        for part in ("unet", "te1"):
            mine = [site for site in sites if site.part == part]
            ours, net = network(checkpoint, part), network(checkpoint, part)
            held = {f"{s.lora}.weight": entries[f"{s.lora}.weight"] for s in mine}
            attach({part: ours}, Adapter(held, one.metadata), mine)
            wanted = answer(ours, layout, part)
            if tool == "lycoris":
                count = by_lycoris(net, out, part, sites)
            elif tool == "peft":
                net, count = by_peft(net, out, part)
            else:
                count = by_diffusers(net, out, part, family)
            assert count == len(mine)
            off = (answer(net, layout, part) - wanted).norm() / wanted.norm()
            assert off < 1e-5, (part, float(off))


@pytest.mark.parametrize("part", ["unet", "te2"])
def test_dora_is_joined_by_the_change_it_makes_to_the_model(part: str, tmp_path: Path) -> None:
    """LyCORIS' own merged weight of a convolution, and of rows of a stacked q, k, v, is the oracle.

    Whole without a rank, its best part with one, beside an ordinary LoRA of the same module.
    """
    from lycoris.modules.locon import LoConModule

    with Checkpoint(tiny.checkpoint(tmp_path / "m.safetensors")) as base:
        sites = [s for s in detect(base).sites("lycoris-full,te2") if s.part == part]
        stacked = part == "te2"
        site = next(s for s in sites if (s.rows is not None) == stacked
                    and (stacked or s.kind == "conv"))  # fmt: skip
        weight = read_site(base, site).float()
        out, into = weight.shape[:2]
        layer: torch.nn.Module = torch.nn.Linear(into, out)
        if not stacked:
            layer = torch.nn.Conv2d(into, out, weight.shape[2:], padding=1)
        layer.weight.data = weight.clone()
        torch.manual_seed(0)
        module = LoConModule(site.lora, layer, 1.0, 4, 2.0, weight_decompose=True)
        for parameter in module.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        change_of = (module.get_merged_weight()[0].detach() - weight).double()
        state = {f"{site.lora}.{key}": tensor.contiguous() for key, tensor in
                 module.state_dict().items() if not key.startswith("org")}  # fmt: skip
        assert f"{site.lora}.dora_scale" in state
        save_file(state, tmp_path / "dora")
        up, down = torch.randn(out, 2), torch.randn(2, into, *weight.shape[2:])
        save_file({f"{site.lora}.lora_up.weight": up.reshape(out, 2, *(1,) * (weight.ndim - 2)),
                   f"{site.lora}.lora_down.weight": down}, tmp_path / "plain")  # fmt: skip
        inputs = [Input(tmp_path / "dora", 0.5), Input(tmp_path / "plain", -0.3)]
        wanted = 0.5 * change_of.flatten(1) - 0.3 * up.double() @ down.double().flatten(1)
        singular = torch.linalg.svdvals(wanted)
        for rank in (None, 6):
            file = tmp_path / f"o{rank}"
            join(inputs, file, base=base, cut=cut(rank, rank, None) if rank else None)
            error = (dense(file, site.lora).flatten(1) - wanted).norm()
            best = singular[rank:].norm() if rank else 0.0
            assert abs(error - best) < 1e-5 * wanted.norm()
        assert any(key.endswith(".diff") for key in load_file(tmp_path / "oNone"))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as left:
        main(["join", *map(str, words)])
    assert left.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in said
    return said


def test_mistakes_end_in_one_sentence(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = two
    out = ["--out", tmp_path / "o.safetensors"]
    sd15 = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    other = lora(tmp_path / "s", 0, 2, 2.0, sd15, "lora_te_text_model_encoder_layers_0_mlp_fc1")
    wide = lora(tmp_path / "w", 0, 2, 2.0, "lora_unet_out_2",
                tensors={f"{ONE}.diff": torch.zeros(7, 5)})  # fmt: skip
    principal = lora(tmp_path / "p", 0, 2, 2.0, ONE, about={"recast.role": "pissa-init"})
    flow = lora(tmp_path / "f", 0, 2, 2.0, ONE, about={"recast.objective": "flow"})
    v = lora(tmp_path / "v", 0, 2, 2.0, ONE, about={"recast.objective": "v"})
    dora = lora(tmp_path / "d", 0, 2, 2.0, ONE, tensors={f"{ONE}.dora_scale": torch.ones(6, 1)})
    bad = lora(
        tmp_path / "n", 0, 2, 2.0, ONE, tensors={f"{TEXT}.diff": torch.full((6, 5), torch.nan)}
    )
    cases = {
        "recast extract MODEL": [a, principal],
        "different names|mixes architectures": [a, other],
        "one size": [a, wide],
        "different objectives": [flow, v],
        "is DoRA": [a, dora],
        "NaN or infinity": [a, bad],
        "once, or each": [a, b, "--strength", 1, "--strength", 2, "--strength", 3],
        "nothing is left of the adapters": [a, b, "--strength", 0],
        "did you mean": [a, b, "--weights", "OUT99=1"],
        "vector of 3": [a, b, "--vector", "1,2,3"],
        "no adapter format": [a, b, "--to", "lora"],
        "at least 1": [a, b, "--rank", -1],
        "finite": [a, b, "--strength", "nan"],
        "does not exist": [a, tmp_path / "absent"],
    }
    for said, words in cases.items():
        assert re.search(said, refused(capsys, *words, *out)), said
        assert not (tmp_path / "o.safetensors").exists()
    assert "also the source" in refused(capsys, a, b, "--out", a, "--force")


def test_the_verb(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vector = ",".join(["0", *["1"] * 20])
    words = ["--vector", vector, "--strength", "2", "--dtype", "fp16"]
    with pytest.raises(SystemExit) as left:
        main(["join", *map(str, two), *words, "--out", str(tmp_path / "o"), "--json"])
    assert not left.value.code, capsys.readouterr().err
    facts = json.loads(capsys.readouterr().out)
    assert (facts["modules"], facts["in_several"], facts["ranks"]) == (2, 1, "4 to 6")
    assert {t.dtype for t in load_file(tmp_path / "o").values() if t.ndim} == {torch.float16}
