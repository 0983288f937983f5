"""Uploads: a receipt is what lies at the other end; failures are tried again, and remembered."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recast.distillation.upload import (
    Folder,
    NotSent,
    Receipt,
    attempt,
    place_of,
    unfinished,
    upload,
)
from recast.errors import Refused


@dataclass
class Flaky:
    """A place that fails a few times, or keeps half of what it is sent."""

    root: Path
    faults: int = 0
    half: bool = False
    sent: list[str] = field(default_factory=list)

    def send(self, path: Path, name: str) -> None:
        self.sent.append(name)
        if len(self.sent) <= self.faults:
            raise ConnectionError("the line is dead")
        data = path.read_bytes()
        (self.root / name).write_bytes(data[: len(data) // 2] if self.half else data)

    def fact(self, name: str):
        return Folder(self.root).fact(name)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "there").mkdir()
    path = tmp_path / "run" / "model.safetensors"
    path.write_bytes(b"0123456789" * 100)
    return path


def receipts(file: Path) -> list[dict]:
    return list(json.loads((file.parent / "uploads.json").read_text()).values())


def test_a_folder_gets_the_file_and_the_run_a_receipt(file: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "new" / "place")
    said = [event.text for event in upload(file.parent, file, target, 3)]
    assert (Path(target) / file.name).read_bytes() == file.read_bytes()
    (receipt,) = receipts(file)
    assert receipt["done"]
    assert receipt["size"] == 1000
    assert receipt["sha256"][:12] in said[0]
    again = [event.text for event in upload(file.parent, file, target, 3)]
    assert "already" in again[0]
    file.write_bytes(b"another")  # another file of the same name is sent again
    list(upload(file.parent, file, target, 3))
    assert (Path(target) / file.name).read_bytes() == b"another"


def test_a_fault_is_tried_again_with_longer_rests(file: Path, tmp_path: Path) -> None:
    place, rests = Flaky(tmp_path / "there", faults=2), []
    list(upload(file.parent, file, "there", 3, place=place, rest=rests.append))
    assert rests == [2.0, 4.0]
    assert receipts(file)[0]["tries"] == 3
    assert not unfinished(file.parent)


@pytest.mark.parametrize(("place", "why"), [({"faults": 9}, "dead"), ({"half": True}, "500 bytes")])
def test_what_does_not_arrive_is_an_error_and_listed(
    file: Path, tmp_path: Path, place: dict, why: str
) -> None:
    bad = Flaky(tmp_path / "there", **place)
    with pytest.raises(NotSent, match=why) as caught:
        list(upload(file.parent, file, "there", 2, place=bad, rest=lambda s: None))
    assert caught.value.code == 6
    (line,) = unfinished(file.parent)
    assert "model.safetensors is not yet at there" in line
    assert file.exists()
    list(upload(file.parent, file, "there", 2, place=Flaky(tmp_path / "there")))
    assert not unfinished(file.parent)


def test_an_upload_that_was_killed_is_listed(file: Path, tmp_path: Path) -> None:
    class Killed(Flaky):
        def send(self, path: Path, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(
            file.parent, Killed(tmp_path / "there"), file, Receipt("t", file.name, 1, "x", 1, False)
        )
    assert "interrupted" in unfinished(file.parent)[0]


def test_targets(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for bad in ("hf:", "hf:name", "hf:/name", "hf:a/b/c", str(tmp_path / "file")):
        with pytest.raises(Refused):
            place_of(bad)
    assert place_of("hf:owner/name").repository == "owner/name"  # type: ignore[attr-defined]
