"""Generated checkpoints: the spectrum asked for, the same bits for the same seed, every dtype."""

from pathlib import Path

import pytest
import torch
from tests import tiny

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout import detect, from_file, keymap
from recast.layout.generate import generate
from recast.layout.spectra import DRAWN, SPECTRA, draw


def reference(rows: int, columns: int, spectrum: str) -> torch.Tensor:
    """Singular values of a matrix that holds the whole law, made with full orthonormal factors."""
    made = torch.Generator().manual_seed(1)
    side, (share, power) = min(rows, columns), SPECTRA[spectrum]
    u = torch.linalg.qr(torch.randn(rows, side, generator=made))[0]
    v = torch.linalg.qr(torch.randn(columns, side, generator=made))[0]
    law = torch.arange(1.0, side + 1) ** -power
    low = u * (law / law.norm()) @ v.T
    noise = torch.randn(rows, columns, generator=made)
    return torch.linalg.svdvals(share**0.5 * low + (1 - share) ** 0.5 * noise / noise.norm())


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_spectrum_is_that_of_the_whole_law(spectrum: str) -> None:
    rows, columns = DRAWN + 128, 640
    weight = draw((rows, 160, 2, 2), spectrum, torch.Generator().manual_seed(2))
    assert weight.square().mean().item() == pytest.approx(1, abs=0.02)
    found = torch.linalg.svdvals(weight.flatten(1) / (rows * columns) ** 0.5)
    wanted = reference(rows, columns, spectrum)
    torch.testing.assert_close(found[:64], wanted[:64], rtol=0.06, atol=0)
    torch.testing.assert_close(found, wanted, rtol=0.15, atol=0)


def test_a_matrix_smaller_than_the_law_has_all_of_it() -> None:
    weight = draw((4, 36), "steep", torch.Generator().manual_seed(0))
    assert weight.shape == (4, 36)
    with pytest.raises(Refused, match="spectrum"):
        draw((4, 4), "slope", torch.Generator())


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F8_E4M3"])
def test_a_tensor_depends_on_its_name_and_the_seed_alone(dtype: str, tmp_path: Path) -> None:
    plan = tiny.plan("sd15")
    first = generate(tmp_path / "a", plan, dtype=dtype, spectrum="half", seed=3)
    again = generate(tmp_path / "b", plan, dtype=dtype, spectrum="half", seed=3)
    other = generate(tmp_path / "c", plan, dtype=dtype, spectrum="half", seed=4)
    assert first == again != other
    generate(tmp_path / "d", plan, dtype=dtype, spectrum="half", seed=3, extras=False)
    with Checkpoint(tmp_path / "a") as whole, Checkpoint(tmp_path / "d") as bare:
        assert len(bare) < len(whole)
        assert all(bare.raw(key) == whole.raw(key) for key in bare)
        for key in whole:
            assert torch.isfinite(whole[key].float()).all()


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_network_of_such_weights_neither_dies_nor_explodes(spectrum: str, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    generate(tmp_path / "a", tiny.plan("sd15"), dtype="F16", spectrum=spectrum)
    with Checkpoint(tmp_path / "a") as file, torch.no_grad():
        layout = detect(file)
        unet = UNet2DConditionModel(**layout.unet)
        unet.load_state_dict({k: v.float() for k, v in from_file(keymap(layout), file, "unet")})
        made = torch.Generator().manual_seed(0)
        context = torch.randn(1, 7, layout.unet["cross_attention_dim"], generator=made)
        answer = unet(torch.randn(1, 4, 8, 8, generator=made), torch.tensor(500), context).sample
    assert 0.05 < answer.square().mean().sqrt().item() < 20
