"""Write, correct and strip what a file says about itself; its tensors stay, byte for byte.

    checkpoint    empty tensors v_pred, ztsnr; modelspec.prediction_type, predict_key; and
                  recast.objective
    adapter       the metadata alone: loaders look for tensors of that name in checkpoints only

No byte of the data section moves, because markers are empty, so hashes of the content stay true.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recast.adapter.places import refuse_residual
from recast.checkpoint import Checkpoint, write
from recast.commit import refuse_target
from recast.errors import Refused
from recast.inspection import describe
from recast.layout.names import is_adapter
from recast.markers import MARKERS, OBJECTIVES, OWN, STALE, marker_specs, stamp, strip

# fields of sai_model_spec 1.0.1 that are the author's to say
FIELDS = (
    "title", "description", "author", "date", "license", "usage_hint", "tags", "trigger_phrase",
    "merged_from", "thumbnail", "resolution", "implementation", "implementation_version",
    "timestep_range", "encoder_layer", "preprocessor", "is_negative_embedding",
)  # fmt: skip
SHAPED = {
    "date": (r"\d{4}-\d\d-\d\d(T\d\d:\d\d(:\d\d)?.*)?", "2026-11-21"),
    "resolution": (r"\d+x\d+", "1024x1024"),
}
HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
SAID = tuple(name for name in STALE if name not in HASHES)

Specs = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Marking:
    """What a file shall say: an objective, or (strip) none; fields of modelspec, "" to remove."""

    objective: str | None = None
    strip: bool = False
    fields: Mapping[str, str] = field(default_factory=dict)


def fields(given: list[str]) -> dict[str, str]:
    """`NAME=TEXT` items as fields of modelspec; raises Refused for other names and wrong forms."""
    found = {}
    for item in given:
        name, equals, text = item.partition("=")
        name = name.strip().removeprefix("modelspec.")
        if name in ("prediction_type", "predict_key", "sai_model_spec", "architecture"):
            raise Refused(f"--set {name}: that follows from what the file predicts: give --as.")
        if not equals or name not in FIELDS:
            near = difflib.get_close_matches(name, FIELDS, 1, 0)[0]
            raise Refused(f"--set {item!r}: give a field and its text, as {near}=…; there are "
                          f"{', '.join(FIELDS)}.")  # fmt: skip
        shape, example = SHAPED.get(name, ("", ""))
        if text and shape and not re.fullmatch(shape, text):
            raise Refused(f"--set {item!r}: {name} is written as {example}.")
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Refused(f"--set {name}: the text is not Unicode; type it anew.")
        found[name] = text
    return found


def mark(path: Path, out: Path, marking: Marking, *, force: bool = False) -> str:
    """Stream a file to another that says what the marking does; returns its sha256.

    Raises Refused for what is neither checkpoint nor adapter and for a residual.
    """
    with Checkpoint(path) as file:
        refuse_target(out, force=force, sources=[path])
        specs, metadata = marked(file, marking)
        return write(out, specs, _tensors(file, specs), metadata, force=force, sources=[path])


def marked(file: Checkpoint, marking: Marking) -> tuple[Specs, dict[str, str]]:
    """The tensors and header of a file after a marking."""
    refuse_residual(file)
    facts = describe(file.path)
    family = facts.get("family")
    specs = {key: (spec.dtype, spec.shape) for key, spec in file.specs.items()}
    metadata = dict(file.metadata)
    if marking.objective is not None or marking.strip:
        if family is None:
            said = "; ".join(facts.get("problems", ())) or f"it is of kind {facts['kind']}"
            raise Refused(
                f"{file.path} is no checkpoint or adapter of SDXL or SD 1.5, so nothing is known "
                f"about markers in it ({said[:200]})."
            )
        kept = strip(specs)
        marks: Specs = {}
        if marking.objective is None:
            metadata = {key: value for key, value in metadata.items() if key not in SAID}
        else:
            whole = not any(map(is_adapter, specs))
            marks = marker_specs(marking.objective) if whole else {}
            stamped = stamp(metadata, marking.objective, family=family if whole else None)
            metadata = stamped | {key: metadata[key] for key in HASHES if key in metadata}
        specs = {**marks, **{key: specs[key] for key in kept}}
    for name, text in marking.fields.items():
        metadata["modelspec.sai_model_spec"] = "1.0.1"
        metadata[f"modelspec.{name}"] = text
        if not text:
            del metadata[f"modelspec.{name}"]
    return specs, metadata


def _tensors(file: Checkpoint, specs: Specs) -> Iterator[tuple[str, Tensor]]:
    for key in specs:
        made = key in MARKERS and key not in file
        yield key, torch.zeros(0) if made else file[key]


def objective_of(text: str) -> str:
    """An objective's name; raises Refused with the ones there are."""
    if text not in OBJECTIVES:
        raise Refused(f"--as {text}: choose {', '.join(OBJECTIVES)}.")
    return text


def said(path: Path) -> dict[str, object]:
    """What a file says of its objective, where, and what each tool will believe it is."""
    facts = describe(path)
    seen = facts.get("objective") or {}
    provenance = facts["provenance"]
    spoken = {
        "modelspec": provenance["modelspec"],
        **({OWN: provenance["recast"]["objective"]} if "objective" in provenance["recast"] else {}),
    }
    return {
        "file": str(path),
        "kind": facts["kind"],
        "family": facts.get("family"),
        "objective": seen.get("name"),
        "evidence": seen.get("evidence", []),
        "contradictions": seen.get("contradictions", []),
        "marker_tensors": facts.get("markers", []),
        "says": spoken,
        "tools": [*facts.get("loaders", []), *_others(path, facts)],
    }


def _others(path: Path, facts: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """A1111, Forge and kohya's trainers, of a single-file checkpoint; nothing of an adapter."""
    if facts["kind"] == "adapter":
        note = (
            "takes the objective from the checkpoint that it is put on, never from the adapter's "
            "file"
        )
        yield {"loader": "every program", "objective": None, "note": note}
        return
    family, seen = facts.get("family"), facts.get("objective")
    if family is None or path.is_dir() or not isinstance(seen, Mapping):
        return
    truth, tensors = seen.get("name"), facts.get("markers")
    v = truth in ("v", "v-zsnr")
    beside = path.with_suffix(".yaml").exists()
    yield {
        "loader": "A1111",
        "objective": "as its .yaml says" if beside else "eps",
        "note": None if beside or truth == "eps" else (
            "reads a .yaml of the same name beside the file: recast mark --hints writes it" if v
            else f"has no sampler for {truth}"
        ),
    }  # fmt: skip
    if family == "sdxl":
        found = tensors if isinstance(tensors, list) else []
        read = ("v-zsnr" if "ztsnr" in found else "v") if "v_pred" in found else "eps"
        seen_by = None if read == truth else "reads the tensors v_pred and ztsnr"
        yield {"loader": "Forge, reForge", "objective": read, "note": seen_by}
    flags = {"v": "--v_parameterization", "v-zsnr": "--v_parameterization --zero_terminal_snr"}
    told = None if truth == "eps" else (
        f"reads no marker: give {flags[str(truth)]}" if v else f"does not train {truth} here"
    )  # fmt: skip
    yield {"loader": "kohya's trainers", "objective": "eps", "note": told}
