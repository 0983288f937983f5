"""What a file is, said without reading its tensors: the facts behind `recast inspect`.

Only the header is read, so 6.9 GB are described in a fraction of a second.  Nothing is
refused here but a file that is no sound safetensors file at all; what detection would refuse is
reported as a problem.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from recast.adapter_facts import adapter_facts
from recast.checkpoint import Checkpoint, Spec
from recast.errors import Refused
from recast.layout import SD15, SDXL, Layout, detect, open_checkpoint
from recast.layout.names import TEXTS, UNET, VAE, is_adapter, named, split_parts
from recast.layout.peft import adapter_files, is_peft_folder
from recast.markers import MARKERS, Evidence, read_objective

Facts = dict[str, Any]
FULL_SIZE = {"sdxl": SDXL, "sd15": SD15}
TITLES = {"sdxl": "Stable Diffusion XL", "sd15": "Stable Diffusion 1.5"}
PREFIXES = {
    "unet": (UNET,),
    "vae": (VAE,),
    "te1": tuple(texts["te1"] for texts in TEXTS.values()),
    "te2": tuple(texts["te2"] for texts in TEXTS.values() if "te2" in texts),
}


def describe(path: Path | str, *, hashed: bool = False) -> Facts:
    """Return what is known about a file, ready for JSON.

    kind: checkpoint, adapter, patch, vae, assessor or unknown. hashed: also read the whole file
    for its sha256. Raises Refused for a file that cannot be read.
    """
    with ExitStack() as stack:
        files, kind = _files(Path(path), stack)
        specs = [spec for file, _ in files for spec in file.specs.values()]
        first = files[0][0]
        facts: Facts = {
            "path": str(path),
            "format": "diffusers folder" if Path(path).is_dir() else None,
            "kind": kind,
            "bytes": sum(file.nbytes for file, _ in files),
            "tensors": len(specs),
            "parameters": sum(spec.numel for spec in specs),
            "dtypes": _dtypes(specs),
        }
        if kind == "assessor":
            facts |= _assessor(first)
        else:
            facts |= adapter_facts(files) if kind in ("adapter", "patch") else _checkpoint(first)
            facts["provenance"] = _provenance(first.metadata)
        if hashed and len(files) == 1:
            facts["sha256"] = first.sha256()
        return facts


def _files(path: Path, stack: ExitStack) -> tuple[list[tuple[Checkpoint, str]], str]:
    """The files to describe, with the part each is for, and their kind."""
    if is_peft_folder(path):
        files = adapter_files(path)
        return [(stack.enter_context(Checkpoint(file)), part) for file, part in files], "adapter"
    file = stack.enter_context(open_checkpoint(path))
    return [(file, "")], _kind(file)


def _kind(file: Checkpoint) -> str:
    """What sort of file it is, by the names of its tensors."""
    keys = list(file.specs)
    if file.metadata.get("recast.role") == "assessor":
        return "assessor"
    if keys and sum(map(is_adapter, keys)) > len(keys) // 2:
        role = file.metadata.get("recast.role")
        full = all(key.endswith((".diff", ".diff_b", ".w_norm", ".b_norm")) for key in keys)
        return "patch" if full and role in (None, "full") else "adapter"
    if any(key.startswith(UNET) for key in keys):
        return "checkpoint"
    inside = [key.removeprefix(VAE) for key in keys]
    return "vae" if any(key.startswith("decoder.conv_in") for key in inside) else "unknown"


def _checkpoint(file: Checkpoint) -> Facts:
    layout, problems = _layout(file)
    evidence = read_objective(file.specs, file.metadata)
    family = layout.family if layout else None
    return {
        "family": family,
        "architecture": TITLES[family] if family else None,
        "full_size": bool(layout and layout.plan == FULL_SIZE[layout.family]),
        "sizes": _sizes(layout),
        "components": _components(file),
        "missing": list(layout.missing) if layout else [],
        "extras": list(layout.extras) if layout else [],
        "objective": {
            "name": evidence.objective,
            "evidence": list(evidence.reasons),
            "contradictions": list(evidence.contradictions),
        },
        "markers": [key for key in file.specs if key in MARKERS],
        "loaders": _believed(file, layout, evidence),
        "problems": problems,
    }


def _assessor(file: Checkpoint) -> Facts:
    """What an assessor reads, and what it was found to tell."""
    try:
        reads, found = (
            dict(json.loads(file.metadata[f"recast.{key}"])) for key in ("fingerprint", "facts")
        )
        told = {
            "teacher": found.get("teacher"),
            "accuracy": [round(float(each), 3) for each in found.get("accuracy", ())],
            "active": found.get("active"),
        }
    except (KeyError, ValueError, TypeError) as error:
        return {"problems": [f"{file.path}: its header is damaged ({error}): make it again."]}
    return {"reads": reads, "found": told, "problems": []}


def _layout(file: Checkpoint) -> tuple[Layout | None, list[str]]:
    try:
        layout = detect(file)
    except Refused as refusal:
        return None, [str(refusal)]
    problems = []
    if file.metadata.get("recast.role") == "residual":
        parts = named(split_parts(file.metadata)) or "split parts"
        problems.append(
            "a residual, which is no model: the adapter of the split holds the principal weights "
            f"of its {parts} and must be applied to all of it"
        )
    if any(spec.dtype.startswith("F8") for spec in file.specs.values()):
        problems.append("some weights are fp8: they are widened when read")
    return layout, problems


def _sizes(layout: Layout | None) -> Facts:
    if layout is None:
        return {}
    unet, texts = layout.plan.unet, (layout.plan.te1, layout.plan.te2)
    sizes: Facts = {
        "unet_widths": list(unet.widths),
        "unet_transformer_blocks": [*unet.depths, unet.middle],
        "unet_context": unet.context,
        "text_widths": [text.width for text in texts if text],
        "text_layers": [text.layers for text in texts if text],
        "latent_scaling": layout.scaling,
    }
    if layout.shift:
        sizes["latent_shift"] = layout.shift
    if layout.plan.vae:
        sizes["vae_widths"] = list(layout.plan.vae.widths)
    return sizes


def _components(file: Checkpoint) -> Facts:
    """Tensors, parameters and number formats of each part that is there."""
    found: Facts = {}
    for part, prefixes in PREFIXES.items():
        specs = [spec for key, spec in file.specs.items() if key.startswith(prefixes)]
        if specs:
            found[part] = {
                "tensors": len(specs),
                "parameters": sum(spec.numel for spec in specs),
                "dtypes": _dtypes(specs),
            }
    return found


def _believed(file: Checkpoint, layout: Layout | None, evidence: Evidence) -> list[Facts]:
    """What each loader will take the file for, told nothing by its user."""
    family = layout.family if layout else None
    if family is None or layout is None:
        return []
    truth = evidence.objective
    if file.path.is_dir():
        note = "reads single files: recast export --to single-file writes one"
        return [
            {"loader": "ComfyUI", "objective": None, "note": note},
            {"loader": "diffusers", "objective": truth},
        ]
    known = layout.plan.unet == FULL_SIZE[family].unet
    believed = _from_tensors(file.specs) if family == "sdxl" else "eps"
    comfy: Facts = {"loader": "ComfyUI", "objective": believed if known else None}
    if not known:
        comfy["note"] = f"knows {TITLES[family]} only at its full size"
    elif believed != truth:
        comfy["note"] = _comfy_remedy(truth)
    diffusers: Facts = {"loader": "diffusers", "objective": "eps"}
    if truth != "eps":
        diffusers["note"] = _diffusers_remedy(truth)
    return [comfy, diffusers]


def _from_tensors(names: Iterable[str]) -> str | None:
    """ComfyUI's rule for SDXL: it looks at tensor names alone."""
    held = set(names)
    if held & {"edm_mean", "edm_vpred.sigma_max"}:
        return None
    if "v_pred" in held:
        return "v-zsnr" if "ztsnr" in held else "v"
    return "eps"


