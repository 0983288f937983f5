"""Resizing: as good as the dense SVD on every kind of module, and what is true of the file."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recast.adapter import read_adapter
from recast.errors import Refused
from recast.lowrank import Full, LowRank
from recast.surgery.guard import refuse_principal
from recast.surgery.resize import Resized, resize
from recast.surgery.rules import Cut, cut
from recast.surgery.scores import Recipe, recipes


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(name: str, up: Tensor, down: Tensor, alpha: float | None) -> dict[str, Tensor]:
    found = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
    return found if alpha is None else found | {f"{name}.alpha": torch.tensor(alpha)}


LINEAR, CONV, POINT = "lora_unet_mid_block_attentions_0_proj", "lora_unet_conv_in", "lora_unet_p"


def kinds() -> dict[str, dict[str, Tensor]]:
    """One file's tensors of every kind of module."""
    near = values(24, 6, seed=40), values(6, 18, seed=41)
    moved = near[0] + 1e-3 * values(24, 6, seed=42), near[1] + 1e-3 * values(6, 18, seed=43)
    return {
        "linear": pair("lora_unet_a", values(24, 8, seed=1), values(8, 18, seed=2), 4.0),
        "no alpha": pair("lora_unet_b", values(24, 8, seed=3), values(8, 18, seed=4), None),
        "negative alpha": pair("lora_unet_c", values(24, 8, seed=5), values(8, 18, seed=6), -2.0),
        "conv 1x1": pair(
            "lora_unet_d", values(24, 8, 1, 1, seed=7), values(8, 18, 1, 1, seed=8), 8.0
        ),
        "conv 3x3": pair(
            "lora_unet_e", values(24, 8, 1, 1, seed=9), values(8, 5, 3, 3, seed=10), 2.0
        ),
        "Tucker": {
            **pair("lora_unet_f", values(24, 8, 1, 1, seed=11), values(8, 5, 1, 1, seed=12), 3.0),
            "lora_unet_f.lora_mid.weight": values(8, 8, 3, 3, seed=13),
        },
        "full matrix": {"lora_unet_g.diff": values(24, 18, seed=14)},
        "full convolution": {"lora_unet_h.diff": values(24, 5, 3, 3, seed=15)},
        "tall full matrix": {"lora_unet_i.diff": values(18, 24, seed=16)},
        "rank above the sides": pair(
            "lora_unet_j", values(9, 16, seed=17), values(16, 7, seed=18), 16.0
        ),
        "difference of products": pair(
            "lora_unet_k", torch.cat([moved[0], -near[0]], 1), torch.cat([moved[1], near[1]]), 12.0
        ),
        "unequal directions": pair(
            "lora_unet_l",
            values(24, 8, seed=19) * 10.0 ** -torch.arange(8),
            values(8, 18, seed=20),
            8.0,
        ),
    }


def dense(path: Path) -> dict[str, Tensor]:
    found = read_adapter(path).entries
    return {
        name: entry.dense().flatten(1).double()
        for name, entry in found.items()
        if len(entry.shape) > 1
    }


