"""What an assessor's run leaves: report.json, report.md, and assessor.safetensors if it is usable.

Imports no torch, so that a report is shown at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recast.assessing.settings import Settings
from recast.commit import commit
from recast.errors import Refused

if TYPE_CHECKING:
    from recast.distill.assessor import Assessor

ASSESSOR, REPORT, PAGE = "assessor.safetensors", "report.json", "report.md"


def finished(out: Path, tag: str, *, force: bool) -> bool:
    """Whether the folder has this run's assessor; refuses another's, unless forced."""
    if out.exists() and not out.is_dir():
        raise Refused(f"{out} is a file: name a folder.")
    if not (out / REPORT).exists():
        return False
    theirs = load(out)["about"].get("digest")
    if theirs == tag:
        return (out / ASSESSOR).exists()
    if (out / ASSESSOR).exists() and not force:
        raise Refused(
            f"{out} holds another assessor: give another --out, or --force to replace it (features "
            "that serve both stay)."
        )
    return False


def write(
    out: Path,
    assessor: Assessor,
    fingerprint: Mapping[str, str],
    about: Mapping[str, str],
    settings: Settings,
    found: Mapping[str, Any],
) -> None:
    """Write the report, then the assessor; an unusable one leaves its report only."""
    from recast.distill.store import write_assessor

    said = {"about": about, "fingerprint": dict(fingerprint), "settings": asdict(settings), **found}
    _put(out / REPORT, json.dumps(said, indent=1, allow_nan=False) + "\n")
    _put(out / PAGE, "\n".join(page(said)) + "\n")
    if found["trouble"]:
        (out / ASSESSOR).unlink(missing_ok=True)
        return
    facts = {
        **about, "settings": asdict(settings), **found["profile"],
        "blocks": {
            name: {"right": each["bins"]["right"], "n": each["bins"]["n"],
                   "temperatures": each["temperatures"]}
            for name, each in found["blocks"].items()
        },
    }  # fmt: skip
    write_assessor(out / ASSESSOR, assessor, fingerprint, facts, force=True)


def load(out: Path) -> dict[str, Any]:
    """The report of a run; raises Refused where there is none."""
    try:
        return json.loads((out / REPORT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(
            f"{out} has no {REPORT}: make one with recast assessor train MODEL --out {out}."
        ) from error
    except (OSError, ValueError) as error:
        raise Refused(f"{out / REPORT} cannot be read ({error}): train again.") from error


def page(said: Mapping[str, Any]) -> Iterator[str]:
    """The report in words and tables, line by line."""
    how, about = said["settings"], said["about"]
    yield f"# Assessor of {about['teacher'][:12]} ({about['objective']})"
    yield ""
    what = {"clock": "the time the network is told", "noise_level": "the noise in its input"}
    yield (
        f"Reads {what[how['t_signal']]}: {how['bins']} bins (chance {1 / how['bins']:.3f}), "
        f"{how['patterns']} {how['prototypes']} patterns, {how['pattern_head']} head, "
        f"{how['where']} features, pooled by {how['pooling']}; {said['parameters']:,} parameters, "
        f"{how['samples']:,} samples, {how['steps']:,} steps."
    )
    yield ""
    yield from blocks_table(said)
    yield ""
    yield from controls_table(said)
    yield ""
    yield from sentences(said)


def blocks_table(said: Mapping[str, Any]) -> Iterator[str]:
    """What each block tells."""
    yield ("| block | right | ±1 | nats | ECE | pattern nats | usage | q mean, least | alpha | n |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, each in said["blocks"].items():
        q = f"{each['quality'][0]:.2f}, {each['quality'][1]:.2f}"
        yield (
            f"| {name} | {each['top1']:.3f} | {each['within1']:.3f} | {each['ce']:.2f} | "
            f"{each['ece']:.3f} | {each['pattern_ce']:.2f} | {each['usage']:.2f} | {q} | "
            f"{each['alpha']:.2f} | {each['n']:,} |"
        )


def controls_table(said: Mapping[str, Any]) -> Iterator[str]:
    """The network told another time, and the network of random weights."""
    yield "| block | told t', as told | told t', as it is | random weights | literal, untrained |"
    yield "|---|---|---|---|---|"
    for name, each in said["mismatch"].items():
        chance, weight = said["random"][name], said["untrained"]["weights"][name]
        yield (
            f"| {name} | {each['fed']:.3f} / {each['fed_within1']:.3f} | "
            f"{each['true']:.3f} / {each['true_within1']:.3f} | "
            f"{chance['top1']:.3f} / {chance['within1']:.3f} | {weight:.2f} |"
        )


def sentences(said: Mapping[str, Any]) -> Iterator[str]:
    """The other controls, and whether the assessor may be used."""
    fed, true = (
        sum(each[key] for each in said["mismatch"].values()) / len(said["mismatch"])
        for key in ("fed", "true")
    )
    chance = 1 / said["settings"]["bins"]
    read = "the time it is told" if fed > true else "how noisy the input is"
    yield (
        f"- Told another time than its input's ({said['mismatch_n']:,} samples), the network shows "
        f"{read}: {fed:.3f} of the samples read as told, {true:.3f} as they are (chance "
        f"{chance:.3f})."
    )
    yield from untaught(said)
    shuffled = said["shuffled"]
    yield (
        f"- Features of other samples: e_t goes from {shuffled['before']:.2f} to "
        f"{shuffled['after']:.2f} nats. A constant on all logits moves it by "
        f"{said['shifted']:.1e}."
    )
    yield (
        f"- A probe as it is drawn, by the published formula: {said['untrained']['saturated']:.0%} "
        "of the blocks' weights at their bound 3."
    )
    active = said["profile"]["active"]
    if active is not None:
        yield f"- {sum(active)} of {len(active)} bins can be believed."
    yield f"- Not usable: {said['trouble']}" if said["trouble"] else "- Usable."


def untaught(said: Mapping[str, Any]) -> Iterator[str]:
    """How much of what is read comes without any training of the network."""
    own, random = (
        {name: each["top1"] for name, each in said[key].items()} for key in ("blocks", "random")
    )
    means = [sum(each.values()) / len(each) for each in (own, random)]
    alike = [name for name in own if random[name] >= 0.9 * own[name]]
    where = f"; in {', '.join(alike)} as much or nearly" if alike else ""
    yield (
        f"- Random weights: on average a block of a network that was never trained lets the same "
        f"probe read {means[1]:.3f}, a block of the teacher {means[0]:.3f}{where}."
    )


def _put(path: Path, text: str) -> None:
    data = text.encode()
    commit(path, lambda file: file.write(data), size=len(data), force=True)
