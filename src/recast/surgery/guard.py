"""What may be cut: changes of a model, never its principal part."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from recast.checkpoint import Checkpoint
from recast.errors import Refused
from recast.layout.peft import CONFIG, METADATA, adapter_files

# init_lora_weights of PEFT that take the factors' product out of the base
PRINCIPAL = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_principal(path: Path, metadata: Mapping[str, str]) -> None:
    """Refuse an adapter that holds principal parts of a model's weights instead of a change.

    metadata: of the file. PEFT says it in the configuration beside the file, diffusers in the
    header.
    """
    role = metadata.get("recast.role", "delta")
    if role.startswith("pissa-"):
        start, end = ("", path) if role == "pissa-trained" else (path, "TRAINED")
        raise Refused(
            f"{path} is a {role} adapter, the principal part of a model's weights, and less of it "
            f"is less of the model; make the change first: recast extract MODEL --initial "
            f"{start or 'INITIAL'} --trained {end} --out delta.safetensors."
        )
    for init in _beginnings(Path(path), metadata):
        if init.startswith(PRINCIPAL):
            raise Refused(
                f"{path} was made by PEFT with init_lora_weights={init!r}, so it holds part of the "
                "model's own weights, and less of it is less of the model; save its change with "
                "PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…) first."
            )


def _beginnings(path: Path, metadata: Mapping[str, str]) -> list[str]:
    """The texts that PEFT's configurations of an adapter give as init_lora_weights."""
    configs = []
    if path.exists():
        beside = [file.parent / CONFIG for file, _ in adapter_files(path)]
        if path.is_dir() or path.name == "adapter_model.safetensors":
            configs += [_json(file.read_text(encoding="utf-8")) for file in beside if file.exists()]
    found = [config.get("init_lora_weights") for config in configs]
    inside = _json(metadata.get(METADATA, "{}"))
    found += [value for key, value in inside.items() if key.endswith(".init_lora_weights")]
    return [value.lower() for value in found if isinstance(value, str)]


def _json(text: str) -> dict[str, object]:
    """A configuration; an empty one for what its reader will refuse with a sentence of its own."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def refuse_other_base(path: Path, metadata: Mapping[str, str], base: Checkpoint) -> None:
    """Refuse a checkpoint other than the one that an adapter's header says it was made on."""
    stated = metadata.get("recast.base_sha256") or metadata.get("ss_new_sd_model_hash")
    if stated and stated != base.sha256():
        raise Refused(
            f"{path} was made on the checkpoint with sha256 {stated[:12]}, and {base.path} is "
            f"{base.sha256()[:12]}: give that one, or --any-base to measure against this."
        )
