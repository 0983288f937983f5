"""What is merged how: a tree of steps, from the command line or from a TOML file.

    [models]
    a = "a.safetensors"                 # beside the TOML file, or anywhere
    b = "b.safetensors"
    old = "base.safetensors"

    [merge.mixed]
    how = "weighted"                    # and difference, slerp, cosine, ties, dare, dare-ties, lora
    models = ["a", "b"]
    weights = ["0.3,OUT08=1"]           # for each model after the first; one for the other kinds

    [merge.result]                      # what is written
    how = "difference"
    models = ["mixed", "b", "old"]
    weights = [0.5]

A vector of merge-block-weighted is `mbw:` and 26 numbers for SD 1.5, 20 for SDXL: BASE IN00 … MID
OUT00 …; BASE counts for text encoders and VAE, IN00 for the embeddings too, the last for OUT.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recast.adapter.merge import Weights
from recast.errors import Refused
from recast.surgery.vectors import DIALECTS

HOWS = ("weighted", "difference", "slerp", "cosine", "ties", "dare", "dare-ties", "lora")
PAIRS = ("slerp", "cosine")
EACH = ("weighted", "dare")  # which take a weight for each model after the first
SPARSE = ("ties", "dare", "dare-ties")
MBW = (20, 26)
KEYS = {"how", "models", "weights", "density", "seed", "adapters"}
ADAPTER_KEYS = {"file", "strength", "weights"}


@dataclass(frozen=True)
class Added:
    """An adapter that a step adds: file, strength, and weights by block as text."""

    path: Path
    strength: float = 1.0
    weights: str = ""


@dataclass(frozen=True)
class Step:
    """One merge: the first model is what the others change. weights: one, or one for each other."""

    how: str
    models: tuple[Path | Step, ...]
    weights: tuple[Weights, ...] = ()
    density: float = 1.0
    seed: int = 0
    adapters: tuple[Added, ...] = ()

    def __post_init__(self) -> None:
        _refuse_odd(self)

    @property
    def files(self) -> list[Path]:
        """Every checkpoint below, each once, the first one first."""
        found: list[Path] = []
        for model in self.models:
            below = model.files if isinstance(model, Step) else [model]
            found += [path for path in below if path not in found]
        return found


def _refuse_odd(step: Step) -> None:
    count = len(step.models)
    wanted = {"difference": 3, "slerp": 2, "cosine": 2, "lora": 1}.get(step.how)
    if step.how not in HOWS:
        raise Refused(f"no merge is called {step.how!r}: choose {', '.join(HOWS)}.")
    if (wanted and count != wanted) or count < (wanted or 2):
        raise Refused(f"{step.how} merges {wanted or '2 or more'} models, and {count} are given.")
    weights = 0 if step.how == "lora" else count - 1 if step.how in EACH else 1
    if len(step.weights) != weights:
        raise Refused(f"{step.how} of {count} models takes {weights} weights, and "
                      f"{len(step.weights)} are given.")  # fmt: skip
    if not 0 < step.density <= 1:
        raise Refused(f"a density of {step.density:g} is no share: give more than 0, at most 1.")
    if step.how not in SPARSE and step.density != 1:
        raise Refused(f"{step.how} has no density: leave it out, or choose {', '.join(SPARSE)}.")
    if (step.how == "lora") != bool(step.adapters):
        raise Refused("adapters belong to a step of how = lora, which needs some.")
    if step.how in ("weighted", *PAIRS):
        shares = [[number for _, number in each.rules] for each in step.weights]
        if any(number < 0 for each in shares for number in each):
            raise Refused(f"a weight of {step.how} is a share from 0 to 1.")
        if sum(max(each) for each in shares) > 1 + 1e-9:
            raise Refused(
                f"the weights of {step.how} are shares, and with the first model's they make 1: "
                "give numbers whose sum is at most 1."
            )


def parse_weights(given: str | float) -> Weights:
    """Weights of one model from `0.3,OUT08=1` or `mbw:…`; raises Refused for what is no number."""
    text = str(given)
    if text.startswith("mbw:"):
        return _vector([_number(item, text) for item in text[4:].split(",")])
    rules: list[tuple[str, float]] = [("", 0.5)]
    for item in text.split(","):
        name, equals, number = item.rpartition("=")
        found = name.strip().upper() if name.strip().upper() == "IN00" else name.strip()
        rules.append(("IN" if found == "IN00" else found if equals else "", _number(number, text)))
    first = [number for name, number in rules if not name][-1]
    return Weights((("", first), *[rule for rule in rules if rule[0]]))


def _number(text: str, whole: str) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise Refused(
            f"the weight {whole}: {text.strip()!r} is no number; give 0.5, or NAME=0.5 for a block "
            "or part."
        ) from error
    if not math.isfinite(number):
        raise Refused(f"the weight {whole}: give a finite number.")
    return number


def _vector(numbers: Sequence[float]) -> Weights:
    if len(numbers) not in MBW:
        raise Refused(
            f"mbw: with {len(numbers)} numbers is none that is known: 20 for SDXL (BASE, IN00 … "
            "IN08, MID, OUT00 … OUT08), 26 for SD 1.5 (BASE, IN00 … IN11, MID, OUT00 … OUT11)."
        )
    dialect = DIALECTS[len(numbers)]
    rules = [("", numbers[0])]
    for label, number in zip(dialect.labels[1:], numbers[1:], strict=True):
        rules += [(block, number) for block in dialect.blocks(label)]
    rules.append(("OUT", numbers[-1]))
    # SD 1.5 has no LABEL
    kept = [rule for rule in rules if not (rule[0] == "LABEL" and dialect.family == "sd15")]
    return Weights(tuple(kept))


def read_tree(path: Path) -> Step:
    """The step `result` of a TOML file with all below it; raises Refused for what is wrong."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}): check the path.") from error
    except ValueError as error:
        raise Refused(f"{path} is no TOML file ({str(error)[:120]}): correct it.") from error
    models, steps = found.pop("models", {}), found.pop("merge", {})
    if found or not _is_table(models) or not _is_table(steps) or "result" not in steps:
        odd = f"[{next(iter(found))}]" if found else "no [merge.result]"
        raise Refused(f"{path} has {odd}: give [models] and [merge.NAME], of which one is result.")
    return _step(path, "result", models, steps, ())


