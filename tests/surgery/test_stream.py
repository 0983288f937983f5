"""Pieces of files: read ahead, hashed on the way, written under a header known at the end."""

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import tiny

from recast.adapter.merge import in_chunks
from recast.checkpoint import Checkpoint, write, write_pieces
from recast.errors import CheckFailed
from recast.surgery import blend, stream
from recast.surgery.merging import write_merge
from recast.surgery.recipes import Step, parse_weights
from recast.surgery.stream import Source, ahead, piece_size, spans


def test_items_are_made_in_another_thread_and_their_errors_arrive() -> None:
    def items() -> Iterator[int]:
        assert threading.current_thread() is not threading.main_thread()
        yield from range(5)
        raise KeyError("broken")

    found = ahead(items())
    assert [next(found) for _ in range(5)] == list(range(5))
    with pytest.raises(KeyError, match="broken"):
        next(found)
    given_up = ahead(iter(range(100)))
    assert next(given_up) == 0
    given_up.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("order", ["abc", "cab", "ac", "b", ""])
def test_a_file_is_hashed_whatever_is_read_of_it(order: str, tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(7, 5, generator=made) for name in "abc"}
    save_file(tensors, tmp_path / "f", {"format": "pt"})
    with Checkpoint(tmp_path / "f") as file, Source(file) as source:
        for name in order:
            read = [source.read(*span) for span in spans(name, (7, 5), 9)]
            assert torch.equal(torch.cat(read).reshape(7, 5), tensors[name])
        assert source.sha256() == hashlib.sha256((tmp_path / "f").read_bytes()).hexdigest()


def test_in_the_file_s_order_nothing_is_read_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({name: torch.randn(7, 5) for name in "abc"}, tmp_path / "f")
    with Checkpoint(tmp_path / "f") as file, Source(file) as source:
        again: list[tuple[int, int]] = []
        single = file.single
        assert single is not None
        own = single.add_to
        monkeypatch.setattr(single, "add_to", lambda digest, start, end: (
            again.append((start, end)), own(digest, start, end)))  # fmt: skip
        for name in file.specs:
            source.read(name, 0, 35)
        assert source.sha256() == file.sha256()
        head = single.start(next(iter(file.specs)))
        assert again == [(0, head), (0, file.nbytes)]  # the header, and what file.sha256 reads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.5, 0.7, 1.0])
def test_torch_mixes_at_once_what_chunks_mix_in_fp32(dtype: torch.dtype, weight: float) -> None:
    """Every fp16 and bf16 there is, each with another one."""
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    made = torch.Generator().manual_seed(1)
    other = every[torch.randperm(65536, generator=made)]
    wide = in_chunks(lambda a, rest: blend.weighted(a, rest, [weight]), every, [other])
    once = torch.lerp(every, other, weight)
    same = once.view(torch.int16) == wide.view(torch.int16)
    assert (same | (once.isnan() & wide.isnan())).all()


def turned(path: Path, out: Path) -> Path:
    """The file with its tensors in another order, and one more."""
    tensors = load_file(path)
    with Checkpoint(path) as file:
        backwards = dict(reversed(list(file.specs.items())))
    specs = {"extra": ("F32", (3,)), **{k: (s.dtype, s.shape) for k, s in backwards.items()}}
    tensors["extra"] = torch.ones(3)
    write(out, specs, ((key, tensors[key]) for key in specs), {})
    return out


@pytest.mark.parametrize("how", ["weighted", "difference", "slerp"])
def test_pieces_make_what_whole_tensors_make(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in different orders, pieces of 1,000 values; hashes are those of the files."""
    torch.set_num_threads(1)
    a = tiny.checkpoint(tmp_path / "a.safetensors", seed=0)
    b = turned(tiny.checkpoint(tmp_path / "b0.safetensors", seed=1), tmp_path / "b.safetensors")
    models = (a, b, a) if how == "difference" else (a, b)
    step = Step(how, models, (parse_weights("0.3,te=0"),))
    write_merge(step, tmp_path / "one")
    monkeypatch.setattr(stream, "LARGEST", 4000)
    write_merge(step, tmp_path / "two")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "one").read_bytes()
    with Checkpoint(tmp_path / "two") as found, Checkpoint(a) as x, Checkpoint(b) as y:
        said = json.loads(found.metadata["recast.merge"])["models"]
        assert [each["sha256"] for each in said[:2]] == [x.sha256(), y.sha256()]
        for key in found:
            mine, theirs = x[key], y[key]
            if key.startswith("conditioner.embedders") or not mine.is_floating_point():
                assert torch.equal(found[key], mine)
            elif how == "weighted":
                assert torch.equal(found[key], torch.lerp(mine, theirs, 0.3))
            elif how == "difference":
                assert torch.equal(found[key], mine + 0.3 * (theirs - mine))


def test_a_result_beyond_its_dtype_leaves_nothing(tmp_path: Path) -> None:
    a = tiny.checkpoint(tmp_path / "a.safetensors", dtype="F16")
    tensors = load_file(a)
    key = "model.diffusion_model.out.2.weight"
    with Checkpoint(a) as file:
        tensors[key] = torch.full_like(tensors[key], 60000.0)
        specs = {k: (s.dtype, s.shape) for k, s in file.specs.items()}
    write(tmp_path / "b", specs, ((k, tensors[k]) for k in specs), {})
    step = Step("difference", (tmp_path / "b", tmp_path / "b", a), (parse_weights("1"),))
    with pytest.raises(CheckFailed, match=r"out.2.weight leaves the range of torch.float16"):
        write_merge(step, tmp_path / "o")
    assert not (tmp_path / "o").exists()
    assert not list(tmp_path.glob(".*tmp"))


def test_pieces_that_are_not_the_file_are_refused(tmp_path: Path) -> None:
    specs = {"a": ("F32", (2, 3)), "b": ("I64", ())}
    a, b = torch.arange(6.0), torch.tensor(4)

    def written(*pieces: tuple[str, torch.Tensor], last: str = "xy") -> None:
        write_pieces(
            tmp_path / "f", specs, pieces, {"h": "00"}, lambda: {"h": last}, force=True
        )  # fmt: skip

    written(("a", a[:4]), ("a", a[4:]), ("b", b))
    found = load_file(tmp_path / "f")
    assert torch.equal(found["a"], a.reshape(2, 3))
    assert found["b"] == 4
    with Checkpoint(tmp_path / "f") as file:
        assert file.metadata == {"h": "xy"}
    for pieces, last, said in (
        ([("a", a[:4]), ("b", b)], "xy", "a has not come whole"),
        ([("a", a), ("a", a[:1]), ("b", b)], "xy", "are no part"),
        ([("a", a.double()), ("b", b)], "xy", "are no part"),
        ([("a", a), ("b", b)], "x" * 20, "the header has"),
    ):
        with pytest.raises(ValueError, match=said):
            written(*pieces, last=last)


def test_what_is_held_is_three_tensors_at_most() -> None:
    for files in (1, 2, 5):
        held = files * (2 * stream.AHEAD + 2) + stream.AHEAD + 2
        assert held * piece_size(126_484_480, files) <= 3 * 126_484_480
        assert held * piece_size(1 << 20, files) <= 3 << 20
