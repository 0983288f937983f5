"""Image figures against slow references and pictures whose answer is known."""

import base64
import io
import math

import pytest
import torch
from PIL import Image

from recast.evaluate.agreement import agreement
from recast.evaluate.metrics import (
    PSNR_CAP,
    colour_entropy,
    psnr,
    spectrum_slope,
    ssim,
    statistics,
    total_variation,
)
from recast.evaluate.pictures import embedded, png, sheet, shots, size_of


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_a_known_error() -> None:
    a = torch.zeros(2, 3, 16, 16)
    b = a + torch.tensor([0.2, 0.0])[:, None, None, None]
    assert psnr(a, b).tolist() == pytest.approx([20.0, PSNR_CAP])


def test_ssim_is_one_for_equals_and_matches_the_formula_written_out() -> None:
    a = (noise(1, 3, 16, 12) / 3).clamp(-1, 1)
    b = (a + noise(1, 3, 16, 12, seed=1) / 10).clamp(-1, 1)
    assert ssim(a, a).item() == pytest.approx(1)
    taps = [math.exp(-(k**2) / 4.5) for k in range(-5, 6)]
    values = []
    for c in range(3):
        for y in range(5, 11):
            for x in range(5, 7):
                weights, pairs = [], []
                for i in range(11):
                    for j in range(11):
                        weights.append(taps[i] * taps[j])
                        pairs.append(
                            (
                                a[0, c, y + i - 5, x + j - 5].item(),
                                b[0, c, y + i - 5, x + j - 5].item(),
                            )
                        )
                total = sum(weights)
                ma, mb = (
                    sum(w * p[k] for w, p in zip(weights, pairs, strict=True)) / total
                    for k in (0, 1)
                )
                va, vb = (
                    sum(w * p[k] ** 2 for w, p in zip(weights, pairs, strict=True)) / total - m * m
                    for k, m in ((0, ma), (1, mb))
                )
                ab = (
                    sum(w * p[0] * p[1] for w, p in zip(weights, pairs, strict=True)) / total
                    - ma * mb
                )
                top = (2 * ma * mb + 0.02**2) * (2 * ab + 0.06**2)
                values.append(top / ((ma**2 + mb**2 + 0.02**2) * (va + vb + 0.06**2)))
    assert ssim(a, b).item() == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_collapse_figures_tell_fog_and_noise_apart() -> None:
    fog = torch.full((1, 3, 32, 32), 0.3)
    static = noise(1, 3, 32, 32).clamp(-1, 1)
    smooth = torch.linspace(-1, 1, 32).expand(1, 3, 32, 32)
    assert (
        total_variation(fog).item()
        == 0
        < total_variation(smooth).item()
        < total_variation(static).item()
    )
    assert colour_entropy(fog).item() == 0
    assert colour_entropy(smooth).item() == pytest.approx(3, abs=0.01)
    assert colour_entropy(static).item() > 6
    assert abs(spectrum_slope(static).item()) < 0.5
    assert spectrum_slope(smooth).item() < -1


def test_statistics_take_pictures_of_any_size() -> None:
    found = statistics([torch.zeros(3, 16, 16), torch.ones(3, 24, 16)])
    assert (found.brightness, found.contrast, found.saturation) == (0.5, 0, 0)
    with pytest.raises(ValueError, match="no pictures"):
        statistics([])


def test_agreement_is_the_mean_of_decibels() -> None:
    base = [torch.zeros(3, 16, 16)] * 2
    found = agreement(base, [base[0] + 0.2, base[0] + 0.02])
    assert found.each == pytest.approx((20, 40))
    assert (found.mean, found.spread, found.worst) == pytest.approx((30, 10, 20))
    with pytest.raises(ValueError, match="argument 2"):
        agreement(base, base[:1])


def test_pictures_become_png_and_a_sheet() -> None:
    picture = torch.zeros(3, 20, 30)
    picture[0] = 2.0
    data = png(picture)
    assert size_of(data) == (30, 20)
    made = shots(["a"], [0], [picture], [picture])
    assert made[0].wrong is None
    assert Image.open(io.BytesIO(data)).getpixel((0, 0)) == (255, 128, 128)
    wide, high = size_of(sheet(made, ("original", "converted"), side=32, gap=4))
    assert (wide > 32, high) == (True, 2 * 36 + 4)


def test_large_pictures_are_embedded_small() -> None:
    small, large = png(torch.zeros(3, 64, 64)), png(torch.zeros(3, 600, 1024))
    assert embedded(small) == "data:image/png;base64," + base64.b64encode(small).decode()
    kind, _, data = embedded(large).partition(",")
    assert kind == "data:image/webp;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (512, 300)
