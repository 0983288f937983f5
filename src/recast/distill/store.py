"""Assessors on disk: safetensors, with the shape, the fingerprint and the facts in the header.

The fingerprint says what the features were taken of (`FeatureTap.fingerprint`); the facts are what
was measured: accuracies, active bins, temperatures, the teacher's hash.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recast.checkpoint import Checkpoint, write_dict
from recast.distill.assessor import Assessor, Shape
from recast.errors import Refused

ROLE = "assessor"
SHAPE, FINGERPRINT, FACTS = "recast.shape", "recast.fingerprint", "recast.facts"


def write_assessor(
    path: Path | str,
    assessor: Assessor,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
    *,
    force: bool = False,
) -> str:
    """Write an assessor; returns the file's sha256."""
    about = {
        "recast.role": ROLE,
        SHAPE: json.dumps(asdict(assessor.shape)),
        FINGERPRINT: json.dumps(dict(fingerprint)),
        FACTS: json.dumps(dict(facts), allow_nan=False),
    }
    state = {name: each.detach() for name, each in assessor.state_dict().items()}
    return write_dict(path, state, about, force=force)


def read_assessor(
    path: Path | str, fingerprint: Mapping[str, str] | None = None
) -> tuple[Assessor, dict[str, Any]]:
    """An assessor, frozen, and its facts; with the fingerprint of the network it is to read.

    Raises Refused for a file that is no assessor, or one of another network, tap or objective.
    """
    with Checkpoint(path) as file:
        if file.metadata.get("recast.role") != ROLE:
            raise Refused(f"{path} is no assessor: make one with recast assessor train.")
        shape, theirs, facts = (_stated(file, key) for key in (SHAPE, FINGERPRINT, FACTS))
        if fingerprint is not None:
            check_fingerprint(path, theirs, fingerprint)
        try:
            assessor = Assessor(Shape(**shape))
        except (TypeError, ValueError) as error:
            raise Refused(f"{path}: its shape is damaged ({error}): make it again.") from error
        _fill(assessor, file)
    return assessor.eval().requires_grad_(False), facts


def check_fingerprint(path: Path | str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Raise Refused naming the first thing that two fingerprints do not agree on."""
    for name in (*ours, *theirs):
        if theirs.get(name) != ours.get(name):
            raise Refused(
                f"{path} was made for another network: its {name} is {theirs.get(name)!r} and not "
                f"{ours.get(name)!r}; make one for this model with recast assessor train."
            )


def _stated(file: Checkpoint, key: str) -> dict[str, Any]:
    try:
        found = json.loads(file.metadata[key])
    except (KeyError, ValueError) as error:
        raise Refused(f"{file.path}: its {key} is missing or damaged: make it again.") from error
    if not isinstance(found, dict):
        raise Refused(f"{file.path}: its {key} is damaged: make it again.")
    return found


def _fill(assessor: Assessor, file: Checkpoint) -> None:
    state = assessor.state_dict()
    if wrong := sorted(set(state) ^ set(file)):
        raise Refused(f"{file.path} does not hold {wrong[0]} as its shape says: make it again.")
    for name, place in state.items():
        if file.specs[name].shape != tuple(place.shape):
            raise Refused(f"{file.path}: {name} is not of its stated shape: make it again.")
        place.copy_(file[name])
