"""The run folder: who it belongs to, and what of it exists already.

A run is named by what went in: the model's hash, the images' hashes and the recipe. `run.json`
holds that identity; every file the run writes carries its digest in the header, so the same
command finds what is done, and another command is refused instead of mixing two runs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from recast.checkpoint import Checkpoint
from recast.commit import commit
from recast.errors import RecastError, Refused

IDENTITY = "run.json"
DIGEST_KEY = "recast.run"


@dataclass(frozen=True)
class Folder:
    """A run's folder and the digest of what went into it; `elsewhere` are files outside it."""

    root: Path
    digest: str
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        return self.elsewhere.get(name, self.root / name)

    def has(self, name: str) -> bool:
        """Whether `name` is a finished safetensors file of this very run."""
        path = self.path(name)
        if not path.exists():
            return False
        try:
            with Checkpoint(path) as file:
                return file.metadata.get(DIGEST_KEY) == self.digest
        except RecastError:
            return False

    def stamp(self) -> dict[str, str]:
        """The header entry that ties a file to this run."""
        return {DIGEST_KEY: self.digest}


def flatten(identity: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """{"train": {"steps": 4}} -> {"train.steps": 4}, for naming what differs."""
    flat: dict[str, object] = {}
    for key, value in identity.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def digest_of(identity: Mapping[str, object]) -> str:
    """16 hex digits of the identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_claim(
    root: Path, identity: Mapping[str, object], *, outputs: tuple[str, ...], force: bool
) -> bool:
    """Whether `root` is this run's folder already; writes nothing.

    Raises Refused when it belongs to another run, or holds files of the same names that no run
    wrote, unless `force`.
    """
    theirs = read_identity(root)
    if theirs is None:
        for name in () if force else outputs:
            if (root / name).exists():
                raise Refused(
                    f"{root / name} exists and is no file of this run: "
                    "give another --out, or --force to replace it."
                )
        return False
    same = digest_of(theirs) == digest_of(identity)
    if not (same or force):
        raise Refused(_difference(root, theirs, identity))
    return same


def claim(
    root: Path, identity: Mapping[str, object], *, outputs: tuple[str, ...], force: bool
) -> Folder:
    """Make `root` this run's folder, or find that it already is.

    Raises Refused as `check_claim` does; `force` drops the other run's files instead.
    """
    if not check_claim(root, identity, outputs=outputs, force=force):
        if read_identity(root) is not None:
            clear(root, outputs)
        text = json.dumps(identity, indent=2, sort_keys=True, default=str).encode()
        commit(root / IDENTITY, lambda file: file.write(text), size=len(text), force=True)
    return Folder(root, digest_of(identity))


def read_identity(root: Path) -> dict[str, object] | None:
    """What `run.json` says, or None where there is none."""
    path = root / IDENTITY
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise Refused(
            f"{path} is not valid JSON ({error}): remove it or give another --out."
        ) from error


def clear(root: Path, outputs: tuple[str, ...]) -> None:
    """Remove a run's own files: the outputs it is known to write, its state and its caches."""
    for name in (
        *outputs,
        "recipe.toml",
        "base.json",
        "bridge.safetensors",
        "log.jsonl",
        "pictures.png",
        "changes.png",
    ):
        (root / name).unlink(missing_ok=True)
    for name in ("state", "cache", "pairs", "pictures", "previews", "saved", "tb", "watch"):
        if (root / name).is_dir():
            shutil.rmtree(root / name)
    (root / IDENTITY).unlink(missing_ok=True)  # last, so that a kill leaves the folder claimed


def _difference(root: Path, theirs: Mapping[str, object], ours: Mapping[str, object]) -> str:
    before, now = flatten(theirs), flatten(ours)
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    said = ", ".join(f"{key} {before.get(key)!s:.40} → {now.get(key)!s:.40}" for key in keys[:4])
    more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
    return (
        f"{root} holds another run ({said}{more}): "
        "give another --out, or --force to start this one anew."
    )
