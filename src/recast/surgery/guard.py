"""What may be cut: changes of a model, never its principal part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recast.errors import Refused


def refuse_principal(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse an adapter that holds principal parts of a model's weights instead of a change."""
    role = metadata.get("recast.role", "delta")
    if role.startswith("pissa-"):
        start, end = ("", path) if role == "pissa-trained" else (path, "TRAINED")
        raise Refused(
            f"{path} is a {role} adapter, the principal part of a model's weights, and less of it "
            f"is less of the model; make the change first: recast extract MODEL --initial "
            f"{start or 'INITIAL'} --trained {end} --out delta.safetensors."
        )
