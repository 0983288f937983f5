"""The validations of a training log: drift from the original, error against the data, by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recast.evaluate.values import Course, Previewed


def course(rows: Iterable[Mapping[str, Any]]) -> Course | None:
    """Read the lines of a log that hold validations; None where there are none."""
    readings, shown = [], []
    last = 0
    for row in rows:
        last = row["step"]
        if begun := row.get("untrained", {}).get("validation"):
            readings.append(begun)
        if found := row.get("validation"):
            readings.append(found)
        if found := row.get("previews"):
            shown.append(Previewed(row["step"], found))
    if not readings:
        return None
    return Course(
        tuple(each["step"] for each in readings),
        tuple(each["drift"] for each in readings),
        tuple(each["data"] for each in readings),
        last,
        tuple(shown),
    )
