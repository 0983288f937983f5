"""Split: residual + adapter are the original, in one pass, and say what they belong to."""

import errno
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests import tiny

from recast.adapter import (
    Adapter,
    decompose,
    read_adapter,
    rebuild,
    split,
    verify_rebuilt,
    verify_split,
    write_rebuilt,
    zeros_full,
)
from recast.checkpoint import Checkpoint, write_dict
from recast.errors import NoRoom, Refused
from recast.inspection import describe
from recast.layout import Site, detect
from recast.lowrank import LowRank


@pytest.fixture(scope="module", params=["sdxl", "sd15"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    with Checkpoint(tiny.checkpoint(folder / "o.safetensors", request.param, dtype="F16")) as found:
        yield found


def sites(checkpoint: Checkpoint) -> list[Site]:
    layout = detect(checkpoint)
    return layout.sites(",".join(["principal", *layout.text_parts]))


@pytest.mark.parametrize(
    ("adapter_dtype", "residual_dtype", "tolerance", "exact"),
    [("F16", None, 3e-4, 0.7), ("BF16", "F32", 1e-7, 1.0), ("F32", "F32", 1e-7, 1.0),
     ("BF16", "BF16", 3e-3, 0.1)],
)  # fmt: skip
def test_residual_and_adapter_add_up(
    original: Checkpoint,
    tmp_path: Path,
    adapter_dtype: str,
    residual_dtype: str | None,
    tolerance: float,
    exact: float,
) -> None:
    done = split(original, sites(original), 4, tmp_path / "out", adapter_dtype=adapter_dtype,
                 residual_dtype=residual_dtype)  # fmt: skip
    adapter = read_adapter(tmp_path / "out" / "adapter.safetensors")
    with Checkpoint(tmp_path / "out" / "residual.safetensors") as residual:
        verdict = verify_split(original, residual, adapter)
        assert verdict.passed
        assert verdict.worst.relative <= tolerance
        assert verdict.exact >= exact
        assert residual.specs.keys() == original.specs.keys()
        assert adapter.metadata["recast.residual_sha256"] == residual.sha256()
        assert residual.sha256() == done.residual_sha256
        changed = {site.key for site in sites(original)}
        for key in original.specs.keys() - changed:
            assert residual.raw(key) == original.raw(key)
    with Checkpoint(tmp_path / "out" / "adapter.safetensors") as file:
        assert file.sha256() == done.adapter_sha256
    assert adapter.base == original.sha256()
    assert adapter.role == "pissa-init"
    assert len(adapter.entries) == len(sites(original)) == len(done.energies)
    assert 0.05 < done.energy < 1
    assert adapter.metadata["recast.energy"] == f"{done.energy:.6f}"


def test_split_writes_the_factors_that_decompose_returns(
    original: Checkpoint, tmp_path: Path
) -> None:
    done = split(original, sites(original), 4, tmp_path, adapter_dtype="F32")
    read, made = (
        read_adapter(tmp_path / "adapter.safetensors"),
        decompose(original, sites(original), 4),
    )
    for name, entry in made.entries.items():
        same = read.entries[name]
        assert isinstance(entry, LowRank)
        assert isinstance(same, LowRank)
        assert torch.equal(entry.up, same.up)
        assert torch.equal(entry.down, same.down)
    assert float(made.metadata["recast.energy"]) == pytest.approx(done.energy, abs=1e-5)
    alphas = [v for k, v in load_file(tmp_path / "adapter.safetensors").items() if "alpha" in k]
    assert {a.item() for a in alphas} == {4.0}
    for key, tensor in rebuild(original, read, read):
        assert torch.equal(tensor, original[key])


def test_nothing_depends_on_the_order_of_the_sites(original: Checkpoint, tmp_path: Path) -> None:
    a = split(original, sites(original), 2, tmp_path / "a")
    b = split(original, reversed(sites(original)), 2, tmp_path / "b")
    assert (a.residual_sha256, a.adapter_sha256) == (b.residual_sha256, b.adapter_sha256)


def test_nothing_depends_on_how_many_threads_torch_has(
    original: Checkpoint, tmp_path: Path
) -> None:
    one = split(original, sites(original), 2, tmp_path / "1", method="fast")
    torch.set_num_threads(3)
    try:
        three = split(original, sites(original), 2, tmp_path / "3", method="fast")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert one == three


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "BF16", "F32"])
def test_originals_of_every_float_dtype(dtype: str, tmp_path: Path) -> None:
    """An fp8 original has an fp16 residual; each adds up, and gives its own bytes back."""
    path = tiny.checkpoint(tmp_path / "o.safetensors", "sd15", dtype=dtype)
    with Checkpoint(path) as file:
        assert describe(path)["dtypes"]
        split(file, sites(file), 4, tmp_path)
        adapter = read_adapter(tmp_path / "adapter.safetensors")
        changed = {site.key for site in sites(file)}
        with Checkpoint(tmp_path / "residual.safetensors") as residual:
            for key, spec in residual.specs.items():
                own = file.specs[key].dtype
                wide = key in changed and own.startswith("F8")
                assert spec.dtype == ("F16" if wide else own)
            verdict = verify_split(file, residual, adapter)
        assert verdict.passed
        assert verdict.tolerance == {"BF16": 3e-3, "F32": 1e-6}.get(dtype, 3e-4)
        if dtype.startswith("F8"):
            assert verdict.exact > 0.999
        for key, tensor in rebuild(file, adapter, adapter):
            assert tensor.dtype == file.specs[key].torch_dtype
            assert bytes(tensor.reshape(-1).view(torch.uint8).numpy()) == bytes(file.raw(key))
        moved = Adapter(
            {k: LowRank(e.up * 1.5, e.down) for k, e in adapter.entries.items()},
            {**adapter.metadata, "recast.role": "pissa-trained"},
        )
        write_rebuilt(file, adapter, moved, tmp_path / "new.safetensors")
        with Checkpoint(tmp_path / "new.safetensors") as new:
            assert verify_rebuilt(file, new, adapter, moved).exact == 1
            assert not verify_rebuilt(file, new).passed


