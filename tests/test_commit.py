"""Files appear whole or not at all, whatever fails and whenever the process dies."""

import errno
import hashlib
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from tests.faults import DEAD, Faults

from recast import commit as module
from recast import disk
from recast.commit import commit, commit_folder, lock, valid_folder
from recast.errors import NoRoom, Refused

OLD, NEW = b"old" * 1000, b"new" * 5000


def put(path: Path, data: bytes = NEW, *, force: bool = True) -> str:
    def write(file: BinaryIO) -> None:
        file.write(data[:10])
        file.write(data[10:])

    return commit(path, write, size=len(data), force=force)


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith(".recast-tmp")]


def test_the_hash_is_the_files(tmp_path: Path) -> None:
    digest = put(tmp_path / "a" / "b.bin")
    assert (tmp_path / "a" / "b.bin").read_bytes() == NEW
    assert digest == hashlib.sha256(NEW).hexdigest()
    assert leftovers(tmp_path / "a") == []


def test_writing_out_of_order_hashes_the_result(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.seek(3)
        file.write(b"def")
        file.seek(0)
        file.write(b"abc")

    assert commit(tmp_path / "x", write, size=6) == hashlib.sha256(b"abcdef").hexdigest()
    assert (tmp_path / "x").read_bytes() == b"abcdef"


def test_an_existing_file_and_a_source_are_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(OLD)
    with pytest.raises(Refused, match="exists"):
        put(path, force=False)
    (tmp_path / "soft").symlink_to(path)
    (tmp_path / "hard").hardlink_to(path)
    for other in (path, tmp_path / "soft", tmp_path / "hard"):
        with pytest.raises(Refused, match="source"):
            commit(other, lambda file: file.write(b""), size=0, force=True, sources=[path])
    with pytest.raises(Refused, match="folder"):
        put(tmp_path)
    assert path.read_bytes() == OLD


def test_a_failing_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(OLD)

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(path, write, size=4, force=True)
    assert path.read_bytes() == OLD
    assert leftovers(tmp_path) == []


def test_every_call_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    for code, expected in ((errno.ENOSPC, NoRoom), (errno.EACCES, Refused), (errno.EIO, OSError)):
        n = 0
        while True:
            n += 1
            path.write_bytes(OLD)
            failing = Faults(n, code)
            with monkeypatch.context() as patch:
                patch.setattr(module, "os", failing)
                patch.setattr(disk, "os", failing)
                with suppress(expected):
                    put(path)
            assert path.read_bytes() in (OLD, NEW)
            assert leftovers(tmp_path) == []
            if failing.count < n:
                break
        assert n > 6
        assert path.read_bytes() == NEW


KILLS = """
import os, sys
from pathlib import Path
from recast import commit as module, disk
from tests.faults import DEAD, Faults

path, old, new = Path(sys.argv[1]), b"old" * 1000, b"new" * 5000
n, code = 0, DEAD
while code == DEAD:
    n += 1
    path.write_bytes(old)
    if not os.fork():
        module.os = disk.os = Faults(n, None)
        pieces = lambda file: [file.write(new[:9]), file.write(new[9:])]
        module.commit(path, pieces, size=1, force=True)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print(code, {old: "old", new: "new"}.get(path.read_bytes(), "torn"))
"""


def test_a_kill_at_every_call_leaves_old_or_new(tmp_path: Path) -> None:
    """The child forks once per call of the protocol, each fork dying one call later."""
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, "-c", KILLS, str(tmp_path / "x")]
    out = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
    seen = [tuple(line.split()) for line in out.splitlines()]
    assert set(seen) <= {(str(DEAD), "old"), (str(DEAD), "new"), ("0", "new")}
    assert seen[0] == (str(DEAD), "old")
    assert seen[-1] == ("0", "new")
    assert len(seen) > 7
    put(tmp_path / "x")
    assert leftovers(tmp_path) == []


def test_no_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    with pytest.raises(NoRoom, match="bytes free"):
        commit(tmp_path / "x", written.append, size=1 << 60)
    assert not written
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_the_living_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / f".a.{os.getpid()}-999.recast-tmp"
    mine.write_bytes(b"")
    put(tmp_path / "x")
    assert mine.exists()


RIVAL = """
import sys
from pathlib import Path
from recast.commit import commit
from recast.errors import Refused

def write(file):
    file.write(b"first")
    print("writing", flush=True)
    sys.stdin.readline()

commit(Path(sys.argv[1]), write, size=5, force=True)
"""


@pytest.mark.parametrize("end", ["finish", "kill"])
def test_a_file_that_is_being_written_is_refused_to_others(tmp_path: Path, end: str) -> None:
    path = tmp_path / "x [1].bin"  # a name that is a pattern too
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root / "src")}
    command = [sys.executable, "-c", RIVAL, str(path)]
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin
        assert first.stdout
        assert first.stdout.readline() == "writing\n"
        with pytest.raises(Refused, match=f"written by process {first.pid}"):
            put(path)
        put(tmp_path / "y")  # another file of the folder is nobody's business
        if end == "kill":
            first.kill()
        else:
            first.stdin.write("\n")
    assert path.exists() == (end == "finish")
    put(path)
    assert path.read_bytes() == NEW
    assert leftovers(tmp_path) == []


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def write(file: BinaryIO) -> None:
        file.write(NEW)
        path.write_bytes(OLD)

    with pytest.raises(Refused, match="appeared"):
        commit(path, write, size=len(NEW))
    assert path.read_bytes() == OLD
    assert leftovers(tmp_path) == []


def test_a_second_owner_is_told_who_the_first_is(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(Refused, match=str(os.getpid())), lock(tmp_path):
        pytest.fail("two owners")
    with lock(tmp_path):
        pass


def fill(folder: Path) -> None:
    (folder / "a.bin").write_bytes(NEW)
    (folder / "inner").mkdir()
    (folder / "inner" / "b.bin").write_bytes(b"b")


def test_a_folder_is_valid_only_as_written(tmp_path: Path) -> None:
    path = tmp_path / "state"
    commit_folder(path, fill)
    assert valid_folder(path)
    with pytest.raises(Refused, match="exists"):
        commit_folder(path, fill)
    (path / "inner" / "b.bin").write_bytes(b"c")
    assert not valid_folder(path)
    (path / "inner" / "b.bin").write_bytes(b"b")
    assert valid_folder(path)
    (path / "more").write_bytes(b"")
    assert not valid_folder(path)
    (path / "manifest.json").write_text("[]")
    assert not valid_folder(path)
    assert not valid_folder(tmp_path / "absent")


def test_a_folder_whose_filling_fails_does_not_exist(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        fill(folder)
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(NoRoom, match="state"):
        commit_folder(tmp_path / "state", half)
    assert list(tmp_path.iterdir()) == []
