"""The folder of a distillation: whose it is, and what names it.

run.json      model, assessor and data by their hashes, and the config's digest
config.toml   the resolved config                 log.jsonl   a line for every step
pairs/ or cache/   what the teacher dreamt, or the user's pictures as latents
profile.safetensors   what the assessor finds hard        heads, states: state/
models/stepNNNNNNNN.safetensors, model.safetensors   proven files, and good.json the last one
uploads.json  receipts                            report.json what came out
"""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recast.commit import commit
from recast.errors import Refused

IDENTITY, CONFIG, LOG = "run.json", "config.toml", "log.jsonl"
MODEL, REPORT = "model.safetensors", "report.json"
OWN_FILES = (
    IDENTITY, CONFIG, LOG, MODEL, REPORT, "good.json", "uploads.json", "profile.safetensors",
)  # fmt: skip
BESIDE = ("about", "preset", "save", "evaluate")  # of a config: not part of what a run learns
SHOWN = 3  # keys named in a refusal
OWN_FOLDERS = ("state", "models", "pairs", "cache")


@dataclass(frozen=True)
class Identity:
    """What went in: equal identities are one run."""

    model: str
    assessor: str
    data: str
    config: str

    def as_json(self) -> dict[str, str]:
        return dict(self.__dict__)


def check(out: Path, identity: Identity, config: str, force: bool) -> bool:
    """Whether the folder is this run's already; writes nothing. `config` is the resolved TOML.

    Raises Refused where it is another run's, or where a file is in the way that no run wrote.
    """
    if out.exists() and not out.is_dir():
        raise Refused(f"{out} is a file: name a folder in run.out.")
    theirs = _read(out / IDENTITY)
    if theirs == identity.as_json():
        return True
    if force:
        return False
    if theirs is not None:
        ours = identity.as_json()
        differs = sorted(k for k in {*theirs, *ours} if theirs.get(k) != ours.get(k))
        told = f"{', '.join(differs)} differ"
        if differs == ["config"]:
            told = differing(out / CONFIG, config) or told
        raise Refused(
            f"{out} holds another run ({told}): name another run.out, or give "
            "--force to start this one anew."
        )
    for name in (*OWN_FILES, *OWN_FOLDERS):
        if (out / name).exists():
            raise Refused(
                f"{out / name} exists and is no file of this run: name another run.out, or give "
                "--force to replace it."
            )
    return False


def differing(path: Path, config: str) -> str:
    """The keys in which a folder's config and this run's differ, in words; "" if none can be told.

    What the result does not depend on is left out.
    """
    try:
        theirs, ours = (_keys(text) for text in (path.read_text(encoding="utf-8"), config))
    except (OSError, ValueError):
        return ""
    differ = [
        f"{key} was {theirs.get(key)!r} and is {ours[key]!r}"
        for key in ours
        if theirs.get(key) != ours[key]
    ]
    more = f", and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    return ", ".join(differ[:SHOWN]) + more


def _keys(text: str) -> dict[str, object]:
    sections = {name: each for name, each in tomllib.loads(text).items() if name not in BESIDE}
    return {
        f"{name}.{key}": value
        for name, section in sections.items()
        for key, value in section.items()
        if (name, key) != ("run", "out")
    }


def claim(out: Path, identity: Identity, config: str, force: bool) -> bool:
    """Make the folder this run's; returns whether it was already. Refuses as `check`."""
    ours = check(out, identity, config, force)
    if not ours:
        clear(out)
        write_json(out / IDENTITY, identity.as_json())
    text = config.encode()
    commit(out / CONFIG, lambda file: file.write(text), size=len(text), force=True)
    return ours


def clear(out: Path) -> None:
    """Remove what a run of this kind writes, and nothing else."""
    for name in OWN_FOLDERS:
        if (out / name).is_dir():
            shutil.rmtree(out / name)
    for name in (*(n for n in OWN_FILES if n != IDENTITY), IDENTITY):
        (out / name).unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write JSON that appears whole or not at all, over what was there."""
    text = (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
    commit(path, lambda file: file.write(text), size=len(text), force=True)


def read_json(path: Path) -> Mapping[str, object]:
    """What a file of `write_json` holds; empty where there is none. Raises Refused if damaged."""
    return _read(path) or {}


def _read(path: Path) -> dict[str, str] | None:
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise Refused(
            f"{path} is no valid JSON ({error}): remove it, or name another run.out."
        ) from error
