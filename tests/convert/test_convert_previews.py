"""Figures of previews: the judge's in the pocket world, those without weights elsewhere."""

from pathlib import Path

import pytest
import torch
from tests.evaluate.test_judges import make

from recast.convert.fixed import Originals, read_originals, write_originals
from recast.convert.previews import judged, write_sheet
from recast.pocket.world import caption, render, scenes
from recast.recipe import load, override
from recast.text.encode import Condition

NOTHING = Condition(torch.zeros(4, 2, 3), torch.ones(4, 5))


def pictures(marked: bool, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return render(scenes()[100:1300:300], generator, marked)


@pytest.fixture
def originals() -> Originals:
    prompts = tuple(caption(scene) for scene in scenes()[100:1300:300])
    return Originals(
        prompts, (1, 2, 3, 4), (True, False, True, False), pictures(False), NOTHING, NOTHING
    )


def test_the_judge_looks_at_pocket_previews(originals: Originals) -> None:
    found = judged(load(), originals, list(pictures(False)), "cpu")
    assert found == {"psnr": 100, "alignment": 1, "retention": 1, "watermark": 0}
    found = judged(load(), originals, list(pictures(True, seed=1)), "cpu")
    assert found["psnr"] < 40
    assert found["watermark"] == 1
    found = judged(load(), originals, list(pictures(False).flip(0)), "cpu")
    assert found["alignment"] == found["retention"] == 0


def test_other_previews_are_told_by_figures_without_weights(originals: Originals) -> None:
    strange = Originals("abcd", *(getattr(originals, n) for n in REST))  # type: ignore[arg-type]
    found = judged(load(), strange, list(pictures(False)), "cpu")
    assert found == {
        "psnr": 100, "colours": 0, "colour entropy": 0, "spectrum slope": 0, "sharpness": 1,
        "saturation": 1,
    }  # fmt: skip


REST = ("seeds", "seen", "images", "condition", "negative")


def test_a_clip_of_the_user_scores_previews(originals: Originals, tmp_path: Path) -> None:
    folder = make(tmp_path)
    judges = [str(folder / "clip"), str(folder / "dinov2")]
    recipe = override(load(), judges=judges)
    found = judged(recipe, originals, list(pictures(False)), "cpu")
    assert set(found) == {"psnr", "alignment", "retention", "watermark", "CLIP score"}


def test_originals_come_back_and_previews_lie_below_them(
    originals: Originals, tmp_path: Path
) -> None:
    from PIL import Image

    (tmp_path / "watch").mkdir()
    write_originals(tmp_path / "watch" / "previews.safetensors", originals, {"a": "b"})
    again = read_originals(tmp_path / "watch" / "previews.safetensors")
    for name in ("prompts", "seeds", "seen"):
        assert getattr(again, name) == getattr(originals, name)
    assert (again.images - originals.images).abs().max() < 1e-3
    assert torch.equal(again.negative.pooled, NOTHING.pooled)  # type: ignore[arg-type]
    path = write_sheet(tmp_path, 7, again, list(pictures(True)))
    assert path == tmp_path / "previews" / "step00000007.png"
    sheet = Image.open(path).convert("RGB")
    assert sheet.height == 2 * (128 + 8) + 8
    assert sheet.width > 4 * (128 + 8)
