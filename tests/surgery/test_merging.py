"""Merges of checkpoints: each rule against its formula in numpy, trees, adapters, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests import tiny
from tests.adapter.loaders import change

from recast.adapter import write_adapter
from recast.checkpoint import Checkpoint
from recast.cli import main
from recast.errors import Refused
from recast.layout import detect
from recast.surgery import blend
from recast.surgery.merging import write_merge
from recast.surgery.recipes import Added, Step, parse_weights

UNET = "model.diffusion_model."
KEY = f"{UNET}output_blocks.8.0.in_layers.2.weight"
BIAS = f"{UNET}output_blocks.8.0.in_layers.2.bias"
TE1 = "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("merging")
    a, b, c = (tiny.checkpoint(folder / f"{name}.safetensors", seed=seed)
               for seed, name in enumerate("abc"))  # fmt: skip
    return a, b, c


def arrays(count: int, *shape: int) -> list[torch.Tensor]:
    made = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=made) for _ in range(count)]


def near(found: torch.Tensor, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found.double().numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_weighted_and_difference() -> None:
    a, b, c = arrays(3, 6, 4)
    x, y, z = (t.double().numpy() for t in (a, b, c))
    near(blend.weighted(a, [b, c], [0.3, 0.2]), 0.5 * x + 0.3 * y + 0.2 * z)
    assert torch.equal(blend.weighted(a, [b], [1.0]), b)
    near(blend.difference(a, [b, c], [0.7, 0.7]), x + 0.7 * (y - z))


def test_slerp() -> None:
    a, b = arrays(2, 6, 4)
    x, y = a.double().numpy(), b.double().numpy()
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    near(blend.slerp(a, b, 0.3),
         (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle))  # fmt: skip
    near(blend.slerp(a, 2 * a, 0.5), 1.5 * x)
    near(blend.slerp(a, 0 * a, 0.25), 0.75 * x)


def test_cosine_keeps_what_agrees() -> None:
    a, b = arrays(2, 6, 4)
    b[:, 0] = 3 * a[:, 0]
    x, y = a.double().numpy(), b.double().numpy()
    u, v = x / np.linalg.norm(x, axis=0), y / np.linalg.norm(y, axis=0)
    seen = ((u * v).sum(0) + (u * v).sum() / np.linalg.norm(u) / np.linalg.norm(v)) / 2
    rise = (seen - seen.min()) / (seen.max() - seen.min())
    kept = np.clip(rise - 0.2, 0, 1)
    near(blend.cosine(a, b, 0.2), kept * x + (1 - kept) * y)
    assert kept[0] == pytest.approx(0.8)
    near(blend.cosine(a[:, 0], b[:, 0], 0.25), 0.75 * x[:, 0] + 0.25 * y[:, 0])
    wide = blend.cosine(a.reshape(6, 2, 2), b.reshape(6, 2, 2), 0.2)
    assert torch.equal(wide.reshape(6, 4), blend.cosine(a, b, 0.2))


def test_ties_is_the_paper_s() -> None:
    a, *others = arrays(4, 6, 4)
    base = a.double().numpy()
    left = []
    for x in others:
        delta = x.double().numpy() - base
        least = np.sort(np.abs(delta).ravel())[-int(np.ceil(0.4 * delta.size))]
        left.append(np.where(np.abs(delta) >= least, delta, 0))
    sign = np.sign(sum(left))
    agree = [(np.sign(delta) == sign) & (delta != 0) for delta in left]
    count = np.maximum(sum(m.astype(int) for m in agree), 1)
    mean = sum(np.where(m, delta, 0) for m, delta in zip(agree, left, strict=True)) / count
    near(blend.ties(a, others, 0.7, 0.4), base + 0.7 * mean)


def test_dare_drops_at_random_and_keeps_the_mean() -> None:
    a, b = arrays(2, 300, 200)
    delta = (b - a).double().numpy()
    found = (blend.dare(a, [b], [1.0], 0.25, [7]) - a).double().numpy()
    kept = np.abs(found) > 1e-6
    assert 0.24 < kept.mean() < 0.26
    np.testing.assert_allclose(found[kept], 4 * delta[kept], rtol=1e-4, atol=1e-4)
    assert torch.equal(blend.dropped(b, 0.25, 7), blend.dropped(b, 0.25, 7))
    assert not torch.equal(blend.dropped(b, 0.25, 7), blend.dropped(b, 0.25, 8))
    seeds = {blend.seed_of(s, m, k) for s in (0, 1) for m in (0, 1) for k in ("x", "y")}
    assert len(seeds) == 8
    both = blend.dare_ties(a, [b], 1.0, 0.25, [7])
    torch.testing.assert_close(both, blend.dare(a, [b], [1.0], 0.25, [7]))


def test_a_tree_is_merged_tensor_by_tensor(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    a, b, c = models
    (tmp_path / "tree.toml").write_text(f"""
        [models]
        a = "{a}"
        b = "{b}"
        c = "{c}"
        [merge.mixed]
        models = ["a", "b"]
        weights = ["0.25,te=0"]
        [merge.result]
        how = "difference"
        models = ["mixed", "b", "c"]
        weights = ["0.5"]
    """, encoding="utf-8")  # fmt: skip
    out = tmp_path / "o.safetensors"
    with pytest.raises(SystemExit) as left:
        main(["merge", str(tmp_path / "tree.toml"), "--out", str(out), "--json"])
    assert not left.value.code
    with Checkpoint(a) as x, Checkpoint(b) as y, Checkpoint(c) as z, Checkpoint(out) as found:
        for key, share in ((KEY, 0.25), (TE1, 0.0)):
            wanted = x[key] + share * (y[key] - x[key]) + 0.5 * (y[key] - z[key])
            torch.testing.assert_close(found[key], wanted, rtol=1e-5, atol=1e-6)
        about = json.loads(found.metadata["recast.merge"])
        assert about["models"][0]["models"][1]["sha256"] == y.sha256()
        assert about["models"][2] == {"file": "c.safetensors", "sha256": z.sha256()}


@pytest.mark.parametrize("how", ["slerp", "cosine", "ties", "dare", "dare-ties"])
def test_every_rule_makes_a_whole_checkpoint(
    models: tuple[Path, Path, Path], tmp_path: Path, how: str
) -> None:
    count, density = (2, 1.0) if how in ("slerp", "cosine") else (3, 0.5)
    weights = (parse_weights("0.5,vae=0"),) * (2 if how == "dare" else 1)
    step = Step(how, models[:count], weights, density)
    write_merge(step, tmp_path / "1")
    write_merge(step, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    with Checkpoint(tmp_path / "1") as found, Checkpoint(models[0]) as a:
        assert list(found.specs) == list(a.specs)
        assert not detect(found).missing
        assert not torch.equal(found[KEY], a[KEY])
        vae = "first_stage_model.decoder.conv_out.weight"
        assert torch.equal(found[vae], a[vae])
        if how == "slerp":
            with Checkpoint(models[1]) as b:
                torch.testing.assert_close(found[KEY], blend.slerp(a[KEY], b[KEY], 0.5))


def test_vectors_of_merge_block_weighted() -> None:
    numbers = [0.5, *(i / 100 for i in range(25))]
    rules = dict(parse_weights("mbw:" + ",".join(map(str, numbers))).rules)
    assert (rules[""], rules["IN"], rules["TIME"], rules["IN11"]) == (0.5, 0, 0, 0.11)
    assert (rules["MID1"], rules["OUT00"], rules["OUT11"], rules["OUT"]) == (0.12, 0.13, 0.24, 0.24)
    assert dict(parse_weights("mbw:" + ",".join(["1"] * 20)).rules)["LABEL"] == 1


def test_adapters_go_into_the_weights(models: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """W + w dW, rounded once; stacked and transposed matrices too; another adapter on top."""
    with Checkpoint(models[0]) as file:
        layout = detect(file)
        sites = layout.sites("lycoris-full,te1,te2")
        one, two = change(file, sites, 2), change(file, sites[:5], 3)
        write_adapter(tmp_path / "one.safetensors", one)
        write_adapter(tmp_path / "two.safetensors", two)
        added = (Added(tmp_path / "one.safetensors", 0.5, "TE2=-1"),
                 Added(tmp_path / "two.safetensors", 2.0))  # fmt: skip
        write_merge(Step("lora", (models[0],), adapters=added), tmp_path / "o")
        with Checkpoint(tmp_path / "o") as found:
            for index, site in enumerate(sites):
                whole = file[site.key] if site.rows is None else file[site.key][slice(*site.rows)]
                got = found[site.key] if site.rows is None else found[site.key][slice(*site.rows)]
                share = -0.5 if site.part == "te2" else 0.5
                delta = share * one.entries[f"{site.lora}.weight"].dense()
                if index < 5:
                    delta = delta + 2.0 * two.entries[f"{site.lora}.weight"].dense()
                delta = delta.T if site.transpose else delta
                torch.testing.assert_close(got, whole + delta, rtol=1e-5, atol=1e-5)
            changed = {site.key for site in sites}
            assert all(found.raw(key) == file.raw(key) for key in file.specs if key not in changed)
            about = json.loads(found.metadata["recast.merge"])
            assert about["adapters"][0]["weights"] == "TE2=-1"


def test_dora_changes_the_weights_of_one_file(
    models: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """Against the formula on that file; on a mixture of files, which are not written, it is not."""
    with Checkpoint(models[0]) as file:
        (site,) = [s for s in detect(file).sites("lycoris-full") if s.key == KEY]
        made = torch.Generator().manual_seed(1)
        up = torch.randn(site.shape[0], 2, 1, 1, generator=made)
        down = torch.randn(2, *site.shape[1:], generator=made)
        scale = torch.rand(site.shape[0], 1, 1, 1, generator=made)
        save_file({f"{site.lora}.lora_up.weight": up, f"{site.lora}.lora_down.weight": down,
                   f"{site.lora}.dora_scale": scale}, tmp_path / "dora")  # fmt: skip
        added = (Added(tmp_path / "dora", 0.5),)
        write_merge(Step("lora", (models[0],), adapters=added), tmp_path / "o")
        moved = file[KEY] + (up.flatten(1) @ down.flatten(1)).reshape(site.shape)
        whole = scale * moved / moved.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        with Checkpoint(tmp_path / "o") as found:
            wanted = 0.5 * file[KEY] + 0.5 * whole
            torch.testing.assert_close(found[KEY], wanted, rtol=1e-5, atol=1e-5)
    mixture = Step("weighted", models[:2], (parse_weights(0.5),))
    with pytest.raises(Refused, match="write the merge first"):
        write_merge(Step("lora", (mixture,), adapters=added), tmp_path / "p")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["A"], "2 or more"),
        (["A", "B", "--how", "mean"], "no merge is called"),
        (["A", "B", "--how", "difference"], "merges 3"),
        (["A", "B", "--weight", "2"], "at most 1"),
        (["A", "B", "C", "--weight", "0.5"], "one for each"),
        (["A", "B", "C", "--weight", "0.6", "--weight", "0.6"], "at most 1"),
        (["A", "B", "--density", "0.5"], "no density"),
        (["A", "B", "C", "--how", "ties", "--density", "2"], "no share"),
        (["A", "B", "--weight", "mbw:1,2,3"], "20 for SDXL"),
        (["A", "B", "--weight", "OUT99=1"], "is it OUT"),
        (["A", "--lora", "A"], "no adapter|keys"),
        (["A", "B", "--strength", "2"], "for 0 files"),
        (["A", "absent"], "does not exist"),
        (["T"], r"no \[merge.result\]"),
        (["A", "A", "--out", "A"], "also the source"),
    ],
)
def test_mistakes_end_in_one_sentence(
    models: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    words: list[str], said: str,
) -> None:  # fmt: skip
    import re

    (tmp_path / "t.toml").write_text("[models]\na = 'a'\n", encoding="utf-8")
    names = {**dict(zip("ABC", map(str, models), strict=True)), "T": str(tmp_path / "t.toml")}
    given = [names.get(word, word) for word in words]
    given += [] if "--out" in given else ["--out", str(tmp_path / "o")]
    with pytest.raises(SystemExit) as left:
        main(["merge", *given])
    assert left.value.code == 2
    assert re.search(said, " ".join(capsys.readouterr().err.split()))
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[merge.result]\nmodels = ['result', 'result']\nweights = [0.5]", "part of itself"),
        ("[merge.result]\nmodels = ['x', 'y']\nweights = [0.5]", "is called 'x'"),
        ("[merge.result]\nmodel = ['x']", "the keys are"),
        ("[merge.result]\nmodels = []\nweights = ['a']", "no number"),
        ("[merge", "no TOML"),
        ("[other]", r"\[other\]"),
    ],
)
def test_a_wrong_tree_is_refused(tmp_path: Path, text: str, said: str) -> None:
    from recast.surgery.recipes import read_tree

    (tmp_path / "t.toml").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=said):
        read_tree(tmp_path / "t.toml")
