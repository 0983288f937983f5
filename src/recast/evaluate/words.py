"""Figures in words: what was kept, what was lost, by stated bounds."""

from __future__ import annotations

from dataclasses import dataclass

from recast.evaluate.values import Figure, Report

KEPT, MOSTLY = 0.98, 0.90  # of the original's share of right pictures
CHANCE = 1.5  # fewer pictures than this are no difference
SAME_DB, ALIKE_DB = 30.0, 25.0  # below 25 dB the pictures are other pictures
MARKED = 0.01  # watermark rate that counts as none
DRIFT_NEAR, DRIFT_FAR = 1.05, 1.25  # error against the data, of the original's


@dataclass(frozen=True)
class Row:
    """One line of the table, as shown; `state` is kept, partly, lost or unknown, `label` its word.

    `share` in [0, 1] is how much was kept, where that can be said.
    """

    key: str
    name: str
    original: str
    converted: str
    state: str
    label: str
    words: str
    share: float | None = None


LABELS = {"kept": "kept", "partly": "mostly kept", "lost": "lost", "unknown": "not measured"}


def rows(report: Report) -> tuple[Row, ...]:
    """The table of kept and lost, in the page's order; plain texts, for a page or a terminal."""
    return (
        _agreement(report.psnr_same_noise_db),
        _share("alignment", "Concepts in the training images", report.alignment),
        _share("retention", "Concepts absent from the training images", report.retention),
        _leakage(report.leakage),
        _drift(report),
        _identity(report),
    )


def summary(report: Report) -> str:
    """The result in one or two sentences."""
    told = [row for row in rows(report) if row.state != "unknown"]
    lost = [TROUBLE[row.key][1] for row in told if row.state == "lost"]
    partly = [TROUBLE[row.key][0] for row in told if row.state == "partly"]
    if not told:
        return "Nothing was measured in this run."
    if lost:
        return f"Not all is well: {_list(lost + partly)}."
    if partly:
        return f"Nearly everything was kept, but {_list(partly)}."
    return "Everything that was measured was kept."


def _list(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])}, and {parts[-1]}"


TROUBLE = {  # in a sentence: a little, much
    "psnr_same_noise_db": ("details of pictures differ", "pictures are not the original's"),
    "alignment": (
        "some concepts of the training images suffered",
        "concepts of the training images were lost",
    ),
    "retention": (
        "some concepts absent from the training images suffered",
        "concepts absent from the training images were forgotten",
    ),
    "leakage": ("a few pictures carry a watermark", "a watermark was learnt"),
    "drift": ("the error against the data grew a little", "the error against the data grew"),
    "identity": ("", "the file still acts like the original"),
}


def _agreement(figure: Figure) -> Row:
    name, value = "Same picture from the same noise", figure.converted
    if value is None:
        return _unknown("psnr_same_noise_db", name, figure)
    ceiling = "" if figure.original is None else f"{figure.original:.1f} dB"
    states = [
        (SAME_DB, "kept", "The same pictures; differences are hard to see."),
        (ALIKE_DB, "partly", "The same compositions; details differ."),
        (float("-inf"), "lost", "Other pictures than the original's."),
    ]
    state, words = next((state, words) for bound, state, words in states if value >= bound)
    if figure.original is not None:
        words += (
            f" {figure.original:.1f} dB is as near as the original comes to itself on the new path."
        )
    return Row("psnr_same_noise_db", name, ceiling, f"{value:.1f} dB", state, LABELS[state], words)


def _share(key: str, name: str, figure: Figure) -> Row:
    if figure.converted is None:
        return _unknown(key, name, figure)
    kept = figure.ratio if figure.ratio is not None else figure.converted
    fewer = ((figure.original or 0) - figure.converted) * figure.count
    by_chance = bool(figure.count) and fewer < CHANCE
    state = "kept" if kept >= KEPT or by_chance else "partly" if kept >= MOSTLY else "lost"
    words = f"{min(kept, 1):.0%} of what the original draws right is still right"
    words += f", judged on {figure.count} pictures." if figure.count else "."
    before, after = _percent(figure.original), _percent(figure.converted)
    return Row(key, name, before, after, state, LABELS[state], words, min(kept, 1))


def _leakage(figure: Figure) -> Row:
    name, value = "Watermarks leaked into pictures", figure.converted
    if value is None:
        return _unknown("leakage", name, figure)
    if value <= max(MARKED, figure.original or 0):
        state, label, words = "kept", "none", "No watermark was learnt."
    else:
        state, label = ("partly", "a few") if value <= 5 * MARKED else ("lost", "learnt")
        words = "A watermark of the training images shows up in pictures."
    return Row("leakage", name, _percent(figure.original), _percent(value), state, label, words)


def _drift(report: Report) -> Row:
    name, drift = "Error against the data", report.drift
    if drift.converted is None:
        return _unknown("drift", name, Figure(None, None, None, drift.note or "not measured"))
    ratio = drift.ratio or 1.0
    state = "kept" if ratio <= DRIFT_NEAR else "partly" if ratio <= DRIFT_FAR else "lost"
    words = f"{ratio:.2f} times the original's over the noise levels it knows"
    if drift.against_original is not None:
        words += f"; distance from the original itself {drift.against_original:.4f}"
    original = "" if drift.original is None else f"{drift.original:.4f}"
    return Row("drift", name, original, f"{drift.converted:.4f}", state, LABELS[state], words + ".")


def _identity(report: Report) -> Row:
    name, proof = f"Really predicts {report.target}", report.identity
    if proof is None:
        return _unknown("identity", name, Figure(None, None, None, "not measured"))
    words = (
        f"{proof.psnr_new:.1f} dB under the {report.target} sampler, "
        f"{proof.psnr_old:.1f} dB under the {report.source} sampler: "
    )
    if proof.proven:
        return Row(
            "identity",
            name,
            "",
            "yes",
            "kept",
            "proven",
            f"{words}the old sampler breaks it, as it must.",
        )
    return Row(
        "identity", name, "", "no", "lost", "not proven", f"{words}it still acts like the original."
    )


def _unknown(key: str, name: str, figure: Figure) -> Row:
    note = figure.note or "not measured"
    return Row(key, name, "", "–", "unknown", LABELS["unknown"], f"{note[:1].upper()}{note[1:]}.")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}".replace(".0%", "%")
