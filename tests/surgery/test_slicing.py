"""Slicing: alpha follows its module, strengths are exact, parts join again to the same file."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from recast.adapter import read_adapter
from recast.errors import Refused
from recast.surgery.slicing import Cutting, assemble, split_up
from recast.surgery.traits import TRAITS, Trait, named, read_traits

CONTENT = "lora_unet_output_blocks_0_1_transformer_blocks_0_attn1_to_q"
FEED = "lora_unet_output_blocks_0_1_transformer_blocks_0_ff_net_0_proj"
STYLE = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
TEXT1 = "lora_te1_text_model_encoder_layers_1_self_attn_q_proj"
TEXT1_OUT = "lora_te1_text_model_encoder_layers_1_self_attn_out_proj"
TEXT11 = "lora_te1_text_model_encoder_layers_10_mlp_fc1"
TEXT2 = "lora_te2_text_model_encoder_layers_0_mlp_fc1"
ALL = (CONTENT, FEED, STYLE, TEXT1, TEXT1_OUT, TEXT11, TEXT2)


def lora(path: Path, names: tuple[str, ...] = ALL, alpha: float | None = 4.0, seed: int = 0,
         dtype: torch.dtype = torch.float16, **metadata: str) -> Path:  # fmt: skip
    made = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name in names:
        found[f"{name}.lora_up.weight"] = torch.randn(12, 8, generator=made).to(dtype)
        found[f"{name}.lora_down.weight"] = torch.randn(8, 10, generator=made).to(dtype)
        if alpha is not None:
            found[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(found, path, metadata or None)
    return path


def change(path: Path) -> dict[str, Tensor]:
    return {
        n.removesuffix(".weight"): e.dense().double() for n, e in read_adapter(path).entries.items()
    }


def cut_out(
    path: Path, out: Path, *names: str, strength: float = 1.0, file: Path | None = None
) -> Path:
    assemble([Cutting(path, tuple(named(names, file)), strength)], out)
    return out


def traits_file(path: Path, **traits: dict[str, list[str]]) -> Path:
    path.write_text(json.dumps(traits), encoding="utf-8")
    return path


def test_alpha_follows_its_module_even_where_a_blacklist_names_it(tmp_path: Path) -> None:
    """blora_for_kohya's own traits delete it, and the slice is r / alpha = 2 times too strong."""
    stock = {"whitelist": ["lora_unet_output_blocks_0_1_"],
             "blacklist": ["ff_net", "proj_in", "proj_out", "alpha"]}  # fmt: skip
    traits = traits_file(tmp_path / "t.json", content=stock)
    source = lora(tmp_path / "a.safetensors")
    out = cut_out(source, tmp_path / "o.safetensors", "content", file=traits)
    before, after = load_file(source), load_file(out)
    assert set(after) == {key for key in before if key.startswith(f"{CONTENT}.")}
    assert all(torch.equal(before[key], after[key]) for key in after)
    assert torch.equal(change(out)[CONTENT], change(source)[CONTENT])


