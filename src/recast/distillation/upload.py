"""A finished file carried elsewhere, with a receipt: a folder, or a repository of a hub.

    upload = "/mnt/models/run7"            a folder; made where it is missing
    upload = "hf:owner/name"               a model repository of the Hugging Face hub

The local file is the record. A receipt holds size and sha256 of what lies at the other end, read
back from there; what has none is unfinished, is listed at the next start, and tried again.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from recast.commit import commit
from recast.distillation.folder import read_json, write_json
from recast.errors import RecastError, Refused
from recast.events import Event, Note

RECEIPTS = "uploads.json"
HUB = "hf:"
PAUSE = 2.0  # seconds before a second try; doubled each time
Fact = tuple[int, str]
"""Size and sha256."""


class NotSent(RecastError):
    """An upload failed; the local file is whole, and the same command tries again."""

    code = 6


class Place(Protocol):
    """Where files go."""

    def send(self, path: Path, name: str) -> None: ...
    def fact(self, name: str) -> Fact | None:
        """Size and hash of what lies there; None where nothing does."""


@dataclass(frozen=True)
class Folder:
    """A folder of this machine or a mounted one."""

    root: Path

    def send(self, path: Path, name: str) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source:
            commit(
                self.root / name, lambda file: shutil.copyfileobj(source, file),
                size=path.stat().st_size, force=True,
            )  # fmt: skip

    def fact(self, name: str) -> Fact | None:
        path = self.root / name
        return fact_of(path) if path.is_file() else None


@dataclass(frozen=True)
class Hub:
    """A model repository of the Hugging Face hub; the token is the one huggingface_hub finds."""

    repository: str

    def send(self, path: Path, name: str) -> None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(self.repository, exist_ok=True)
        api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=self.repository)

    def fact(self, name: str) -> Fact | None:
        from huggingface_hub import HfApi

        for found in HfApi().get_paths_info(self.repository, [name]):
            lfs = getattr(found, "lfs", None)
            if lfs is not None:
                return int(lfs.size), str(lfs.sha256)
        return None


def place_of(target: str) -> Place:
    """The place that a config names; raises Refused for a name that is neither."""
    if not target.startswith(HUB):
        path = Path(target)
        if path.exists() and not path.is_dir():
            raise Refused(f"save.upload {target} is a file: name a folder, or {HUB}owner/name.")
        return Folder(path)
    name = target.removeprefix(HUB)
    if name.count("/") != 1 or not all(name.split("/")):
        raise Refused(f"save.upload {target!r} names no repository: write {HUB}owner/name.")
    return Hub(name)


def fact_of(path: Path) -> Fact:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Receipt:
    """What became of one upload."""

    target: str
    name: str
    size: int
    sha256: str
    tries: int
    done: bool
    fault: str = ""


def unfinished(out: Path) -> list[str]:
    """One sentence for every upload that has no receipt."""
    found = read_json(out / RECEIPTS)
    return [
        f"{each['name']} is not yet at {each['target']} ({each['fault'] or 'interrupted'}): it is "
        "tried again at the end."
        for each in found.values()
        if isinstance(each, dict) and not each["done"]
    ]


def upload(
    out: Path, path: Path, target: str, tries: int, *, place: Place | None = None,
    rest: Callable[[float], None] = time.sleep,
) -> Iterator[Event]:  # fmt: skip
    """Send a file unless its receipt is there; yields what happened.

    Raises NotSent once the tries are used up.
    """
    place = place or place_of(target)
    size, digest = fact_of(path)
    receipt = Receipt(target, path.name, size, digest, 0, False)
    known = read_json(out / RECEIPTS).get(f"{target} {path.name}")
    if isinstance(known, dict) and known["done"] and known["sha256"] == digest:
        yield Note(f"{path.name} is at {target} already.")
        return
    for number in range(1, tries + 1):
        fault = attempt(out, place, path, Receipt(**{**asdict(receipt), "tries": number}))
        if not fault:
            yield Note(f"{path.name} is at {target}: {size:,} bytes, sha256 {digest[:12]}.")
            return
        yield Note(f"{path.name} did not reach {target} (try {number} of {tries}): {fault}.")
        if number < tries:
            rest(PAUSE * 2 ** (number - 1))
    raise NotSent(
        f"{path.name} did not reach {target} in {tries} tries ({fault}): the file is whole in "
        f"{path.parent}, and the same command tries again."
    )


def attempt(out: Path, place: Place, path: Path, receipt: Receipt) -> str:
    """Send once and write the receipt; returns what went wrong, "" if nothing did."""
    _note(out, receipt)
    fault = ""
    try:
        place.send(path, receipt.name)
        there = place.fact(receipt.name)
        if there is None:
            fault = "nothing lies there after sending"
        elif there != (receipt.size, receipt.sha256):
            fault = f"{there[0]:,} bytes with sha256 {there[1][:12]} lie there, not what was sent"
    except Exception as error:  # hubs and networks fail in ways of their own; the receipt says how
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
    _note(out, Receipt(**{**asdict(receipt), "done": not fault, "fault": fault}))
    return fault


def _note(out: Path, receipt: Receipt) -> None:
    found = dict(read_json(out / RECEIPTS))
    found[f"{receipt.target} {receipt.name}"] = asdict(receipt)
    write_json(out / RECEIPTS, found)