def test_a_residual_beyond_its_dtype_is_refused(tmp_path: Path) -> None:
    source = tiny.checkpoint(tmp_path / "o.safetensors", "sd15")
    with Checkpoint(source) as file:
        tensors = dict(file)
        bad = sites(file)[3].key
        tensors[bad] = tensors[bad] * 1e7
        write_dict(tmp_path / "big.safetensors", tensors)
    with Checkpoint(tmp_path / "big.safetensors") as big:
        with pytest.raises(Refused, match=rf"{bad.replace('.', '[.]')}.*--residual-dtype"):
            split(big, sites(big), 1, tmp_path / "out", residual_dtype="F16")
        assert not list((tmp_path / "out").iterdir())
        split(big, sites(big), 1, tmp_path / "out", residual_dtype="BF16")


def test_the_sign_of_a_zero_is_no_difference(tmp_path: Path) -> None:
    path = tiny.checkpoint(tmp_path / "o.safetensors", "sd15", dtype="F16")
    with Checkpoint(path) as file:
        tensors = dict(file)
        tensors[sites(file)[0].key].view(-1)[0] = -0.0
        write_dict(tmp_path / "minus.safetensors", tensors)
    with Checkpoint(tmp_path / "minus.safetensors") as minus:
        split(minus, sites(minus), 4, tmp_path, residual_dtype="F32")
        with Checkpoint(tmp_path / "residual.safetensors") as residual:
            adapter = read_adapter(tmp_path / "adapter.safetensors")
            assert verify_split(minus, residual, adapter).exact == 1


def test_memory_is_that_of_a_few_tensors(original: Checkpoint, tmp_path: Path) -> None:
    """No tensor outlives its turn: at most one of the file's is alive when the next is read."""
    import gc
    import weakref

    alive: list[weakref.ref] = []
    most = 0

    class Watched(Checkpoint):
        def __getitem__(self, key: str) -> torch.Tensor:
            nonlocal most
            tensor = super().__getitem__(key)
            if tensor.numel() > 64:
                alive.append(weakref.ref(tensor))
            most = max(most, sum(ref() is not None for ref in alive))
            return tensor

    gc.disable()
    try:
        with Watched(original.path) as watched:
            split(watched, sites(original), 2, tmp_path)
    finally:
        gc.enable()
    assert most <= 2