def written(folder: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    path = folder / "lora.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata or None)
    return path


def resized(
    source: Path, rule: Cut | Recipe, out: str = "out.safetensors", **more: object
) -> Resized:
    return resize(source, [(source.parent / out, rule)], **more)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", kinds())
def test_the_error_is_that_of_the_dense_svd(kind: str, tmp_path: Path) -> None:
    """Products in fp64 from the file's own numbers, so that only resizing can be at fault."""
    tensors = {key: value.double() for key, value in kinds()[kind].items()}
    source = written(tmp_path, tensors)
    resized(source, cut(3, None, None), dtype="F32")
    (before,), (after,) = dense(source).values(), dense(tmp_path / "out.safetensors").values()
    exact = exact_product(tensors)
    singular = torch.linalg.svdvals(exact)
    best = singular[3:].norm() / singular.norm()
    found = (exact - after).norm() / exact.norm()
    assert abs(found - best) < 1e-5
    assert found > 0.5 * best
    assert before.shape == after.shape
    (entry,) = read_adapter(tmp_path / "out.safetensors").entries.values()
    assert isinstance(entry, LowRank)
    assert entry.rank == 3


def exact_product(tensors: dict[str, Tensor]) -> Tensor:
    """The module's change as a matrix, from the formulas of the formats, in fp64."""
    by_suffix = {key.partition(".")[2]: value.double() for key, value in tensors.items()}
    if "diff" in by_suffix:
        return by_suffix["diff"].flatten(1)
    up, down = by_suffix["lora_up.weight"].flatten(1), by_suffix["lora_down.weight"]
    scale = float(by_suffix.get("alpha", torch.tensor(len(up.T)))) / up.shape[1]
    if "lora_mid.weight" in by_suffix:
        down = torch.einsum("ijyx,jc->icyx", by_suffix["lora_mid.weight"], down.flatten(1))
    return scale * up @ down.flatten(1)


def test_the_difference_of_products_keeps_its_digits_through_fp32_factors(tmp_path: Path) -> None:
    """Halves that cancel to a thousandth: fp32 QR would lose three digits, fp64 none."""
    tensors = kinds()["difference of products"]
    source = written(tmp_path, tensors)
    resized(source, cut(12, None, None), dtype="F32")
    exact = exact_product(tensors)
    (after,) = dense(tmp_path / "out.safetensors").values()
    assert exact.norm() < 1e-2 * (tensors["lora_unet_k.lora_up.weight"][:, :6].norm() ** 2)
    assert (exact - after).norm() < 1e-6 * exact.norm()


def many(folder: Path, dtype: torch.dtype = torch.float16, **metadata: str) -> Path:
    """A kohya file with linear layers, convolutions, a norm and a bias, of several ranks."""
    found: dict[str, Tensor] = {}
    for name in ("linear", "conv 3x3", "conv 1x1", "unequal directions"):
        found |= kinds()[name]
    found |= {"lora_unet_n.w_norm": values(24, seed=30), "lora_unet_n.b_norm": values(24, seed=31)}
    found |= {"lora_unet_a.diff_b": values(24, seed=32)}
    alphas = {key: value for key, value in found.items() if key.endswith("alpha")}
    return written(folder, {k: v.to(dtype) for k, v in found.items()} | alphas, **metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_file_says_what_it_holds(dtype: torch.dtype, tmp_path: Path) -> None:
    """One alpha in fp32, true dimensions, no stale hash; norms and biases as they were."""
    stale = {"ss_network_dim": "8", "ss_network_alpha": "4", "sshs_model_hash": "0" * 64,
             "modelspec.hash_sha256": "0x1", "ss_tag_frequency": "{}"}  # fmt: skip
    source = many(tmp_path, dtype, **stale)
    done = resized(source, cut(4, 2, None))
    before, after = load_file(source), load_file(tmp_path / "out.safetensors")
    assert done.modules == 4
    assert sorted(done.ranks) == [2, 4, 4, 4]
    for key in ("lora_unet_n.w_norm", "lora_unet_n.b_norm", "lora_unet_a.diff_b"):
        assert torch.equal(before[key], after[key])
    assert {after[key].dtype for key in after if not key.endswith("alpha")} == {dtype}
    assert {float(after[key]) for key in after if key.endswith("alpha")} == {4.0}
    assert {after[key].dtype for key in after if key.endswith("alpha")} == {torch.float32}
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        about = file.metadata()
    assert about["ss_network_dim"] == "Dynamic"
    assert about["ss_network_alpha"] == "4.0"
    assert about["ss_tag_frequency"] == "{}"
    assert about["recast.resize"] == "rank=4,conv_rank=2"
    assert about["sshs_model_hash"] != "0" * 64
    assert "modelspec.hash_sha256" not in about


def test_modules_may_vanish_and_an_empty_result_is_refused(tmp_path: Path) -> None:
    found = kinds()["linear"] | {k: v * 1e-3 for k, v in kinds()["no alpha"].items()}
    source = written(tmp_path, found)
    (recipe,) = recipes("fro_lora=0,spn_lora=0,params=1,thr=-1.6")
    done = resized(source, recipe)
    assert done.vanished == ("lora_unet_b",)
    assert "lora_unet_b.alpha" not in load_file(tmp_path / "out.safetensors")
    (recipe,) = recipes("params=1,thr=30")
    with pytest.raises(Refused, match="nothing is left"):
        resized(source, recipe, "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def kohya_rank(singular: Tensor, rule: str, value: float, most: int) -> int:
    """sd-scripts' rank of a module, from its formulas in docs/surgery.md: a loop, no tricks."""
    if singular[0] <= 1e-6:
        return 1
    squares = [float(s) ** 2 for s in singular]
    sums = [float(s) for s in singular]
    terms, share = (squares, value**2) if rule == "sv_fro" else (sums, value)
    if rule == "sv_ratio":
        count = sum(s > sums[0] / value for s in sums)
    else:
        count, held = 0, 0.0
        while held < share * sum(terms):
            held += terms[count]
            count += 1
    return min(max(1, min(count, len(singular) - 1)) + 1, most)


@pytest.mark.parametrize("rule", ["sv_ratio=3", "sv_cumulative=0.6", "sv_fro=0.7", "sv_fro=1"])
def test_rules_of_kohya_with_and_without_their_extra_rank(rule: str, tmp_path: Path) -> None:
    source = many(tmp_path, torch.float32)
    name, _, number = rule.partition("=")
    matrices = dense(source).values()
    wanted = [kohya_rank(torch.linalg.svdvals(m), name, float(number), 6) for m in matrices]
    like = resized(source, cut(6, None, rule, like_kohya=True), "like.safetensors")
    ours = resized(source, cut(6, None, rule))
    assert list(like.ranks) == wanted
    assert all(o == w - 1 or (o == w == 6) for o, w in zip(ours.ranks, wanted, strict=True))
    assert min(like.ranks) < 6 or rule == "sv_fro=1"


@pytest.mark.parametrize(
    ("rank", "rule"), [(0, None), (None, None), (None, "sv_fro=2"), (4, "energy=0.9"),
                   (None, "sv_ratio=0.5"), (None, "sv_fro=x")],
)  # fmt: skip
def test_rules_that_make_no_sense_are_refused(rank: int | None, rule: str | None) -> None:
    with pytest.raises(Refused):
        cut(rank, None, rule)


def test_principal_adapters_are_refused_with_the_command(tmp_path: Path) -> None:
    source = written(tmp_path, kinds()["linear"], **{"recast.role": "pissa-trained"})
    with pytest.raises(Refused, match="recast extract MODEL --initial INITIAL --trained"):
        resized(source, cut(2, None, None))


@pytest.mark.parametrize("init", ["pissa_niter_16", "PiSSA", "olora"])
def test_peft_principal_adapters_are_refused(init: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    config = {"r": 4, "lora_alpha": 4, "init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(Refused, match=init.lower()):
            refuse_principal(path, {})
    inside = {"lora_adapter_metadata": json.dumps({"unet.init_lora_weights": init})}
    with pytest.raises(Refused, match=init.lower()):
        refuse_principal(tmp_path / "a.safetensors", inside)
    refuse_principal(tmp_path / "a.safetensors", {})


def test_dora_and_infinite_numbers_are_refused(tmp_path: Path) -> None:
    dora = kinds()["linear"] | {"lora_unet_a.dora_scale": values(24, 1, seed=9)}
    with pytest.raises(Refused, match="DoRA"):
        resized(written(tmp_path, dora), cut(2, None, None))
    broken = kinds()["linear"]
    broken["lora_unet_a.lora_up.weight"][0, 0] = torch.inf
    with pytest.raises(Refused, match="lora_unet_a holds NaN or infinity"):
        resized(written(tmp_path, broken), cut(2, None, None))
    assert not (tmp_path / "out.safetensors").exists()


def test_a_full_change_stays_full_where_factors_would_be_larger(tmp_path: Path) -> None:
    tensors = kinds()["full matrix"]
    source = written(tmp_path, tensors)
    resized(source, cut(11, None, None))
    (entry,) = read_adapter(tmp_path / "out.safetensors").entries.values()
    assert isinstance(entry, Full)
    assert torch.equal(entry.delta, tensors["lora_unet_g.diff"])


def test_nothing_is_written_unless_all_of_it_can_be(tmp_path: Path) -> None:
    source = written(tmp_path, kinds()["linear"])
    rules = recipes("params=1,thr=-3:params=1,thr=30")
    with pytest.raises(Refused, match="nothing is left"):
        resize(source, [(tmp_path / f"{n}.safetensors", rule) for n, rule in enumerate(rules)])
    with pytest.raises(Refused, match="also the source"):
        resized(source, cut(2, None, None), source.name, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


def test_mixed_architectures_are_refused(tmp_path: Path) -> None:
    tensors = pair("lora_unet_input_blocks_8_1_transformer_blocks_3_attn1_to_q",
                   values(24, 8, seed=1), values(8, 18, seed=2), 8.0)  # fmt: skip
    tensors |= pair("lora_te_text_model_encoder_layers_0_mlp_fc1",
                    values(24, 8, seed=3), values(8, 18, seed=4), 8.0)  # fmt: skip
    with pytest.raises(Refused, match="mixes architectures"):
        resized(written(tmp_path, tensors), cut(2, None, None))


def test_what_leaves_the_range_of_fp16_is_refused(tmp_path: Path) -> None:
    tensors = pair("lora_unet_a", values(24, 8, seed=1) * 3e4, values(8, 18, seed=2) * 3e4, 8.0)
    source = written(tmp_path, tensors)
    (recipe,) = recipes("params=1,thr=-3,rescale=100")
    with pytest.raises(Refused, match="--dtype fp32"):
        resized(source, recipe, dtype="F16")
    assert resized(source, recipe, dtype="F32").modules == 1


def test_two_threads_write_the_same_file(tmp_path: Path) -> None:
    source = many(tmp_path)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            resized(source, cut(3, None, None), f"{threads}.safetensors")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, two = (load_file(tmp_path / f"{threads}.safetensors") for threads in (1, 2))
    assert list(one) == list(two)
    for key, tensor in one.items():
        assert torch.allclose(tensor, two[key], rtol=1e-3, atol=1e-4)
