"""How far weights moved: sums by block, their order, the picture."""

import io

import numpy as np
import pytest
from PIL import Image
from tests import tiny

from recast.evaluate.track import by_block, change_png, place
from recast.layout import open_checkpoint
from recast.layout.detect import detect


def test_norms_of_a_block_add_in_squares_and_come_in_the_network_s_order() -> None:
    found = by_block([("OUT00", 9.0), ("TE1.L00", 1.0), ("IN04", 4.0), ("OUT00", 16.0)])
    assert list(found.items()) == [("TE1.L00", 1.0), ("IN04", 2.0), ("OUT00", 5.0)]


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_every_block_has_its_place(family: str, tmp_path) -> None:
    path = tiny.checkpoint(tmp_path / "m.safetensors", family)
    with open_checkpoint(path) as file:
        blocks = list(dict.fromkeys(site.block for site in detect(file).sites("every")))
    order = sorted(blocks, key=place)
    assert len({place(block) for block in blocks}) == len(blocks)
    assert order.index("IN") < order.index("IN01") < order.index("MID0") < order.index("OUT00")
    assert order[-1] == "OUT"
    assert order.index("TE1.EMB") < order.index("TE1.L00") < order.index("TE1.NORM")


def test_the_picture_is_darker_where_a_block_moved_further() -> None:
    steps = [10, 20, 30]
    norms = {"IN01": [0.001, 0.001, 0.001], "OUT08": [0.1, 0.5, 1.0]}
    picture = Image.open(io.BytesIO(change_png(steps, norms))).convert("L")
    grey = np.asarray(picture).astype(float)
    lower = grey[grey.shape[0] * 2 // 3 : grey.shape[0] * 7 // 8, grey.shape[1] // 3]
    assert lower.min() < 60  # OUT08's row
    assert picture.width > 400
    assert change_png([1], {"OUT": [0.0]})[:4] == b"\x89PNG"
    assert change_png(steps, norms) == change_png(steps, norms)
