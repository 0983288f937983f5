"""Bucket sizes, the choice of one, and the plan that fits a picture into it."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from PIL import Image

from recast.data.buckets import apply, aspects, fit, square
from recast.errors import Refused

sides = st.integers(1, 5000)


def test_sdxl_sizes_are_the_published_ones() -> None:
    sizes = aspects(1024, low=512, high=2048).sizes
    for size in [(1024, 1024), (1152, 896), (896, 1152), (1216, 832), (1344, 768), (1536, 640)]:
        assert size in sizes
    assert all(w % 64 == h % 64 == 0 and w * h <= 1024 * 1024 for w, h in sizes)


@given(sides, sides)
def test_choice_has_the_nearest_aspect(width: int, height: int) -> None:
    table = aspects(512)
    chosen = table.choose((width, height))
    turned = table.choose((height, width))
    assert chosen in table.sizes
    ratio = width / height

    def distance(size: tuple[int, int]) -> float:
        return max(ratio / (size[0] / size[1]), size[0] / size[1] / ratio)

    assert distance(chosen) <= min(map(distance, table.sizes)) * (1 + 1e-9)
    assert turned[0] * turned[1] == chosen[0] * chosen[1]


def test_without_upscaling() -> None:
    table = aspects(512, upscale=False)
    assert table.choose((300, 200)) == (256, 192)
    assert table.choose((2000, 1000)) in table.sizes
    with pytest.raises(Refused, match="smaller than one bucket step"):
        table.choose((40, 400))


@given(sides, sides, st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_a_fit_covers_its_target(w: int, h: int, tw: int, th: int, x: float, y: float) -> None:
    plan = fit((w, h), (tw * 8, th * 8), at=(x, y))
    for scaled, corner, target in zip(plan.scaled, plan.corner, plan.target, strict=True):
        assert 0 <= corner <= scaled - target
    slack = [s - t for s, t in zip(plan.scaled, plan.target, strict=True)]
    assert min(slack) <= 1


def test_size_ids_are_height_first() -> None:
    plan = fit((2000, 1000), (1024, 1024))
    assert plan.scaled == (2048, 1024)
    assert plan.ids == (1000, 2000, 0, 512, 1024, 1024)


def test_apply_cuts_where_the_plan_says() -> None:
    picture = Image.new("RGB", (32, 16), "red")
    picture.paste("blue", (16, 0, 32, 16))
    left, right = (apply(picture, fit((32, 16), (16, 16), at=(x, 0))) for x in (0.0, 1.0))
    assert left.size == right.size == (16, 16)
    assert left.getpixel((15, 8)) == (255, 0, 0)
    assert right.getpixel((0, 8)) == (0, 0, 255)


def test_one_square_bucket() -> None:
    table = square(64)
    assert table.choose((900, 100)) == (64, 64)


@pytest.mark.parametrize(
    "settings",
    [
        {"side": 512, "step": 10},
        {"side": 512, "low": 600, "high": 500},
        {"side": 0},
        {"side": 99999},
        {"side": 512, "low": 2000, "high": 2048},
    ],
)
def test_absurd_settings_are_refused(settings: dict) -> None:
    with pytest.raises(Refused):
        aspects(**settings)
