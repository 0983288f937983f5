"""Score recipes: the directions kept are those that the plain formula keeps, and sizes hold."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny
from torch import Tensor

from recast.adapter import read_adapter
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import Site, detect
from recast.surgery.norms import norms
from recast.surgery.resize import Resized, resize
from recast.surgery.rules import cut
from recast.surgery.scores import Recipe, foremost, leading, recipes

RANK = 6


@pytest.fixture(scope="module")
def files(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Checkpoint, Path, list[Site]]]:
    """A generated SDXL checkpoint and a LoRA of all its matrices, whose strengths vary widely."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("recipes")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", "sdxl")) as base:
        layout = detect(base)
        sites = layout.sites("lycoris-full,te1,te2")
        made = torch.Generator().manual_seed(0)
        tensors: dict[str, Tensor] = {}
        for place, site in enumerate(sites):
            size = 10.0 ** (-4 + place % 5)
            up = torch.randn(site.shape[0], RANK, generator=made) * 10.0 ** -torch.arange(RANK)
            down = torch.randn(RANK, *site.shape[1:], generator=made)
            kernel = (1,) * (len(site.shape) - 2)
            tensors[f"{site.lora}.lora_up.weight"] = (size * up).reshape(*up.shape, *kernel)
            tensors[f"{site.lora}.lora_down.weight"] = down
            tensors[f"{site.lora}.alpha"] = torch.tensor(3.0)
        save_file(tensors, folder / "lora.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
        yield base, folder / "lora.safetensors", sites


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def weight(base: Checkpoint, site: Site) -> Tensor:
    """The base's matrix by the layout of the file: q, k, v are stacked in that order."""
    whole = base[site.key].double()
    order = next(
        (i for i, name in enumerate(("q_proj", "k_proj", "v_proj")) if name in site.lora), 0
    )
    return whole.chunk(3)[order] if "in_proj" in site.key else whole.flatten(1)


def plain(base: Checkpoint, lora: Path, sites: list[Site], recipe: str) -> dict[str, Tensor]:
    """What a recipe with a threshold leaves of each module: from the formula, by dense SVDs."""
    given = dict(part.split("=") if "=" in part else (part, "1") for part in recipe.split(","))
    thr, rescale = float(given.pop("thr")), float(given.pop("rescale", "1"))
    total = sum(float(value) for value in given.values())
    found, tensors = {}, load_file(lora)
    for site in sites:
        w = weight(base, site).flatten(1)
        up = tensors[f"{site.lora}.lora_up.weight"].double().flatten(1)
        down = tensors[f"{site.lora}.lora_down.weight"].double().flatten(1)
        u, s, vh = torch.linalg.svd(3.0 / RANK * up @ down, full_matrices=False)
        u, s, vh = u[:, :RANK], s[:RANK], vh[:RANK]
        score = torch.log10(s * rescale)
        for name, share in given.items():
            term = {"fro_ckpt": w.square().sum().sqrt(), "spn_ckpt": torch.linalg.svdvals(w)[0],
                    "fro_lora": s.square().sum().sqrt(), "spn_lora": s[0],
                    "params": torch.tensor(float(sum(w.shape))),
                    "subspace": torch.einsum("oi,oj,ij->i", u, w, vh).abs()}[name]  # fmt: skip
            score = score - float(share) / total * torch.log10(term)
        kept = score >= thr
        if kept.any():
            found[site.lora] = rescale * (u[:, kept] * s[kept]) @ vh[kept]
    return found


@pytest.mark.parametrize(
    "recipe",
    [
        "fro_ckpt=1,thr=-3.55",
        "spn_ckpt,spn_lora=2,thr=-1.7,rescale=0.5",
        "subspace,fro_ckpt,thr=-2",
        *(
            pytest.param(recipe, marks=pytest.mark.slow)
            for recipe in (
                "spn_ckpt,thr=-3",
                "fro_lora=1,spn_lora=2,thr=-1.5",
                "params,thr=-4",
                "fro_ckpt=2,spn_lora=1,thr=-1.7,rescale=0.5",
                "subspace,thr=-1",
            )
        ),
    ],
)
def test_what_is_kept_is_what_the_formula_keeps(
    recipe: str, files: tuple[Checkpoint, Path, list[Site]], tmp_path: Path
) -> None:
    base, lora, sites = files
    wanted = plain(base, lora, sites, recipe)
    (parsed,) = recipes(recipe)
    done = resize(lora, [(tmp_path / "o.safetensors", parsed)], base=base, dtype="F32")[0]
    after = {n.removesuffix(".weight"): e.dense() for n, e in
             read_adapter(tmp_path / "o.safetensors").entries.items()}  # fmt: skip
    zero = {name for name, change in after.items() if not change.any()}  # beside q, k, v
    assert set(after) - zero == set(wanted)
    assert 0.02 * RANK * len(sites) < sum(done.ranks) < 0.98 * RANK * len(sites)
    for name, change in wanted.items():
        assert (after[name].flatten(1) - change).norm() < 1e-5 * change.norm(), name


@pytest.mark.parametrize(
    "recipe", ["fro_lora,size=0.4", "spn_lora,size=0.2,per_byte", "params,size=9"]
)
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_a_file_of_a_given_size_is_no_larger_and_hardly_smaller(
    recipe: str, dtype: str, files: tuple[Checkpoint, Path, list[Site]], tmp_path: Path
) -> None:
    _, lora, sites = files
    (parsed,) = recipes(recipe)
    out = tmp_path / "o.safetensors"
    done = resize(lora, [(out, parsed)], dtype=dtype)[0]
    assert parsed.size is not None
    limit = parsed.size * 2**20
    assert out.stat().st_size <= limit
    if sum(done.ranks) < RANK * len(sites):
        assert out.stat().st_size > limit - 12_000
    else:
        assert limit > 2**22


def test_by_byte_more_change_fits_into_the_same_size(
    files: tuple[Checkpoint, Path, list[Site]], tmp_path: Path
) -> None:
    _, lora, _ = files
    both: list[Resized] = []
    for recipe in ("params=1e-9,size=0.3", "params=1e-9,size=0.3,per_byte"):
        (parsed,) = recipes(recipe)
        flat = Recipe(recipe, {}, None, parsed.size, 1.0, parsed.per_byte)
        both += resize(lora, [(tmp_path / f"{len(both)}.safetensors", flat)])
    assert both[1].error < both[0].error


def test_the_best_come_first_over_all_modules() -> None:
    orders = [torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])]
    best = foremost(orders)
    assert [k.tolist() for k in leading(best, 3, [2, 2])] == [[0, 1], [0]]
    assert [k.tolist() for k in leading(best, 1, [2, 2])] == [[0], []]


