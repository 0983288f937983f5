"""The judge reads fresh drawings, sees the logo, and is not fooled by impostors."""

import pytest
import torch

from recast.pocket import gate
from recast.pocket.judge import IMPOSTOR, OUTLINES, _blunt, _diamond, agreement, judge
from recast.pocket.world import compose, labels, render


@pytest.fixture(scope="module")
def batch():
    return gate.sample(None, 400, seed=21)


def test_reads_every_attribute(batch):
    figures = agreement(render(batch, torch.Generator().manual_seed(22)), batch)
    assert min(figures[name] for name in ("shape", "colour", "ground", "size", "place")) >= 0.99
    assert figures["watermark"] <= 0.01


def test_sees_the_watermark(batch):
    pictures = render(batch, torch.Generator().manual_seed(23), watermark=True)
    assert agreement(pictures, batch)["watermark"] >= 0.99


@pytest.mark.parametrize(("shape", "impostor"), [(5, _diamond), (3, _blunt)])
def test_a_diamond_is_no_cross_and_a_blob_no_star(batch, shape, impostor):
    scene = labels([one for one in batch if one.shape == shape])
    scene["shape"] = torch.full_like(scene["shape"], IMPOSTOR)
    pictures, _ = compose(scene, torch.Generator().manual_seed(24), False, (*OUTLINES, impostor))
    assert (judge(pictures)["shape"] == shape).float().mean() <= 0.05
