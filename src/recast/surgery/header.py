"""What an adapter's header and configuration say after modules were dropped: only what is true."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from recast.layout.loras import NETWORKS
from recast.layout.peft import METADATA

HASHES = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
DONE = "recast.chop"


@dataclass(frozen=True)
class Size:
    """Rank and alpha of one module's factors; conv: its kernel is larger than 1 x 1."""

    rank: int
    alpha: float
    conv: bool


def stated(metadata: Mapping[str, str], sizes: Collection[Size]) -> dict[str, str]:
    """The fields of a file with other modules in it; content hashes are left to who writes.

    A rank or alpha that is no longer the only one becomes "Dynamic", kohya's word for several; a
    field that the file did not have is not added.
    """
    found = {key: value for key, value in metadata.items() if key not in HASHES}
    plain = [size for size in sizes if not size.conv] or list(sizes)
    convs = [size for size in sizes if size.conv]
    for key, values in (
        ("ss_network_dim", {str(size.rank) for size in plain}),
        ("ss_network_alpha", {_text(size.alpha) for size in plain}),
    ):
        if key in found and values:
            found[key] = _one(values, found[key])
    args = _arguments(found.get("ss_network_args", ""))
    for key, values in (
        ("conv_dim", {str(size.rank) for size in convs}),
        ("conv_alpha", {_text(size.alpha) for size in convs}),
    ):
        if key in args:
            args[key] = _one(values, str(args[key])) if values else None
    if any(value is None for value in args.values()) or args != _arguments(
        found.get("ss_network_args", "")
    ):
        kept = {key: value for key, value in args.items() if value is not None}
        found["ss_network_args"] = json.dumps(kept)
    return found


def noted(metadata: dict[str, str], weights: str, sha256: str) -> dict[str, str]:
    """The same with one more entry of what was cut, and of which file."""
    try:
        before = json.loads(metadata.get(DONE, "[]"))
    except ValueError:
        before = []
    done = [*(before if isinstance(before, list) else []), {"weights": weights, "of": sha256}]
    return {**metadata, DONE: json.dumps(done)}


def configured(metadata: Mapping[str, str], paths: Mapping[str, Collection[str]]) -> dict[str, str]:
    """diffusers' configurations in a header, for the modules that are left by network.

    paths: of the modules of a part in its network.
    """
    found = dict(metadata)
    if METADATA in found:
        try:
            configs = json.loads(found[METADATA])
        except ValueError:
            return found
        for part, network in NETWORKS.items():
            head = f"{network}."
            mine = {k[len(head) :]: v for k, v in configs.items() if k.startswith(head)}
            configs = {k: v for k, v in configs.items() if not k.startswith(head)}
            if mine and paths.get(part):
                left = targeted(mine, paths[part])
                configs |= {f"{head}{key}": value for key, value in left.items()}
        found[METADATA] = json.dumps(configs, sort_keys=True)
    return found


def targeted(config: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """A PEFT configuration for only these modules: targets in full, patterns of them alone."""
    short = {path.removeprefix("text_model.") for path in paths}
    found = {**config, "target_modules": sorted(short)}
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(name) or {}
        if name in config:
            found[name] = {k: v for k, v in patterns.items() if _meets(k, short)}
    return found


def _meets(pattern: str, paths: Collection[str]) -> bool:
    """Whether a pattern may matter: a plain path that is gone does not."""
    plain = pattern.removeprefix("text_model.")
    if all(letter.isalnum() or letter in "._" for letter in plain):
        return any(path == plain or path.endswith(f".{plain}") for path in paths)
    return True


def _one(values: Collection[str], before: str) -> str:
    """The only value, as it was written before where that is the same number."""
    if len(values) != 1:
        return "Dynamic"
    value = next(iter(values))
    try:
        return before if float(before) == float(value) else value
    except ValueError:
        return value


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text) if text else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(alpha: float) -> str:
    return f"{alpha:.10g}"