def _comfy_remedy(objective: str | None) -> str:
    if objective in ("v", "v-zsnr"):
        zsnr = " and zsnr on" if objective == "v-zsnr" else ""
        return f"add a ModelSamplingDiscrete node with v_prediction{zsnr}"
    if objective == "x0":
        return "add a ModelSamplingDiscrete node with x0"
    if objective == "flow":
        return "add a ModelSamplingSD3 node with shift 1"
    return "its objective has to be set by a node"


def _diffusers_remedy(objective: str | None) -> str:
    if objective == "flow":
        return "give the pipeline FlowMatchEulerDiscreteScheduler"
    words = {"v": "v_prediction", "v-zsnr": "v_prediction", "x0": "sample"}
    if objective not in words:
        return "its objective has to be set by the scheduler"
    setting = f'prediction_type="{words[objective]}"'
    if objective == "v-zsnr":
        setting += ', rescale_betas_zero_snr=True, timestep_spacing="trailing"'
    return f"give the pipeline a scheduler with {setting}"


def _provenance(metadata: Mapping[str, str]) -> Facts:
    """Metadata by its owner; JSON texts of Recast are opened."""
    groups: Facts = {"recast": {}, "modelspec": {}, "trainer": {}, "other": {}}
    for key in sorted(metadata):
        owner, _, name = key.partition(".")
        if key == "recast.fingerprint":
            found = _opened(metadata[key])
            tensors = found.get("tensors", {}) if isinstance(found, dict) else {}
            groups[owner][name] = f"of its base: the UNet, and {len(tensors)} tensors singly"
        elif owner in ("recast", "modelspec") and name:
            groups[owner][name] = _opened(metadata[key]) if owner == "recast" else metadata[key]
        elif key.startswith(("ss_", "sshs_")):
            groups["trainer"][key] = metadata[key]
        else:
            groups["other"][key] = metadata[key]
    return groups


def _opened(text: str) -> Any:
    if not text.startswith(("{", "[")):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dtypes(specs: Iterable[Spec]) -> dict[str, int]:
    """Number formats and how many tensors have each, the commonest first."""
    return dict(Counter(spec.dtype for spec in specs if spec.numel).most_common())
