"""The tables of bench/size."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
NAMES = {"full": "bf16", "8bit": "8 bits", "4bit": "4 bits"}
CARDS = (6, 8, 12)  # GB as they are sold, 2^30 bytes each
# what a CUDA context and its libraries take before anything is allocated, and the screen
SPARE = 0.8e9


def page(rows: list[Row], foreseen: list[Row], about: str) -> str:
    """Everything as Markdown."""
    lines = ["# bench/size", "", about.strip(), "", "## Measured", ""]
    lines += measured([row for row in rows if row["device"] == "cpu"])
    on_gpu = [row for row in rows if row["device"] == "cuda"]
    lines += ["", "On a GPU:", "", *measured(on_gpu)] if on_gpu else ["", "On a GPU: **not run**."]
    lines += ["", "## Predicted, batch 1", "", *predicted(foreseen)]
    lines += ["", "## Cards", "", *cards(foreseen)]
    return "\n".join([*lines, ""])


def measured(rows: list[Row]) -> list[str]:
    """What each row took, beside its forecast."""
    if not rows:
        return ["Not run."]
    head = (
        "| base | side | s a step | weights GB (forecast) | kept MB (forecast) | before the "
        "read-out | alive MB (forecast) | above the model MB |"
    )
    lines = [f"{' · '.join(sorted({row['name'] for row in rows}))}, torch {rows[0]['torch']}.", ""]
    lines += [head, "|---|" + "--:|" * 7]
    for row in rows:
        of = row["forecast"]
        # the weights' sums are kept too; master and moments were there before the step
        kept = of["activations"] + 2 * row["trained"]
        step = kept + of["working"] + 4 * row["trained"]
        lines.append(
            f"| {NAMES[row['base']]} | {row['side']} | {row['seconds']:.0f} "
            f"| {giga(row['weights'])} ({giga(of['trunk'])}) "
            f"| {mega(row['kept'])} ({mega(kept)}) | {mega(row['kept_before'])} "
            f"| {mega(row['alive'])} ({mega(step)}) | {mega(row['step_above'])} |"
        )
    return lines


def predicted(foreseen: list[Row]) -> list[str]:
    """The parts of each forecast."""
    lines = ["| base | side | weights | read-out | kept | working | in all |", "|---|" + "--:|" * 6]
    for row in foreseen:
        parts = [row[key] for key in ("trunk", "adapter", "activations", "working", "total")]
        figures = " | ".join(f"{giga(part)} GB" for part in parts)
        lines.append(f"| {NAMES[row['base']]} | {row['side']} | {figures} |")
    return lines


def cards(foreseen: list[Row]) -> list[str]:
    """Which card holds which step, with room for the driver."""
    lines = [
        f"A card of n GB has n x 2^30 bytes, {SPARE / 1e9:.1f} GB of them taken to be the driver's "
        "(a guess, not measured); what is left beside the forecast is in the table.",
        "",
        "| card | " + " | ".join(f"{NAMES[r['base']]}, {r['side']}" for r in foreseen) + " |",
        "|---|" + "--:|" * len(foreseen),
    ]
    for card in CARDS:
        room = [card * 2**30 - SPARE - row["total"] for row in foreseen]
        told = [f"{giga(left)} GB left" if left > 0 else "no" for left in room]
        lines.append(f"| {card} GB | {' | '.join(told)} |")
    return lines


def giga(count: float) -> str:
    """Bytes in GB."""
    return f"{count / 1e9:.2f}"


def mega(count: float) -> str:
    """Bytes in MB."""
    return f"{count / 1e6:,.0f}"
