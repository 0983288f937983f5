"""Rank rules: what they say, what they give, and what a split with them writes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny

from recast.adapter import attach, decompose, read_adapter, split, verify_split
from recast.adapter.forecast import Forecast, activations, forecast
from recast.adapter.ranks import Rule, ranks
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import detect
from recast.lowrank import LowRank


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", dtype="F16")) as checkpoint:
        yield checkpoint


def test_counts() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.0])
    norm = float(singular.norm())
    assert Rule("fixed", 7).count(singular, norm) == 7
    assert Rule("full").count(singular, norm) == 5
    assert Rule("energy", 0.9).count(singular, norm) == 2
    assert Rule("energy", 1.0).count(singular, norm) == 4
    assert Rule("energy", 0.9).count(torch.zeros(3), 0.0) == 0
    # resize_lora's default keeps sigma >= 10^-3.5 of the checkpoint's norm, here of 1000
    assert Rule("score", -3.5).count(singular, 1e4 / 10**0.5) == 3
    assert Rule("score", -3.5, most=2).count(singular, 1000.0) == 2


def test_the_last_rule_that_fits_counts(original: Checkpoint) -> None:
    sites = detect(original).sites("all,te1,te2")
    rules = ranks(["8", "te=2", "te1=3", "OUT*=4", "OUT01=5", "conv=6"])
    rules.check(sites)
    found = {(s.part, s.block, s.kind): rules.of(s).value for s in sites}
    assert found["te2", "TE2.L00", "linear"] == 2
    assert found["te1", "TE1.L00", "linear"] == 3
    assert found["unet", "OUT01", "linear"] == 5
    assert found["unet", "OUT01", "conv"] == 6
    assert found["unet", "OUT02", "linear"] == 4
    assert found["unet", "IN04", "linear"] == 8
    assert ranks(["te=16"]).of(sites[0]).value == 64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "at least 1"), ("te=-1", "at least 1"), ("energy:90", "is a share"),
        ("energy:0.9:0", "at least 1"), ("many", "is no rank"), ("OUT01=", "is no rank"),
        ("energy:x", "is no rank"), ("OUTT1=4", "did you mean OUT01"),
    ],
)  # fmt: skip
def test_what_is_no_rule_is_refused(original: Checkpoint, text: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        ranks(text).check(detect(original).sites("all"))


@pytest.mark.parametrize(
    ("rules", "alpha"),
    [(["4", "te=2", "OUT01=8"], 4.0), (["energy:0.5:6", "te=full"], 64.0), (["score:-1"], 64.0)],
)
def test_split_with_rules_adds_up(
    original: Checkpoint, tmp_path: Path, rules: list[str], alpha: float
) -> None:
    sites = detect(original).sites("principal,te1,te2")
    done = split(original, sites, rules, tmp_path, adapter_dtype="BF16", residual_dtype="F32")
    adapter = read_adapter(tmp_path / "adapter.safetensors")
    with Checkpoint(tmp_path / "residual.safetensors") as residual:
        verdict = verify_split(original, residual, adapter)
    assert verdict.passed
    assert verdict.exact == 1
    assert len(set(done.ranks.values())) > 1
    assert done.methods == {"exact": len(sites)}
    file = load_file(tmp_path / "adapter.safetensors")
    assert {v.item() for k, v in file.items() if k.endswith(".alpha")} == {alpha}
    assert adapter.metadata["ss_network_dim"] == "Dynamic"
    assert adapter.metadata["recast.rank_rule"] == " ".join(rules)
    made = decompose(original, sites, rules)
    for name, entry in made.entries.items():
        assert isinstance(entry, LowRank)
        assert entry.rank == done.ranks[name]
    assert float(made.metadata["recast.energy"]) == pytest.approx(done.energy, abs=1e-4)


def test_full_rank_leaves_nothing(original: Checkpoint, tmp_path: Path) -> None:
    done = split(original, detect(original).sites("te1"), "full", tmp_path, adapter_dtype="F32")
    assert done.energy == pytest.approx(1, abs=1e-6)


def test_fallbacks_are_counted(original: Checkpoint, tmp_path: Path) -> None:
    sites = detect(original).sites("te1")
    done = split(original, sites, 2, tmp_path, method="fast")
    assert done.methods == {"small": len(sites), "exact": len(sites)}
    with pytest.raises(Refused, match="--method"):
        split(original, sites, 2, tmp_path / "no", method="svd")


def foreseen(*given: object, **options: object) -> Forecast:
    steps = forecast(*given, **options)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_forecast_says_what_split_then_does(original: Checkpoint, tmp_path: Path) -> None:
    sites = detect(original).sites("principal,te1")
    rules = ["4", "te=2", "OUT01=energy:0.5"]
    seen = foreseen(original, sites, rules)
    done = split(original, sites, rules, tmp_path)
    assert seen.total.energy == pytest.approx(done.energy, abs=1e-3)
    assert seen.total.ranks == (2, max(done.ranks.values()))
    assert sum(row.modules for row in seen.rows) == len(sites)
    file = load_file(tmp_path / "adapter.safetensors")
    assert sum(t.numel() * t.element_size() for t in file.values()) == seen.adapter_bytes
    big = foreseen(original, sites[:1], 4, resolution=128, batch=2)
    small = foreseen(original, sites[:1], 4, resolution=64)
    wide, narrow = big.memory["full"].activations, small.memory["full"].activations
    assert wide == pytest.approx(8 * narrow, rel=0.1)
    assert (big.size, small.size) == ((128, 2), (64, 1))


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_activations_are_what_autograd_keeps(tmp_path: Path, family: str) -> None:
    from recast.model import open_model

    with Checkpoint(tiny.checkpoint(tmp_path / "o.safetensors", family)) as checkpoint:
        layout = detect(checkpoint)
        net = open_model(checkpoint, parts=("unet",)).unet.train()
        sites = layout.sites("all")
        attach({"unet": net}, decompose(checkpoint, sites, 2), sites)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    more = {}
    if layout.plan.te2 is not None:
        pooled = torch.randn(1, layout.plan.te2.projection)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": torch.ones(1, 6)}}
    context = torch.randn(1, 77, layout.unet["cross_attention_dim"])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(torch.randn(1, 4, 64, 64), torch.tensor(400.5), context, **more)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert 4 * activations(layout.plan.unet, 64, 64) == pytest.approx(total, rel=0.1)
