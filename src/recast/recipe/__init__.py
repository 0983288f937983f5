"""Recipes: what a run does, as a short strict TOML file.

`recipes/default.toml` holds every key; any other recipe names only what differs from it, so no
default lives in code. An unknown key is refused with the nearest one, a wrong value with what is
permitted. Imports no torch.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from recast.errors import Refused
from recast.recipe.sections import IMPOSSIBLE, SECTIONS, Recipe

__all__ = [
    "SECTIONS",
    "Recipe",
    "differences",
    "dump_short",
    "dump_toml",
    "load",
    "override",
    "presets",
]

MAX_BYTES = 64 * 1024
SHOWN = 3  # problems named in one refusal


def presets() -> tuple[str, ...]:
    """Names of the recipes that come along."""
    folder = files("recast") / "recipes"
    return tuple(
        sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    )


def load(name_or_path: str | Path = "default") -> Recipe:
    """Read a recipe by the name of a preset or by path; what it leaves out is as in `default`.

    Raises Refused for a name that does not exist, broken TOML, unknown keys and wrong values.
    """
    name = str(name_or_path)
    own = _parse(name, _read(name))
    return _checked(name, _overlaid(name, _parse("default", _preset("default")), own))


def override(recipe: Recipe, **flags: Any) -> Recipe:
    """Change single keys: `override(recipe, steps=50, evaluate={"steps": 20})`.

    A bare key belongs to the first section that has it, in the order of SECTIONS;
    a section's name takes a mapping. None changes nothing. Raises Refused as `load` does.
    """
    given: dict[str, Any] = {}
    for key, value in flags.items():
        if key in Recipe.model_fields and isinstance(value, Mapping):
            chosen = {k: v for k, v in value.items() if v is not None}
            given[key] = {**given.get(key, {}), **chosen}
        elif value is not None:
            home = next((s for s, keys in SECTIONS.items() if key in keys), None)
            given |= {home: {**given.get(home, {}), key: value}} if home else {key: value}
    return _checked("flags", _overlaid("flags", recipe.model_dump(), given))


def differences(one: Recipe, other: Recipe) -> tuple[str, ...]:
    """Dotted keys in which two recipes differ, `about` aside."""
    a, b = (
        dict(_flat(one.model_dump(exclude={"about"}))),
        dict(_flat(other.model_dump(exclude={"about"}))),
    )
    return tuple(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)))


def dump_toml(recipe: Recipe) -> str:
    """Write every key as TOML that `load` reads back to an equal recipe."""
    lines = [f"about = {_toml(recipe.about)}"]
    for section, values in recipe.model_dump(exclude={"about"}).items():
        lines += _table(section, values)
    return "\n".join(lines) + "\n"


def dump_short(recipe: Recipe) -> str:
    """Write what differs from `default`, as TOML that `load` reads back to an equal recipe."""
    usual = load().model_dump()
    lines = [f"about = {_toml(recipe.about)}"]
    for section, values in recipe.model_dump(exclude={"about"}).items():
        kept = {key: value for key, value in values.items() if value != usual[section][key]}
        if section == "train" and "optimizer" in kept:
            kept |= {key: values[key] for key in ("lr", "optimizer_args")}
        lines += _table(section, kept) if kept else []
    return "\n".join(lines) + "\n"


def _read(name: str) -> str:
    if not name.endswith(".toml") and "/" not in name and "\\" not in name:
        return _preset(name)
    path = Path(name)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Refused(f"recipe {name}: {path.stat().st_size} bytes is too large for a recipe")
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise Refused(f"recipe {name!r} cannot be read: {reason}") from error


def _preset(name: str) -> str:
    known = presets()
    if name not in known:
        near = get_close_matches(name, known, 1, 0.0)[0]
        raise Refused(
            f"there is no recipe {name!r}; the nearest is {near!r} "
            f"(of {', '.join(known)}, or the path of a .toml file)"
        )
    return (files("recast") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def _parse(name: str, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Refused(f"recipe {name} is not valid TOML: {error}") from error


def _overlaid(name: str, base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `own` over `base`, key by key; another optimizer brings its own lr and arguments."""
    merged = dict(base)
    for key, value in own.items():
        below = base.get(key)
        merged[key] = (
            {**below, **value} if isinstance(below, dict) and isinstance(value, Mapping) else value
        )
    train, given = merged["train"], own.get("train")
    if (
        isinstance(given, Mapping)
        and given.get("optimizer", base["train"]["optimizer"]) != base["train"]["optimizer"]
    ):
        if "lr" not in given:
            raise Refused(
                f"recipe {name}: train.optimizer is {given['optimizer']!r}, so give train.lr too, "
                f"since {base['train']['optimizer']}'s would not suit it"
            )
        train["optimizer_args"] = given.get("optimizer_args", {})
    return merged


def _checked(name: str, values: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(detail) for detail in _kept(error)))
        more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise Refused(f"recipe {name}: {'; '.join(problems[:SHOWN])}{more}") from error


def _kept(error: ValidationError) -> list[Any]:
    """The details worth telling: of a union's branches only the first."""
    details: dict[tuple[int | str, ...], Any] = {}
    for detail in error.errors(include_url=False):
        details.setdefault(_path(detail["loc"]), detail)
    return list(details.values())


def _path(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """`location` up to the key itself; pydantic appends the branch of a union after it."""
    return location[: 3 if location[:2] == ("train", "optimizer_args") else 2]


def _problem(detail: Any) -> str:
    path = ".".join(str(part) for part in _path(detail["loc"]))
    if detail["type"] == "extra_forbidden":
        *section, key = (str(part) for part in detail["loc"])
        known = SECTIONS[section[0]] if section else Recipe.model_fields
        near = get_close_matches(key, known, 1, 0.0)[0]
        return f"there is no key {path!r:.120}; the nearest is {'.'.join([*section, near])!r}"
    if path == "target.objective" and detail["input"] in IMPOSSIBLE:
        return f"{path} is {detail['input']!r}, and {IMPOSSIBLE[detail['input']]}"
    if detail["type"] == "literal_error":
        return f"{path} is {detail['input']!r:.60}; permitted are {detail['ctx']['expected']}"
    if path == "train.optimizer_args" or path.startswith("train.optimizer_args."):
        return (
            f"{path} is {detail['input']!r:.60}; permitted are "
            "numbers, true or false, text, lists of numbers"
        )
    message = detail["msg"]
    for prefix in ("Input ", "String ", "Value error, "):
        message = message.removeprefix(prefix)
    if path == "train.steps":
        message += ', or be "auto"'
    return f"{path} is {detail['input']!r:.60}; it {message}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    plain = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    lines = ["", f"[{name}]", *(f"{_key(key)} = {_toml(value)}" for key, value in plain.items())]
    for key in (key for key in values if key not in plain):  # not a set: the bytes are hashed
        lines += _table(f"{name}.{_key(key)}", values[key])
    return lines


def _key(key: str) -> str:
    return (
        key if key.replace("_", "a").replace("-", "a").isalnum() and key.isascii() else _toml(key)
    )


def _toml(value: Any) -> str:
    """A scalar or list; TOML writes them as JSON does, but for the DEL character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
