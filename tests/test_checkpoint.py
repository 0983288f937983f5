"""Reading and writing single files, with the safetensors library as the second opinion."""

import errno
import json
import os
import random
import resource
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save, save_file
from tests.faults import Faults

from recast import commit as committing
from recast import disk
from recast import opened as reading
from recast.checkpoint import Checkpoint, write, write_dict
from recast.errors import NoRoom, RecastError, Refused


def tensors() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, 5, generator=made).half(),
        "full": torch.randn(2, 2, generator=made),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "none": torch.zeros(0),
        "brain": torch.randn(7, generator=made).bfloat16(),
        "eight": torch.randn(5, generator=made).to(torch.float8_e4m3fn),
        "five": torch.randn(5, generator=made).to(torch.float8_e5m2),
        "ids": torch.arange(4)[None],
        "mask": torch.tensor([True, False, True]),
        "turned": torch.randn(4, 3, generator=made).T,
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    def data(tensor: torch.Tensor) -> bytes:
        return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return (one.dtype, one.shape) == (other.dtype, other.shape) and data(one) == data(other)


def test_what_is_written_is_read_by_both(tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.safetensors", tensors()
    digest = write_dict(path, wanted, {"b": "ü\n", "a": "1"})
    theirs = load_file(path)
    with Checkpoint(path) as ours:
        assert ours.sha256() == digest
        assert ours.metadata == {"a": "1", "b": "ü\n"}
        assert ours.keys() == wanted.keys() == theirs.keys()
        for key, tensor in wanted.items():
            assert same(ours[key], tensor)
            assert same(theirs[key], tensor)
            assert ours.specs[key].torch_dtype == tensor.dtype
            assert ours.raw(key) == ours.raw(key)
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"a": "1", "b": "ü\n"}


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    path, wanted = tmp_path / "a.safetensors", {k: t.contiguous() for k, t in tensors().items()}
    save_file(wanted, path, {"x": "y"})
    ours = Checkpoint(path)
    assert all(same(ours[key], tensor) for key, tensor in wanted.items())
    assert len(ours) == len(wanted)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_dict(tmp_path / "a", tensors(), {"x": "1", "y": "2"})
    again = write_dict(tmp_path / "b", tensors(), {"y": "2", "x": "1"})
    assert first == again
    start = int.from_bytes((tmp_path / "a").read_bytes()[:8], "little")
    assert start % 8 == 0


def test_order_is_kept_where_alignment_allows(tmp_path: Path) -> None:
    wanted = {"z": torch.zeros(2).half(), "a": torch.zeros(1), "m": torch.zeros(3).half()}
    write_dict(tmp_path / "a", wanted)
    assert list(Checkpoint(tmp_path / "a")) == ["z", "a", "m"]


def test_wrong_tensors_are_the_callers_bug(tmp_path: Path) -> None:
    specs = {"a": ("F32", (2,)), "b": ("F32", (1,))}
    a, b = torch.zeros(2), torch.zeros(1)
    for wrong in ([("b", b), ("a", a)], [("a", a)], [("a", b), ("b", b)], [("a", a.half())]):
        with pytest.raises(ValueError, match=r"a|b"):
            write(tmp_path / "x", specs, wrong, {})
    assert list(tmp_path.iterdir()) == []


SAVED = save({key: tensor.contiguous() for key, tensor in tensors().items()})
BAD = {
    "empty": b"",
    "is truncated": SAVED[:-3],
    "its header alone": SAVED[:60],
    "web page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "pickle": b"\x80\x02}q\x00X\x05\x00\x00\x00stateq\x01.",
    "JSON text": b'{"weight_map": {}}',
    "GGUF": b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00",
    "begins with": b"\x00" * 64,
    "belong to no tensor": SAVED + b"x",
    "gzip": b"\x1f\x8b\x08\x00" + b"\x00" * 40,
}


@pytest.mark.parametrize("word", BAD)
def test_bad_files_are_named_in_one_sentence(tmp_path: Path, word: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(BAD[word])
    with pytest.raises(Refused, match=word) as refusal:
        Checkpoint(path)
    assert str(path) in str(refusal.value)
    assert str(refusal.value).endswith(".")


def test_a_ckpt_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"a": torch.zeros(1)}}, path)
    with pytest.raises(Refused, match="weights_only=True"):
        Checkpoint(path)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme", "x")
    with pytest.raises(Refused, match="unpack"):
        Checkpoint(tmp_path / "a.zip")


def test_absent_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="does not exist"):
        Checkpoint(tmp_path / "absent")
    with pytest.raises(Refused, match="is a folder"):
        Checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(Refused, match="diffusers folder"):
        Checkpoint(tmp_path)


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


HEADERS = {
    "a name occurs twice": f'{{"a":{entry()},"a":{entry()}}}',
    "is called": f'{{"a\\u0000":{entry()}}}',
    "is called ''": f'{{"":{entry()}}}',
    "9 dimensions": f'{{"a":{entry(shape=[1] * 9)}}}',
    "number format 'F4'": f'{{"a":{entry("F4")}}}',
    "does not fit": f'{{"a":{entry(shape=[2])}}}',
    "leaves a hole": f'{{"a":{entry(offsets=[4, 8])}}}',
    "overlaps": f'{{"a":{entry()},"b":{entry()}}}',
    "not a size": f'{{"a":{entry(shape=[-1])}}}',
    "not numbers": f'{{"a":{entry(shape=[1.0])}}}',
    "metadata": f'{{"__metadata__":{{"a":1}},"a":{entry()}}}',
    "not valid JSON": '{"a":' + "[" * 100_000,
    "lacks dtype": '{"a":{"dtype":"F32"}}',
}


