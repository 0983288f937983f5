"""The adapter file: names and metadata as trainers write them, and strict reading."""

import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recast.adapter import Adapter, read_adapter, write_adapter
from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.lowrank import Full, LowRank, factorize

META = {
    "recast.role": "pissa-init",
    "recast.base_sha256": "ab" * 32,
    "recast.family": "sdxl",
    "recast.objective": "eps",
    "recast.rank_rule": "fixed",
}


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def adapter() -> Adapter:
    return Adapter(
        {
            "lora_unet_input_blocks_1_1_proj_in.weight": factorize(values(8, 6), 4),
            "lora_unet_input_blocks_1_0_in_layers_2.weight": factorize(values(8, 5, 3, 3), 4),
            "lora_unet_input_blocks_3_0_skip_connection.weight": factorize(values(3, 9, 1, 1), 4),
            "lora_unet_out_0.weight": Full(values(8)),
            "lora_unet_out_0.bias": Full(values(8, seed=1)),
            "lora_unet_out_2.weight": Full(values(4, 8, 3, 3)),
        },
        META,
    )


def test_names_shapes_and_one_fp32_alpha(tmp_path: Path, adapter: Adapter) -> None:
    write_adapter(tmp_path / "a.safetensors", adapter, dtype="BF16")
    file = load_file(tmp_path / "a.safetensors")
    shapes = {key: tuple(tensor.shape) for key, tensor in file.items()}
    assert shapes == {
        "lora_unet_input_blocks_1_1_proj_in.lora_up.weight": (8, 4),
        "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": (4, 6),
        "lora_unet_input_blocks_1_1_proj_in.alpha": (),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": (8, 4, 1, 1),
        "lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": (4, 5, 3, 3),
        "lora_unet_input_blocks_1_0_in_layers_2.alpha": (),
        "lora_unet_input_blocks_3_0_skip_connection.lora_up.weight": (3, 4, 1, 1),
        "lora_unet_input_blocks_3_0_skip_connection.lora_down.weight": (4, 9, 1, 1),
        "lora_unet_input_blocks_3_0_skip_connection.alpha": (),
        "lora_unet_out_0.diff": (8,),
        "lora_unet_out_0.diff_b": (8,),
        "lora_unet_out_2.diff": (4, 8, 3, 3),
    }
    alphas = [tensor for key, tensor in file.items() if key.endswith(".alpha")]
    assert {(a.dtype, a.item()) for a in alphas} == {(torch.float32, 4.0)}


def test_metadata_is_what_trainers_write(tmp_path: Path, adapter: Adapter) -> None:
    path = tmp_path / "a.safetensors"
    sha256 = write_adapter(path, adapter, metadata={"recast.recipe": "default"})
    data = path.read_bytes()
    assert sha256 == hashlib.sha256(data).hexdigest()
    (length,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + length])["__metadata__"]
    assert found["ss_network_module"] == "lycoris.kohya"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "4.0")
    assert json.loads(found["ss_network_args"])["algo"] == "locon"
    assert found["ss_base_model_version"] == "sdxl_base_v1-0"
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert len(found["sshs_legacy_hash"]) == 8
    assert found["recast.recipe"] == "default"
    assert META.items() <= found.items()


def test_legacy_hash_is_that_of_the_file_with_only_trainer_metadata(tmp_path: Path) -> None:
    big = Adapter({"lora_unet_a.weight": Full(values(600, 600))}, {"recast.role": "full"})
    write_adapter(tmp_path / "a.safetensors", big)
    with Checkpoint(tmp_path / "a.safetensors") as file:
        found = dict(file.metadata)
    plain = {k: v for k, v in found.items() if k.startswith("ss_")}
    save_file({"lora_unet_a.diff": values(600, 600)}, tmp_path / "b.safetensors", plain)
    window = (tmp_path / "b.safetensors").read_bytes()[0x100000:0x110000]
    assert found["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_round_trip_is_exact_in_fp32(tmp_path: Path, adapter: Adapter) -> None:
    write_adapter(tmp_path / "a.safetensors", adapter)
    back = read_adapter(tmp_path / "a.safetensors")
    assert back.entries.keys() == adapter.entries.keys()
    assert (back.role, back.base, back.rank) == ("pissa-init", "ab" * 32, 4)
    for name, entry in adapter.entries.items():
        same = back.entries[name]
        if isinstance(entry, LowRank) and isinstance(same, LowRank):
            assert torch.equal(entry.up, same.up)
            assert torch.equal(entry.down, same.down)
        else:
            assert torch.equal(entry.dense(), same.dense())


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, adapter: Adapter) -> None:
    assert write_adapter(tmp_path / "a", adapter) == write_adapter(tmp_path / "b", adapter)