@pytest.mark.parametrize("strength", [0.5, -1.0, 0.3])
def test_a_strength_scales_the_change_by_exactly_that(strength: float, tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", dtype=torch.float32)
    out = cut_out(source, tmp_path / "o.safetensors", "style", strength=strength)
    wanted = strength * change(source)[STYLE]
    assert (change(out)[STYLE] - wanted).norm() <= 1e-6 * wanted.norm()


def test_patterns_are_pieces_of_names_or_globs(tmp_path: Path) -> None:
    """As substrings layer 1 takes 10 too, as blora_for_kohya does; a glob need not."""
    source = lora(tmp_path / "a.safetensors")
    sub = {"whitelist": ["lora_te1_text_model_encoder_layers_1"]}
    glob = {"whitelist": ["lora_te1_*_layers_1_*"], "blacklist": ["*out_proj"]}
    traits = traits_file(tmp_path / "t.json", sub=sub, glob=glob)
    taken = change(cut_out(source, tmp_path / "s.safetensors", "sub", file=traits))
    assert set(taken) == {TEXT1, TEXT1_OUT, TEXT11}
    taken = change(cut_out(source, tmp_path / "g.safetensors", "glob", file=traits))
    assert set(taken) == {TEXT1, TEXT1_OUT}
    assert taken[TEXT1].norm() > 0
    assert taken[TEXT1_OUT].norm() == 0  # beside q, for diffusers


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors")
    with pytest.raises(Refused, match="leave the rest"):
        assemble([Cutting(source, (Trait(("lora_up",)),))], tmp_path / "o.safetensors")


def test_parts_join_to_the_same_tensors(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors")
    parts = split_up(source, tmp_path / "parts")
    assert [file.name for file in parts.files] == [
        "unet.safetensors",
        "te1.safetensors",
        "te2.safetensors",
    ]
    assert sum(parts.modules.values()) == len(ALL)
    assemble([Cutting(file) for file in parts.files], tmp_path / "again.safetensors")
    before, after = load_file(source), load_file(tmp_path / "again.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_text_encoders_of_another_file_keep_their_scale(
    alpha: float | None, tmp_path: Path
) -> None:
    """One alpha in the file, and the same changes: what each was in its own file."""
    one = lora(tmp_path / "a.safetensors", ss_network_dim="8", ss_network_alpha="4")
    other = lora(tmp_path / "b.safetensors", alpha=alpha, seed=1, dtype=torch.float32)
    out = tmp_path / "o.safetensors"
    done = assemble([Cutting(one)], out, texts=other)
    assert done.modules == {one: 3, other: 4}
    first, second, both = change(one), change(other), change(out)
    for name in ALL:
        wanted = (second if name.startswith("lora_te") else first)[name]
        assert (both[name] - wanted).norm() <= 1e-3 * wanted.norm()
    assert len({float(t) for key, t in load_file(out).items() if key.endswith("alpha")}) == 1


def test_metadata_and_hash_are_true(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", ss_network_dim="8", sshs_model_hash="0", ss_tags="x",
                  **{"modelspec.hash_sha256": "0x0"})  # fmt: skip
    out = cut_out(source, tmp_path / "o.safetensors", "te")
    with safe_open(out, "pt") as file:
        about = file.metadata()
    header = int.from_bytes(out.read_bytes()[:8], "little")
    assert about["sshs_model_hash"] == hashlib.sha256(out.read_bytes()[8 + header :]).hexdigest()
    assert about["ss_network_dim"] == "8"
    assert about["ss_tags"] == "x"
    assert "modelspec.hash_sha256" not in about
    assert json.loads(about["recast.slice"])[0]["modules"] == 4


def test_what_is_no_plain_change_is_kept_whole_or_refused(tmp_path: Path) -> None:
    source = lora(tmp_path / "a.safetensors", (CONTENT, STYLE))
    tensors = load_file(source) | {f"{STYLE}.dora_scale": torch.ones(12, 1)}
    save_file(tensors, source)
    out = cut_out(source, tmp_path / "o.safetensors", "style")
    assert torch.equal(load_file(out)[f"{STYLE}.dora_scale"], torch.ones(12, 1))
    with pytest.raises(Refused, match="strength"):
        cut_out(source, tmp_path / "p.safetensors", "style", strength=0.5)


def test_refusals_write_nothing(tmp_path: Path) -> None:
    source, other = lora(tmp_path / "a.safetensors"), lora(tmp_path / "b.safetensors", seed=1)
    out = tmp_path / "o.safetensors"
    with pytest.raises(Refused, match=r"both hold .* recast join"):
        assemble([Cutting(source), Cutting(other)], out)
    with pytest.raises(Refused, match="none of its 7 modules"):
        assemble([Cutting(source, (Trait(("nothing",)),))], out)
    with pytest.raises(Refused, match="did you mean style"):
        named(["stile"], None)
    pissa = lora(tmp_path / "p.safetensors", **{"recast.role": "pissa-init"})
    with pytest.raises(Refused, match=r"recast extract MODEL --initial .*p\.safetensors"):
        assemble([Cutting(pissa)], out)
    small = lora(tmp_path / "c.safetensors", ("lora_te_text_model_encoder_layers_0_mlp_fc1",))
    with pytest.raises(Refused, match="mixes architectures"):
        assemble([Cutting(source), Cutting(small)], out)
    flow = lora(tmp_path / "f.safetensors", (CONTENT,), **{"recast.objective": "flow"})
    eps = lora(tmp_path / "e.safetensors", (STYLE,), **{"recast.objective": "eps"})
    with pytest.raises(Refused, match="objectives"):
        assemble([Cutting(flow), Cutting(eps)], out)
    assert not out.exists()
    with pytest.raises(Refused, match="no module of te2"):
        split_up(flow, tmp_path / "parts", {"te2": TRAITS["te2"]})


@pytest.mark.parametrize(
    "text", ["[]", "{}", "no json", '{"a": {}}', '{"a": {"whitelist": "x"}}',
             '{"a": {"whitelist": ["x"], "greylist": []}}'],
)  # fmt: skip
def test_files_that_hold_no_traits_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(text, encoding="utf-8")
    with pytest.raises(Refused, match=r"t\.json"):
        read_traits(tmp_path / "t.json")
