"""What a file says about its objective, in the three places where that is said.

    tensors     v_pred, ztsnr (empty): what ComfyUI, Forge and reForge look at for SDXL
    metadata    modelspec.prediction_type "epsilon" | "v"   (sai_model_spec 1.0.1)
                modelspec.predict_key     "epsilon" | "v"   (ComfyUI writes it)
    metadata    recast.objective  eps | v | v-zsnr | flow | x0

Neither of the first two has a word for flow or x0; a file that predicts those leaves them out.  A
diffusers folder says it in a fourth place, its scheduler, which its reader enters as metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from recast.errors import Refused

OBJECTIVES = ("eps", "v", "v-zsnr", "flow", "x0")
TENSORS: dict[str, tuple[str, ...]] = {"v": ("v_pred",), "v-zsnr": ("v_pred", "ztsnr")}
WORDS = {"eps": "epsilon", "v": "v", "v-zsnr": "v"}
MEANINGS = {"epsilon": "eps", "v": "v"}
EDM = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
MARKERS = ("v_pred", "ztsnr", *EDM)
OWN = "recast.objective"
SCHEDULER = "recast.scheduler"  # what a folder's scheduler states; in no file
FIELDS = ("modelspec.prediction_type", "modelspec.predict_key")
# hashes of the content, wrong once it changes
STALE = (*FIELDS, OWN, SCHEDULER, "modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
ARCHITECTURES = {
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd15": "stable-diffusion-v1",
}


@dataclass(frozen=True)
class Evidence:
    """The objective a file states, why, and what in the file speaks against it.

    objective is None where it states one that Recast does not know. Anything in `contradictions`
    means: ask the user.
    """

    objective: str | None
    reasons: tuple[str, ...]
    contradictions: tuple[str, ...]


def read_objective(names: Iterable[str], metadata: Mapping[str, str]) -> Evidence:
    """Weigh the markers of a file; the most specific statement wins, every other must agree.

    names: the file's tensor names. Without any marker it is "eps", as every loader assumes.
    """
    tensors = [name for name in MARKERS if name in set(names)]
    stated = _statements(tensors, metadata)
    odd = [f"{place} is {word!r}, which Recast does not know" for place, word in _unknown(metadata)]
    if "ztsnr" in tensors and "v_pred" not in tensors:
        odd.append("ztsnr is there without v_pred, so no loader heeds it")
    if edm := [name for name in tensors if name in EDM]:
        return Evidence(None, (f"{', '.join(edm)}: an EDM model",), tuple(odd))
    if not stated:
        return Evidence("eps", ("no marker: the default of Stable Diffusion",), tuple(odd))
    first, objective = stated[0]
    for place, other in stated[1:]:
        if not _agree(objective, other):
            odd.append(f"{first} says {objective}, {place} says {other}")
    if objective in TENSORS and "v_pred" not in tensors:
        odd.append(
            f"{first} says {objective}, but the v_pred tensor is absent: "
            "ComfyUI and Forge will sample it as eps"
        )
    reasons = tuple(f"{place}: {word}" for place, word in stated)
    return Evidence(objective, reasons, tuple(odd))


def marker_specs(objective: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The empty tensors that tell loaders the objective, as ComfyUI writes them."""
    _refuse_unknown(objective)
    return dict.fromkeys(TENSORS.get(objective, ()), ("F32", (0,)))


def strip(names: Iterable[str]) -> list[str]:
    """Tensor names without those of markers, in their order."""
    return [name for name in names if name not in MARKERS]


def stamp(
    metadata: Mapping[str, str], objective: str, *, family: str | None = None
) -> dict[str, str]:
    """Metadata that states an objective, with every stale statement and content hash taken out.

    family: "sdxl" or "sd15" to name the architecture; None keeps what is said already.
    """
    _refuse_unknown(objective)
    made = {key: value for key, value in metadata.items() if key not in STALE}
    made |= {"modelspec.sai_model_spec": "1.0.1", OWN: objective}
    if family is not None:
        made["modelspec.architecture"] = ARCHITECTURES[family]
    made.setdefault("modelspec.implementation", "https://github.com/Stability-AI/generative-models")
    if objective in WORDS:
        made |= dict.fromkeys(FIELDS, WORDS[objective])
    return made


def _statements(tensors: list[str], metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    """(where, objective), the most specific first."""
    said = {"scheduler_config.json": metadata.get(SCHEDULER), OWN: metadata.get(OWN)}
    found = [(place, word) for place, word in said.items() if word in OBJECTIVES]
    if "v_pred" in tensors:
        both = "ztsnr" in tensors
        found.append(("tensors v_pred, ztsnr", "v-zsnr") if both else ("tensor v_pred", "v"))
    found += [(f, MEANINGS[metadata[f]]) for f in FIELDS if metadata.get(f) in MEANINGS]
    return found


def _unknown(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    odd = [(f, metadata[f]) for f in FIELDS if f in metadata and metadata[f] not in MEANINGS]
    for field, place in ((OWN, OWN), (SCHEDULER, "scheduler_config.json")):
        if field in metadata and metadata[field] not in OBJECTIVES:
            odd.append((place, metadata[field]))
    return odd


def _agree(objective: str, other: str) -> bool:
    """Metadata has one word for both kinds of v."""
    return objective == other or (objective == "v-zsnr" and other == "v")


def _refuse_unknown(objective: str) -> None:
    if objective not in OBJECTIVES:
        raise Refused(f"no objective is called {objective!r}: choose {', '.join(OBJECTIVES)}.")
