"""The tables of bench/train."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
PEERS = ("peft", "lycoris")
NAMES = {"peft": "PEFT", "lycoris": "LyCORIS"}
LOW = 12e9  # bytes that the row of SDXL with both text encoders may take


def page(found: Row, about: str) -> str:
    """Everything as Markdown."""
    lines = ["# bench/train", "", about.strip(), "", "## Times and memory", ""]
    lines += compared(found["rows"]) if found["rows"] else ["Not run."]
    lines += ["", "On a GPU: **not run**.", ""]
    if memory := found.get("memory"):
        lines += ["## Predicted memory of a step", "", *predicted(memory["predicted"]), ""]
        lines += ["## The prediction against a real step", "", *checked(memory["checked"])]
    return "\n".join([*lines, ""])


def compared(rows: list[Row]) -> list[str]:
    """Recast's times, and how many times as long and as large the peers' are."""
    lines = [f"{rows[0]['device']}; {rows[0]['torch']}.", ""]
    lines += ["x1.20: the peer takes 1.20 times what Recast takes.", ""]
    head = [f"{NAMES[peer]} {what}" for peer in PEERS for what in ("CPU", "wall", "tensors")]
    lines.append("| row | layers | Recast CPU s | wall s | tensors MB | " + " | ".join(head) + " |")
    lines.append("|---|" + "--:|" * (4 + len(head)))
    for row in rows:
        mine = row["recast"]
        cells = [f"{mine['cpu']:.3f}", f"{mine['wall']:.3f}", f"{mine['alive'] / 1e6:.0f}"]
        for peer in PEERS:
            cells += [f"x{row[peer][key] / mine[key]:.2f}" for key in ("cpu", "wall", "alive")]
        lines.append(f"| {row['row']} | {row['layers']} | " + " | ".join(cells) + " |")
    return lines


def predicted(rows: list[Row]) -> list[str]:
    """The table of real models."""
    head = (
        "| model | trained | rank | side | batch | dtype | checkpointing | numbers | held GB "
        "| made GB | in all GB |"
    )
    lines = [head, "|---|---|" + "--:|" * 3 + "---|---|" + "--:|" * 4]
    for row in rows:
        what = "UNet and text encoders" if row["texts"] else "UNet"
        lines.append(
            f"| {row['family']} | {what} | {row['rank']} | {row['side']} | {row['batch']} "
            f"| {row['dtype']} | {'on' if row['recomputed'] else 'off'} "
            f"| {row['trained'] / 1e6:.0f}M | {row['held'] / 1e9:.2f} | {row['alive'] / 1e9:.2f} "
            f"| {row['total'] / 1e9:.2f} |"
        )
    whole = [r for r in rows if r["family"] == "sdxl" and r["texts"]]
    for row in whole:
        verdict = "within" if row["total"] <= LOW else "above"
        lines += ["", f"SDXL with both text encoders: {row['total'] / 1e9:.2f} GB, {verdict} 12."]
    return lines


def checked(rows: list[Row]) -> list[str]:
    """Traced without numbers, counted with them."""
    lines = ["| side | checkpointing | traced MB | counted in a real step MB | apart |"]
    lines.append("|--:|---|--:|--:|--:|")
    for row in rows:
        apart = row["traced"] / row["counted"] - 1
        lines.append(
            f"| {row['side']} | {'on' if row['recomputed'] else 'off'} | {row['traced'] / 1e6:.1f} "
            f"| {row['counted'] / 1e6:.1f} | {apart:+.1%} |"
        )
    return lines