@pytest.mark.parametrize("word", HEADERS)
def test_bad_headers_are_refused(tmp_path: Path, word: str) -> None:
    text = HEADERS[word].encode()
    path = tmp_path / "bad"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(Refused, match=word):
        Checkpoint(path)


def test_a_huge_header_needs_a_flag(tmp_path: Path) -> None:
    text = json.dumps({"__metadata__": {"a": "x" * (1 << 24)}}).encode()
    path = tmp_path / "big"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(Refused, match="exhaust memory"):
        Checkpoint(path)
    assert len(Checkpoint(path, header_limit=1 << 25)) == 0


def mutate(data: bytes, dice: random.Random) -> bytes:
    """One change of a file, mostly of its header."""
    mutant = bytearray(data)
    reach = len(mutant) if dice.random() < 0.2 else 8 + int.from_bytes(data[:8], "little")
    at = dice.randrange(reach)
    match dice.randrange(5):
        case 0:
            mutant[at] ^= 1 << dice.randrange(8)
        case 1:
            del mutant[at : at + dice.randrange(1, 9)]
        case 2:
            mutant[at:at] = bytes(
                dice.choices(b'0123456789,:[]{}"-F.eaA\x00', k=dice.randrange(1, 4))
            )
        case 3:
            mutant[at] = dice.choice(b'0123456789,[]{}":')
        case 4:
            digits = [i for i in range(8, reach) if mutant[i : i + 1].isdigit()]
            mutant[dice.choice(digits)] = dice.choice(b"0123456789")
    return bytes(mutant)


def test_mutants_are_refused_or_agreed_on(tmp_path: Path) -> None:
    """What we accept the library accepts too, with the same tensors; all else is Refused."""
    dice, accepted = random.Random(5), 0
    path = tmp_path / "mutant"
    for _ in range(500):
        path.write_bytes(mutate(SAVED, dice))
        try:
            with Checkpoint(path) as ours:
                found = dict(ours)
        except RecastError:
            continue
        accepted += 1
        theirs = load_file(path)
        assert found.keys() == theirs.keys()
        assert all(same(found[key], theirs[key]) for key in found)
    assert 15 < accepted < 300


def test_reading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    """Streaming 96 MB in tensors of 4 MB adds at most three of them to memory."""
    each = 1 << 20
    specs = {f"t{i}": ("F32", (each,)) for i in range(24)}
    write(tmp_path / "a", specs, ((k, torch.zeros(each)) for k in specs), {})
    with Checkpoint(tmp_path / "a") as file:
        assert file["t0"].sum() == 0
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for key in file:
            assert file[key].numel() == each
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 3 * 4 * 1024


def test_a_file_cut_while_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_dict(path, tensors())
    with Checkpoint(path) as file:
        with path.open("r+b") as other:
            other.truncate(100)
        with pytest.raises(Refused, match="became shorter"):
            dict(file)


def test_a_file_replaced_while_open_is_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_dict(path, {"a": torch.zeros(3)})
    with Checkpoint(path) as file:
        write_dict(path, {"a": torch.ones(3)}, force=True)
        assert file["a"].sum() == 0


def test_failing_reads_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dict(tmp_path / "a", tensors())
    file = Checkpoint(tmp_path / "a")
    monkeypatch.setattr(reading, "os", Faults(1, errno.EIO, frozenset({"preadv"})))
    with pytest.raises(Refused, match="cannot be read at byte"):
        file["half"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_dict(path, {"a": torch.zeros(3)})
    monkeypatch.setattr(disk, "os", Faults(3, errno.ENOSPC, frozenset({"pwrite"})))
    with pytest.raises(NoRoom):
        write_dict(path, tensors(), force=True)
    assert list(Checkpoint(path)) == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_source_is_never_the_target(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_dict(path, tensors())
    with pytest.raises(Refused, match="source"):
        write_dict(path, tensors(), force=True, sources=[path])


class Bare:
    """`os` without positioned reads and writes, as Windows has it."""

    MISSING = frozenset({"pread", "pwrite", "preadv"})

    def __getattr__(self, name: str) -> object:
        if name in self.MISSING:
            raise AttributeError(name)
        return getattr(os, name)


def test_files_without_positioned_reads_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "os", Bare())
    monkeypatch.setattr(committing, "os", Bare())
    monkeypatch.setattr(disk, "os", Bare())
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.float16)}
    digest = write_dict(tmp_path / "x.safetensors", tensors, {"k": "v"})
    with Checkpoint(tmp_path / "x.safetensors") as file:
        assert file.sha256() == digest
        assert all(torch.equal(file[key], tensor) for key, tensor in tensors.items())
    with committing.lock(tmp_path / "run"):
        pass
