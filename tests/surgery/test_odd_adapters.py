"""Files that every verb on adapters refuses in one sentence: ranks of 0, NaN, no tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests import tiny

from recast.checkpoint import Checkpoint
from recast.cli import main

NAME = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
KEY = "model.diffusion_model.output_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
VERBS = {
    "resize": ["--rank", "2"],
    "chop": ["--keep", "OUT01"],
    "slice": ["--trait", "unet"],
    "join": [],
    "merge": [],
}


def factors(width: int, rank: int, bad: float = 1.0) -> dict[str, torch.Tensor]:
    up = torch.ones(width, rank)
    up[:1] = bad
    return {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": torch.ones(rank, width),
            f"{NAME}.alpha": torch.tensor(1.0)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and three files that are wrong, for the width that the model has there."""
    found = tmp_path_factory.mktemp("odd")
    with Checkpoint(tiny.checkpoint(found / "model.safetensors")) as model:
        width = model.specs[KEY].shape[0]
    save_file(factors(width, 0), found / "zero.safetensors")
    save_file(factors(width, 2, float("nan")), found / "nan.safetensors")
    save_file({}, found / "empty.safetensors", {"ss_base_model_version": "sdxl_base_v1-0"})
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("kind", "said"),
    [("zero", "has rank 0"), ("nan", "NaN or infinity"), ("empty", "has no tensors")],
)
def test_odd_files_are_refused_by_every_verb(
    verb: str, kind: str, said: str, folder: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    odd, model = folder / f"{kind}.safetensors", folder / "model.safetensors"
    given = [model, "--lora", odd] if verb == "merge" else [odd]
    with pytest.raises(SystemExit) as left:
        main([verb, *map(str, given), *VERBS[verb], "--out", str(tmp_path / "o.safetensors")])
    told = " ".join(capsys.readouterr().err.split())
    assert left.value.code == 2, told
    assert said in told
    assert list(tmp_path.iterdir()) == []