def _step(
    path: Path,
    name: str,
    models: Mapping[str, Any],
    steps: Mapping[str, Any],
    above: tuple[str, ...],
) -> Step:
    where = f"{path}, [merge.{name}]"
    table = steps[name]
    if name in above:
        raise Refused(f"{where} is part of itself ({' in '.join((name, *reversed(above)))}).")
    if not _is_table(table) or table.keys() - KEYS:
        odd = min(table.keys() - KEYS) if _is_table(table) else "no table"
        raise Refused(f"{where}: {odd}; the keys are {', '.join(sorted(KEYS))}.")
    below: list[Path | Step] = []
    for one in table.get("models", []):
        if one in steps:
            below.append(_step(path, one, models, steps, (*above, name)))
        elif isinstance(models.get(one), str):
            below.append(path.parent / models[one])
        else:
            known = ", ".join([*models, *steps])
            raise Refused(f"{where}: no model and no merge is called {one!r}; there are {known}.")
    try:
        return Step(
            str(table.get("how", "weighted")), tuple(below),
            tuple(parse_weights(given) for given in table.get("weights", [])),
            float(table.get("density", 1.0)), int(table.get("seed", 0)),
            tuple(_added(path, given) for given in table.get("adapters", [])),
        )  # fmt: skip
    except Refused as refusal:
        raise Refused(f"{where}: {refusal}") from refusal
    except (TypeError, ValueError) as error:
        raise Refused(f"{where} has a value of the wrong kind ({error}).") from error


def _added(path: Path, given: Any) -> Added:
    if (
        not _is_table(given)
        or given.keys() - ADAPTER_KEYS
        or not isinstance(given.get("file"), str)
    ):
        raise Refused('an adapter is written as { file = "x.safetensors", strength = 0.8 }.')
    strength, weights = given.get("strength", 1.0), given.get("weights", "")
    return Added(path.parent / given["file"], float(strength), str(weights))


def _is_table(found: object) -> bool:
    return isinstance(found, dict)
