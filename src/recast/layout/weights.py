"""The weight files of one component of a diffusers folder, and which of several is taken.

The one without a variant in its name is taken, else fp16, else the first by name, non_ema last.
Each may be one file, or shards beside an index that says where each tensor lies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recast.checkpoint import Checkpoint, Spec
from recast.errors import RecastError, Refused

TEXT_LIMIT = 1 << 24  # bytes of a JSON file, as of a safetensors header
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")


class Weights:
    """The tensors of a component by their own names, in whichever file each one lies."""

    def __init__(self, folder: Path, stem: str) -> None:
        self.specs: dict[str, Spec] = {}
        self.files = weight_files(folder, stem)
        self._homes: dict[str, Checkpoint] = {}
        self._open: list[Checkpoint] = []
        try:
            for path in self.files:
                self._add(Checkpoint(path))
        except RecastError:
            self.close()
            raise

    def _add(self, file: Checkpoint) -> None:
        self._open.append(file)
        for name, spec in file.specs.items():
            if name in self.specs:
                raise Refused(
                    f"{file.path} holds {name}, and so does another shard: download it again."
                )
            self.specs[name], self._homes[name] = spec, file

    def raw(self, name: str) -> bytearray:
        """Read the bytes of one tensor."""
        return self._homes[name].raw(name)

    def hashes(self) -> list[tuple[str, str]]:
        """(file name, sha256) of each file."""
        return [(file.path.name, file.sha256()) for file in self._open]

    @property
    def nbytes(self) -> int:
        """Size of its files together."""
        return sum(file.nbytes for file in self._open)

    def close(self) -> None:
        """Close its files."""
        for file in self._open:
            file.close()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises Refused for anything else."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(TEXT_LIMIT).decode("utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path} is absent: download or export the whole folder again.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(
            f"{path} is no JSON text ({str(error)[:80]}): download or export it again."
        ) from error
    if not isinstance(found, dict):
        raise Refused(f"{path} is no JSON object: download or export it again.")
    return found


def weight_files(folder: Path, stem: str) -> tuple[Path, ...]:
    """The files to read; raises Refused where there are none, or not all."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    single = _variants(names, rf"{stem}(?:\.(\w+))?\.safetensors")
    indices = _variants(names, rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json")
    if not single and not indices:
        raise _without(folder, stem, names)
    variant = min({*single, *indices}, key=_preference)
    if variant in single:
        return (folder / single[variant],)
    return _shards(folder / indices[variant])


def _variants(names: Iterable[str], pattern: str) -> dict[str, str]:
    """{"fp16": file name, …}; the variant "" is the one without a name."""
    found = ((re.fullmatch(pattern, name), name) for name in names)
    return {match[1] or "": name for match, name in found if match}


def _preference(variant: str) -> tuple[bool, ...] | tuple[Any, ...]:
    return (variant != "", variant != "fp16", variant == "non_ema", variant)


def _shards(index: Path) -> tuple[Path, ...]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise Refused(f"{index} has no weight_map: download it again.")
    names = sorted({str(name) for name in places.values()})
    if odd := [name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)]:
        raise Refused(f"{index} names {odd[0][:80]!r}, which is no file of its own folder.")
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise Refused(
            f"{index.parent} has {len(names) - len(absent)} of {len(names)} shards, {absent[0]} "
            "is absent: finish the download."
        )
    return tuple(index.parent / name for name in names)


def _without(folder: Path, stem: str, names: list[str]) -> Refused:
    if not names:
        return Refused(f"{folder} is absent or empty: download or export the whole folder again.")
    if any(name.startswith(stem) and name.endswith(".safetensors") for name in names):
        return Refused(f"{folder} has shards and no {stem}.safetensors.index.json: download that.")
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        return Refused(
            f"{folder / pickled[0]} is a pickle, which can run code when it is opened, and there "
            f'is no {stem}.safetensors: convert the folder once with python -c "from diffusers '
            f"import DiffusionPipeline as P; P.from_pretrained('{folder.parent}')"
            ".save_pretrained('OUT')\" and give Recast the result."
        )
    return Refused(f"{folder} has no {stem}.safetensors: download or export it again.")
