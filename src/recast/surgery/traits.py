"""Traits: which modules of an adapter belong to what, by patterns on the names of its tensors.

    {"style": {"whitelist": ["output_blocks_1_1_"], "blacklist": ["ff_net"]}}

A pattern without `*?[` is a piece of the name, as in blora_for_kohya's traits files; any other is a
glob for the whole module name. A tensor belongs to a trait if a pattern of the whitelist fits it
and none of the blacklist does, and a module comes whole or not at all: alpha always follows. The
blacklists of blora_for_kohya's own traits hold "alpha", which deletes the scale and makes the rest
r / alpha times as strong; here that word excludes nothing.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from recast.errors import Refused

STARS = ("*", "?", "[")


@dataclass(frozen=True)
class Trait:
    """Patterns of which one must fit, and of which none may."""

    whitelist: tuple[str, ...]
    blacklist: tuple[str, ...] = ()

    def holds(self, module: str, suffixes: Collection[str]) -> bool:
        """Whether a module belongs to it, by its name and its tensors' endings.

        Raises Refused where only some of its weights do.
        """
        names = [f"{module}.{suffix}" for suffix in suffixes if suffix != "alpha"]
        found = [name for name in names if self._fits(module, name)]
        if found and len(found) < len(names):
            raise Refused(
                f"the patterns take {found[0]} and leave the rest of {module}, and one without "
                "the other means nothing: name modules, not their tensors."
            )
        return bool(found)

    def _fits(self, module: str, name: str) -> bool:
        wanted = any(_matches(pattern, module, name) for pattern in self.whitelist)
        return wanted and not any(_matches(pattern, module, name) for pattern in self.blacklist)


def _matches(pattern: str, module: str, name: str) -> bool:
    if any(star in pattern for star in STARS):
        return fnmatchcase(module, pattern)
    return pattern in name


# the names that B-LoRA's authors and the guides give to blocks of SDXL, and a file's components
TRAITS: dict[str, Trait] = {
    "content": Trait(("lora_unet_output_blocks_0_1_",), ("ff_net", "proj_in", "proj_out")),
    "style": Trait(("lora_unet_output_blocks_1_1_",), ("ff_net", "proj_in", "proj_out")),
    "layout": Trait(("lora_unet_input_blocks_8_1_",), ("ff_net", "proj_in", "proj_out")),
    "unet": Trait(("lora_unet_*",)),
    "te": Trait(("lora_te*",)),
    "te1": Trait(("lora_te1_*", "lora_te_*")),
    "te2": Trait(("lora_te2_*",)),
}
COMPONENTS = ("unet", "te1", "te2")


def read_traits(path: Path) -> dict[str, Trait]:
    """A traits file's traits by name. Raises Refused for what is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise Refused(f"{path} does not exist: check the path.") from error
    except (OSError, ValueError) as error:
        raise Refused(f"{path} is no JSON file of traits ({error}).") from error
    if not isinstance(found, dict) or not found:
        raise Refused(f"{path} holds no traits: give {{name: {{whitelist: [...]}}}}.")
    return {name: _trait(path, name, entry) for name, entry in found.items()}


def _trait(path: Path, name: str, entry: object) -> Trait:
    lists = entry if isinstance(entry, dict) else {}
    odd = sorted(lists.keys() - {"whitelist", "blacklist"})
    white, black = lists.get("whitelist"), lists.get("blacklist", [])
    if odd or not _texts(white) or not _texts(black) or not white:
        what = f"has {odd[0]!r}" if odd else "lacks a whitelist of texts"
        raise Refused(f"{path}: trait {name!r} {what}: give whitelist and blacklist as lists.")
    return Trait(tuple(white), tuple(black))


def _texts(found: object) -> bool:
    return isinstance(found, list) and all(isinstance(one, str) and one for one in found)


def named(names: Sequence[str], file: Path | None) -> list[Trait]:
    """Traits by name: of a traits file, else of TRAITS. Raises Refused with the nearest name."""
    known = {**TRAITS, **(read_traits(file) if file else {})}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0)[0]
            raise Refused(f"no trait is called {name!r}: did you mean {near}?")
    return [known[name] for name in names]


def chosen(modules: Mapping[str, Iterable[str]], traits: Sequence[Trait]) -> list[str]:
    """The modules that belong to any of the traits; modules: names and their tensors' endings."""
    return [
        module
        for module, suffixes in modules.items()
        if any(trait.holds(module, set(suffixes)) for trait in traits)
    ]