def test_a_residual_is_no_original(original: Checkpoint, tmp_path: Path) -> None:
    split(original, sites(original), 2, tmp_path)
    with Checkpoint(tmp_path / "residual.safetensors") as residual:
        for use in (
            lambda: decompose(residual, sites(original), 2),
            lambda: zeros_full(residual, sites(original)),
            lambda: split(residual, sites(original), 2, tmp_path / "again"),
            lambda: list(rebuild(residual, None, Adapter({}))),
        ):
            with pytest.raises(Refused, match="residual"):
                use()
    assert not (tmp_path / "again").exists()


def test_wrong_combinations_are_refused(original: Checkpoint, tmp_path: Path) -> None:
    family = detect(original).family
    split(original, sites(original), 2, tmp_path / "a")
    split(original, sites(original), 3, tmp_path / "b")
    other = tiny.checkpoint(tmp_path / "other.safetensors", family, seed=7, dtype="F16")
    first = read_adapter(tmp_path / "a" / "adapter.safetensors")
    second = read_adapter(tmp_path / "b" / "adapter.safetensors")
    with Checkpoint(other) as stranger, Checkpoint(tmp_path / "a/residual.safetensors") as residual:
        with pytest.raises(Refused, match="another checkpoint"):
            verify_split(stranger, residual, first)
        with pytest.raises(Refused, match="one split"):
            verify_split(original, residual, second)
        with pytest.raises(Refused, match="no residual"):
            verify_split(original, stranger, first)
    with pytest.raises(Refused, match="exists"):
        split(original, sites(original), 2, tmp_path / "a")
    with pytest.raises(Refused, match="norms or biases"):
        split(original, detect(original).sites("readout"), 2, tmp_path / "c")
    with pytest.raises(Refused, match="at least 1"):
        split(original, sites(original), 0, tmp_path / "c")
    assert not list((tmp_path / "c").glob("*"))


def test_broken_weights_are_named_and_nothing_is_left(original: Checkpoint, tmp_path: Path) -> None:
    tensors = {key: original[key] for key in original.specs}
    bad = sites(original)[5].key
    tensors[bad].view(-1)[0] = float("nan")
    write_dict(tmp_path / "bad.safetensors", tensors)
    with Checkpoint(tmp_path / "bad.safetensors") as broken:
        with pytest.raises(Refused, match=bad.replace(".", r"\.")):
            split(broken, sites(original), 2, tmp_path / "out")
        assert not list((tmp_path / "out").glob("*"))


def test_a_residual_does_not_stay_without_its_adapter(
    original: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(sys.modules["recast.adapter.split"], "kohya_hashes", full)
    with pytest.raises(OSError, match="full"):
        split(original, sites(original), 2, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_room_for_the_residual_and_its_factors_is_asked_for_first(
    original: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def none(_: Path, size: int) -> None:
        asked.append(size)
        raise NoRoom("full")

    monkeypatch.setattr(sys.modules["recast.adapter.split"], "require_room", none)
    for rank, dtype in ((2, None), (4, None), (4, "F32")):
        with pytest.raises(NoRoom):
            split(original, sites(original), rank, tmp_path / "out", residual_dtype=dtype)
    assert not (tmp_path / "out").exists()
    assert original.nbytes * 0.95 < asked[0] < asked[1] < original.nbytes * 1.5 < asked[2]


def test_verify_names_what_is_off(original: Checkpoint, tmp_path: Path) -> None:
    tensors = {key: original[key] for key in original.specs}
    key = sites(original)[0].key
    tensors[key] = tensors[key] + 1
    gone = list(tensors)[-1]
    del tensors[gone]
    write_dict(tmp_path / "off.safetensors", {**tensors, "more": torch.zeros(1)})
    with Checkpoint(tmp_path / "off.safetensors") as off:
        verdict = verify_rebuilt(original, off)
    assert not verdict.passed
    assert verdict.worst.key == key
    assert verdict.worst.largest == pytest.approx(1, abs=1e-2)
    assert (verdict.missing, verdict.surplus) == ((gone,), ("more",))
