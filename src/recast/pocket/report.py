"""The pocket pipeline's figures as a table, and its pictures as contact sheets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from safetensors import safe_open
from torch import Tensor

from recast.pocket import path
from recast.pocket.world import ATTRIBUTES, SIDE

COLUMNS = (*ATTRIBUTES, "all", "watermark")


def figures(artefact: Path) -> dict[str, dict[str, float]]:
    """Return the figures kept in a measurement's header, for "seen" and "held"."""
    with safe_open(artefact, "pt") as opened:
        kept = opened.metadata()
    return {side: json.loads(kept[side]) for side in ("seen", "held")}


def table(ceiling: Path, measured: Mapping[str, Path]) -> str:
    """Return a Markdown table of every measurement beside the VAE's ceiling, and the files."""
    lines = [f"| pictures | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, artefact in {"VAE ceiling": ceiling, **measured}.items():
        for side, row in figures(artefact).items():
            cells = " | ".join(f"{row[column]:.3f}" for column in COLUMNS)
            lines.append(f"| {name}, {side} | {cells} |")
    lines += ["", "| file | MB | sha256 |", "|---|---|---|"]
    for name in measured:
        data = path(name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        lines.append(f"| {name}.safetensors | {len(data) / 1e6:.1f} | `{digest}` |")
    return "\n".join(lines) + "\n"


def sheet(target: Path, pictures: Mapping[str, Tensor], columns: int = 16, zoom: int = 2) -> None:
    """Write pictures (B, H, W, 3), bytes, as one PNG, the groups below each other."""
    tiles = [tile for name in sorted(pictures, reverse=True) for tile in pictures[name]]
    step = SIDE * zoom + 4
    page = Image.new("RGB", (columns * step, -(-len(tiles) // columns) * step), "white")
    for index, tile in enumerate(tiles):
        picture = Image.fromarray(tile.numpy()).resize((SIDE * zoom, SIDE * zoom), Image.NEAREST)
        page.paste(picture, (index % columns * step, index // columns * step))
    page.save(target)