def test_mixed_ranks_share_the_commonest_as_alpha(tmp_path: Path) -> None:
    mixed = Adapter(
        {
            "x.weight": factorize(values(8, 6), 2),
            "y.weight": factorize(values(8, 6), 5),
            "z.weight": factorize(values(8, 6, seed=1), 5),
        }
    )
    write_adapter(tmp_path / "a.safetensors", mixed)
    file = load_file(tmp_path / "a.safetensors")
    assert {file[f"{name}.alpha"].item() for name in "xyz"} == {5.0}
    assert file["x.lora_down.weight"].shape == (2, 6)
    back = read_adapter(tmp_path / "a.safetensors")
    assert back.metadata["ss_network_dim"] == "Dynamic"
    assert back.metadata["ss_network_alpha"] == "5.0"
    for name, entry in mixed.entries.items():
        torch.testing.assert_close(back.entries[name].dense(), entry.dense())


def test_foreign_scales_are_folded_in(tmp_path: Path) -> None:
    up, down = values(8, 4), values(4, 6, seed=1)
    pair = {"a.lora_up.weight": up, "a.lora_down.weight": down}
    save_file({**pair, "a.alpha": torch.tensor([2.0])}, tmp_path / "half.safetensors")
    save_file({k: v.half() for k, v in pair.items()}, tmp_path / "none.safetensors")
    half, none = (
        read_adapter(tmp_path / "half.safetensors"),
        read_adapter(tmp_path / "none.safetensors"),
    )
    assert half.role == "delta"
    assert half.base is None
    torch.testing.assert_close(half.entries["a.weight"].dense(), up @ down / 2)
    torch.testing.assert_close(
        none.entries["a.weight"].dense(), up.half().float() @ down.half().float()
    )


def test_norms_in_lycoris_names_are_read(tmp_path: Path) -> None:
    save_file({"a.w_norm": values(8), "a.b_norm": values(8, seed=1)}, tmp_path / "n.safetensors")
    back = read_adapter(tmp_path / "n.safetensors")
    assert torch.equal(back.entries["a.weight"].dense(), values(8))
    assert torch.equal(back.entries["a.bias"].dense(), values(8, seed=1))


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (["a.lora_mid.weight"], "does not meet"),
        (["a.hada_w1_a"], r"a\.hada_w1_a"),
        (["a.dora_scale"], r"a\.dora_scale"),
        (["model.diffusion_model.out.2.weight"], "1 keys"),
        (["b.lora_up.weight"], "not both factors"),
        (["b.alpha"], "not both factors"),
        (["a.diff"], "apply only one"),
        (["c.diff", "c.w_norm"], "apply only one"),
    ],
)
def test_unknown_and_incomplete_keys_are_refused_by_name(
    tmp_path: Path, odd: list[str], words: str
) -> None:
    file = {"a.lora_up.weight": values(8, 4), "a.lora_down.weight": values(4, 6)}
    save_file({**file, **{key: values(2) for key in odd}}, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match=words):
        read_adapter(tmp_path / "a.safetensors")


def test_factors_that_do_not_meet_are_refused(tmp_path: Path) -> None:
    file = {"a.lora_up.weight": values(8, 4), "a.lora_down.weight": values(3, 6)}
    save_file(file, tmp_path / "a.safetensors")
    with pytest.raises(Refused, match="rank 4 and 3"):
        read_adapter(tmp_path / "a.safetensors")


AGAIN = """
import sys
from pathlib import Path
from recast.adapter import read_adapter, write_adapter
write_adapter(Path(sys.argv[2]), read_adapter(Path(sys.argv[1])))
"""


def test_reading_and_writing_again_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    """Found by killing a conversion: its patch had weights and biases in the order of a set."""
    entries = {
        f"lora_unet_out_{n}.{param}": Full(torch.full((3,), float(n)))
        for n in range(8)
        for param in ("weight", "bias")
    }
    write_adapter(tmp_path / "first.safetensors", Adapter(entries, {"recast.role": "full"}))
    written = []
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.safetensors"
        source = str(Path(__file__).parents[2] / "src")
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": source}
        files = [str(tmp_path / "first.safetensors"), str(path)]
        subprocess.run([sys.executable, "-c", AGAIN, *files], env=environment, check=True)
        written.append(path.read_bytes())
    assert written[0] == written[1]
