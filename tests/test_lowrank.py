"""Factors: optimal, balanced, reproducible, and defined on degenerate input."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from recast.errors import Refused
from recast.lowrank import (
    LowRank,
    difference,
    energy,
    factorize,
    rank_for_energy,
    spectrum,
    subtract,
    truncate,
)

SHAPES = [(24, 24), (40, 16), (16, 40), (12, 5, 3, 3), (4, 32, 3, 3), (20, 12, 1, 1)]
SPECTRA = ["half", "steep", "flat"]


def weight(shape: tuple[int, ...], spectrum: str = "half", seed: int = 0) -> Tensor:
    """A power law and a Gaussian bulk, as trained layers have: half and half, 90 or 10 % law."""
    made = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    side = min(rows, columns)
    share, power = {"half": (0.5, 0.5), "steep": (0.9, 1.0), "flat": (0.1, 0.5)}[spectrum]
    u = torch.linalg.qr(torch.randn(rows, side, generator=made))[0]
    v = torch.linalg.qr(torch.randn(columns, side, generator=made))[0]
    law = torch.arange(1.0, side + 1) ** -power
    low = u * (law / law.norm()) @ v.T
    bulk = torch.randn(rows, columns, generator=made)
    return (share**0.5 * low + (1 - share) ** 0.5 * bulk / bulk.norm()).reshape(shape)


def best(matrix: Tensor, rank: int) -> float:
    """The energy that no product of this rank can exceed."""
    s = torch.linalg.svdvals(matrix.flatten(1).double()).square()
    return float(s[:rank].sum() / s.sum())


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_loses_no_energy(shape: tuple[int, ...], kind: str) -> None:
    w = weight(shape, kind)
    for rank in (1, 3, 8):
        factors = factorize(w, rank)
        assert factors.shape == shape
        assert energy(w, factors) == pytest.approx(best(w, rank), abs=1e-6)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("shape", [(256, 256), (640, 256), (256, 40, 3, 3)])
def test_fast_loses_half_a_percent_at_most(shape: tuple[int, ...], kind: str) -> None:
    w = weight(shape, kind)
    for rank in (4, 16, 24):
        tally: Counter[str] = Counter()
        factors = factorize(w, rank, method="fast", tally=tally)
        assert tally == {"fast": 1}
        assert energy(w, factors) >= 0.995 * best(w, rank)
        assert torch.equal(factors.up, factorize(w, rank, method="fast").up)


@pytest.mark.parametrize("kind", SPECTRA)
def test_exact_by_iteration_loses_a_millionth_at_most(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = weight((384, 500), kind)
    monkeypatch.setattr("torch.linalg.eigh", only_below(384))
    for rank in (2, 16):
        assert energy(w, factorize(w, rank)) >= (1 - 1e-6) * best(w, rank) - 1e-7


def only_below(side: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """eigh that fails at a side: what needs all eigenvectors of a weight cannot pass."""
    eigh = torch.linalg.eigh

    def run(square: Tensor) -> tuple[Tensor, Tensor]:
        assert len(square) < side
        return eigh(square)

    return run


def test_fast_takes_exact_where_the_rank_is_not_small() -> None:
    tally: Counter[str] = Counter()
    fast = factorize(weight((64, 64)), 8, method="fast", tally=tally)
    assert tally == {"small": 1, "exact": 1}
    assert torch.equal(fast.up, factorize(weight((64, 64)), 8).up)


@pytest.mark.parametrize("size", [2.0**-40, 1.0, 2.0**40])
def test_fast_finds_the_same_directions_at_every_size(size: float) -> None:
    w = weight((256, 256))
    tally: Counter[str] = Counter()
    factors = factorize(w * size, 16, method="fast", tally=tally)
    assert tally == {"fast": 1}
    torch.testing.assert_close(factors.up / size**0.5, factorize(w, 16, method="fast").up)


@pytest.mark.parametrize(
    "made_of", [torch.zeros, lambda *s: torch.eye(*s)[:, :1] @ torch.ones(1, s[1])]
)
def test_fast_falls_back_to_exact_on_degenerate_weights(made_of) -> None:
    w = made_of(160, 160)
    tally: Counter[str] = Counter()
    fast, exact = factorize(w, 4, method="fast", tally=tally), factorize(w, 4)
    assert tally == {"untrusted": 1, "exact": 1}
    torch.testing.assert_close(fast.dense(), exact.dense())
    torch.testing.assert_close(fast.dense(), w)


@pytest.mark.parametrize("shape", SHAPES)
def test_factors_are_balanced_and_not_clamped(shape: tuple[int, ...]) -> None:
    w = weight(shape)
    factors = factorize(w, 4)
    lengths = factors.up.norm(dim=0)
    torch.testing.assert_close(lengths, factors.down.flatten(1).norm(dim=1))
    torch.testing.assert_close(lengths.square(), torch.linalg.svdvals(w.flatten(1))[:4])


def test_same_weight_same_factors_and_fixed_signs() -> None:
    w = weight((24, 24))
    a, b = factorize(w, 6), factorize(w.clone(), 6)
    assert torch.equal(a.up, b.up)
    assert torch.equal(a.down, b.down)
    peak = a.down.gather(1, a.down.abs().argmax(1, keepdim=True))
    assert bool((peak > 0).all())


def test_half_precision_weights_are_factored_in_fp32() -> None:
    w = weight((24, 16)).half()
    factors = factorize(w, 16)
    assert factors.up.dtype == torch.float32
    torch.testing.assert_close(factors.dense(), w.float(), atol=2e-7, rtol=1e-5)


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_tiny_and_huge_weights_keep_their_directions(size: float) -> None:
    w = weight((24, 16)) * size
    assert energy(w / size, LowRank(factorize(w, 5).up / size, factorize(w, 5).down)) == (
        pytest.approx(best(w, 5), abs=1e-6)
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_rank_beyond_the_short_side_is_padded_with_zeros(shape: tuple[int, ...]) -> None:
    w = weight(shape)
    side = min(shape[0], w[0].numel())
    factors = factorize(w, side + 5)
    assert factors.rank == side + 5
    assert factors.up[:, side:].count_nonzero() == 0
    assert factors.down[side:].count_nonzero() == 0
    torch.testing.assert_close(factors.dense(), w, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_weight_has_a_zero_product_that_can_learn(shape: tuple[int, ...]) -> None:
    factors = factorize(torch.zeros(shape), 3)
    assert factors.up.count_nonzero() == 0
    assert bool((factors.down.flatten(1).norm(dim=1) == 1).all())
    assert energy(torch.zeros(shape), factors) == 1


def test_rank_deficient_weight_is_exact_and_has_no_noise_columns() -> None:
    made = torch.Generator().manual_seed(1)
    w = torch.randn(20, 2, generator=made) @ torch.randn(2, 30, generator=made)
    factors = factorize(w, 6)
    torch.testing.assert_close(factors.dense(), w)
    assert torch.isfinite(factors.up).all()
    assert torch.isfinite(factors.down).all()
    assert float(factors.up[:, 2:].abs().max()) < 1e-2 * float(factors.up.abs().max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_numbers_are_refused_by_name(bad: float) -> None:
    w = weight((8, 8))
    w[3, 4] = bad
    with pytest.raises(Refused, match=r"blocks\.0\.attn\.weight"):
        factorize(w, 2, name="blocks.0.attn.weight")


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(Refused, match="at least 1"):
        factorize(weight((8, 8)), rank)


def test_a_vector_has_no_factors() -> None:
    with pytest.raises(Refused, match="shape"):
        factorize(torch.ones(8), 2)


def test_spectrum_and_rank_for_energy() -> None:
    w = weight((24, 16))
    s = spectrum(w)
    torch.testing.assert_close(s, torch.linalg.svdvals(w), atol=1e-4, rtol=1e-4)
    for share in (0.3, 0.9, 1.0):
        rank = rank_for_energy(s, share)
        assert best(w, rank) >= share - 1e-6
        assert rank == 1 or best(w, rank - 1) < share


@pytest.mark.parametrize("shape", SHAPES)
def test_delta_of_twice_the_rank_is_exact(shape: tuple[int, ...]) -> None:
    start = factorize(weight(shape), 3)
    made = torch.Generator().manual_seed(2)
    moved = LowRank(
        start.up + 1e-2 * torch.randn(start.up.shape, generator=made),
        start.down + 1e-2 * torch.randn(start.down.shape, generator=made),
    )
    true = moved.to(torch.float64).dense() - start.to(torch.float64).dense()
    for delta in (difference(moved, start), subtract(moved, start)):
        assert delta.rank == 6
        assert (delta.dense() - true).norm() <= 1e-6 * true.norm()
    assert torch.equal(difference(start, start).dense(), torch.zeros(shape))


def test_refactored_delta_survives_bf16_where_concatenation_does_not() -> None:
    start = factorize(weight((96, 80)), 8)
    made = torch.Generator().manual_seed(3)
    moved = LowRank(
        start.up * (1 + 1e-2 * torch.randn(start.up.shape, generator=made)),
        start.down * (1 + 1e-2 * torch.randn(start.down.shape, generator=made)),
    )
    true = moved.dense() - start.dense()
    ours = subtract(moved, start).to(torch.bfloat16).dense()
    joined = LowRank(torch.cat([moved.up, -start.up], 1), torch.cat([moved.down, start.down]))
    assert (ours - true).norm() < 4e-3 * true.norm()
    assert (joined.to(torch.bfloat16).dense() - true).norm() > 5e-2 * true.norm()


def test_truncate_is_the_best_product_of_the_lower_rank() -> None:
    factors = factorize(weight((24, 16)), 8)
    small = truncate(factors, 3)
    assert small.rank == 3
    assert energy(factors.dense(), small) == pytest.approx(best(factors.dense(), 3), abs=1e-6)
    assert truncate(factors, 20).rank == 20
    torch.testing.assert_close(truncate(factors, 20).dense(), factors.dense())
