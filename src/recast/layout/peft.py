"""PEFT's configurations: where they lie beside or in an adapter's files, and the alphas they give.

A PEFT folder holds `adapter_config.json` and `adapter_model.safetensors`, for several networks one
such folder each; diffusers puts the same configurations, by network, into a file's metadata.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recast.errors import Refused
from recast.layout.loras import NETWORKS, PEFT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
METADATA = "lora_adapter_metadata"  # of diffusers: the configurations, by network, as JSON
Configs = Mapping[str, Mapping[str, Any]]


def is_peft_folder(path: Path) -> bool:
    """Whether a folder is a PEFT adapter, or holds those of several networks."""
    names = (".", *NETWORKS.values())
    return path.is_dir() and any((path / name / CONFIG).exists() for name in names)


def adapter_files(path: Path) -> list[tuple[Path, str]]:
    """The files of an adapter and the part each is for ("" where only its keys can say)."""
    if not path.is_dir():
        return [(path, "")]
    if (path / CONFIG).exists():
        mine = next((part for part, name in NETWORKS.items() if name == path.name), "")
        return [(path / WEIGHTS, mine)]
    inside = [(path / name / WEIGHTS, part) for part, name in NETWORKS.items()]
    inside = [(file, part) for file, part in inside if file.exists()]
    if not inside:
        raise Refused(
            f"{path} holds no {CONFIG}, and no folder {', '.join(NETWORKS.values())} with one; "
            "give a PEFT folder or a .safetensors file."
        )
    return inside


def configs_of(path: Path, metadata: Mapping[str, str], form: str) -> Configs:
    """Configurations of a file by the head of the keys that they are for."""
    if form == "peft":
        beside = path.parent / CONFIG
        if not beside.exists():
            raise Refused(
                f"{path} is a PEFT file and its {CONFIG}, which holds the scales, is not "
                "beside it; copy the whole folder."
            )
        return {PEFT: _checked(beside, _json(beside, beside.read_text(encoding="utf-8")))}
    if METADATA not in metadata:
        return {}
    configs: dict[str, dict[str, Any]] = {}
    for key, value in _json(path, metadata[METADATA]).items():
        head, _, name = key.partition(".")
        configs.setdefault(f"{head}.", {})[name] = value
    return {head: _checked(path, config) for head, config in configs.items()}


def alpha_of(configs: Configs, name: str, rank: int) -> float | None:
    """The alpha that a configuration gives a module, None where there is none.

    With rsLoRA it is that of an ordinary LoRA of the same scale: alpha sqrt(r).
    """
    head = next((head for head in configs if name.startswith(head)), None)
    if head is None:
        return None
    config, path = configs[head], name.removeprefix(head).removeprefix("text_model.")
    alpha = float(_patterned(config.get("alpha_pattern") or {}, path, config["lora_alpha"]))
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


def _patterned(patterns: Mapping[str, float], path: str, otherwise: float) -> float:
    """As PEFT finds it: the first pattern that matches the end of the path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern.removeprefix('text_model.')})$", path):
            return value
    return otherwise


def _json(path: Path, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise Refused(
            f"{path}: its configuration is no JSON ({error}); export it again."
        ) from error
    if not isinstance(found, dict):
        raise Refused(f"{path}: its configuration is no JSON object; export it again.")
    return found


def _checked(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("peft_type", "LORA")
    odd = [name for name in ("use_dora", "fan_in_fan_out", "lora_bias") if config.get(name)]
    if kind != "LORA" or odd:
        raise Refused(
            f"{path} is configured as {', '.join([str(kind), *odd])}, which is no plain change of "
            "weights; export it as LoRA first."
        )
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        raise Refused(f"{path} lacks r or lora_alpha in its configuration; export it again.")
    return config