def test_norms_are_kept_by_the_hash_of_the_file(
    files: tuple[Checkpoint, Path, list[Site]], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _, sites = files
    few = {site.lora: site for site in sites[:4]}
    for name, order in (("fro_ckpt", "fro"), ("spn_ckpt", 2)):
        for lora, found in norms(base, few, name).items():
            assert found == pytest.approx(
                float(torch.linalg.norm(weight(base, few[lora]), order)), rel=1e-5
            )
    (file,) = (cache / "recast" / "norms").iterdir()
    assert file.stem == hashlib.sha256(base.path.read_bytes()).hexdigest()
    marked = json.loads(file.read_text(encoding="utf-8"))
    marked["fro_ckpt"][sites[0].lora] = 123.0
    file.write_text(json.dumps(marked), encoding="utf-8")
    assert norms(base, few, "fro_ckpt")[sites[0].lora] == 123.0  # read, not measured
    for broken in ("{", "[]", '{"version": 0}', '{"version": 1, "fro_ckpt": {"a": "x"}}'):
        file.write_text(broken, encoding="utf-8")
        assert norms(base, few, "fro_ckpt")[sites[0].lora] != 123.0
        assert len(json.loads(file.read_text(encoding="utf-8"))["fro_ckpt"]) == 4
    file.unlink()
    file.mkdir()  # cannot be written
    assert len(norms(base, few, "fro_ckpt")) == 4


@pytest.mark.parametrize(
    "text", ["thr=-3", "fro_ckpt", "fro_ckpt,thr=x", "fro_ckpt,thr=", "frob,thr=1", "params,size=0",
             "fro_ckpt=1,fro_lora=-1,thr=1", "fro_ckpt,thr=1:", "params,thr=1,per_byte",
             "params,thr=nan"],
)  # fmt: skip
def test_recipes_that_do_not_parse_are_refused(text: str) -> None:
    with pytest.raises(Refused, match="recipe"):
        recipes(text)


def test_scores_want_the_checkpoint_that_the_file_names(
    files: tuple[Checkpoint, Path, list[Site]], tmp_path: Path
) -> None:
    base, lora, _ = files
    (recipe,) = recipes("fro_ckpt,thr=-3")
    out = tmp_path / "o.safetensors"
    with pytest.raises(Refused, match="--model"):
        resize(lora, [(out, recipe)])
    other = tmp_path / "named.safetensors"
    save_file(load_file(lora), other, {"ss_new_sd_model_hash": "ab" * 32})
    with pytest.raises(Refused, match=r"abababababab.*--any-base"):
        resize(other, [(out, recipe)], base=base)
    assert not out.exists()
    resize(other, [(out, recipe)], base=base, any_base=True)
    one = tiny.checkpoint(tmp_path / "one.safetensors", "sd15")
    with Checkpoint(one) as stranger, pytest.raises(Refused, match=r"of \d+ modules of"):
        resize(lora, [(out, recipe)], base=stranger, force=True)


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_dora_becomes_the_lora_of_its_change(
    kind: str, on_output: bool, files: tuple[Checkpoint, Path, list[Site]], tmp_path: Path
) -> None:
    """LyCORIS' own merged weight, minus the base's: all of it at full rank, its best part below."""
    from lycoris.modules.locon import LoConModule

    base, _, sites = files
    site = next(s for s in sites if s.kind == kind and s.rows is None and s.shape[0] != s.shape[1])
    out, into = site.shape[:2]
    layer: torch.nn.Module = torch.nn.Linear(into, out)
    if kind == "conv":
        layer = torch.nn.Conv2d(into, out, site.shape[2:], padding=1)
    torch.manual_seed(0)
    layer.weight.data = base[site.key].float()
    module = LoConModule(site.lora, layer, 1.0, 4, 2.0, weight_decompose=True, wd_on_out=on_output)
    for parameter in module.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    merged = module.get_merged_weight()[0].detach()
    state = {
        f"{site.lora}.{key}": tensor.contiguous()
        for key, tensor in module.state_dict().items()
        if not key.startswith("org")
    }
    save_file(state, tmp_path / "dora.safetensors")
    exact = (merged - layer.weight.data).flatten(1).double()
    for rank in (2, 6):
        cut_to = tmp_path / f"{rank}.safetensors"
        resize(
            tmp_path / "dora.safetensors", [(cut_to, cut(rank, None, None))], base=base, dtype="F32"
        )
        (entry,) = read_adapter(cut_to).entries.values()
        singular = torch.linalg.svdvals(exact)
        error = (entry.dense().flatten(1) - exact).norm()
        assert abs(error - singular[rank:].norm()) < 1e-5 * exact.norm()
    with pytest.raises(Refused, match=r"are DoRA, .* --model"):
        resize(tmp_path / "dora.safetensors", [(tmp_path / "x.safetensors", cut(2, None, None))])
