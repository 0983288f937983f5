"""kohya's dataset file: TOML with `[general]`, `[[datasets]]` and `[[datasets.subsets]]`.

A subset's setting is looked for in its own table, its dataset's, the general one, and then in the
recipe's section `images`.  Own additions: loss_weight, on_missing_caption, caption_variants and
image_variants.  What cannot be honoured is refused by name, unless it is set to do nothing.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from recast.data.subset import PLAIN, Sizes, Subset
from recast.errors import Refused

SIZES = tuple(field.name for field in fields(Sizes))
PLACES = ("image_dir", "metadata_file", "conditioning_data_dir")  # of one subset only
ABOUT_ONE = (*PLACES, "class_tokens", "is_reg")
SETTINGS = tuple(f.name for f in fields(Subset) if f.name != "sizes")
BOOLS = {
    "is_reg", "shuffle_caption", "enable_wildcard", "flip_aug", "color_aug", "random_crop",
    "alpha_mask", "enable_bucket", "bucket_no_upscale",
}  # fmt: skip
SHARES = {"caption_dropout_rate", "caption_tag_dropout_rate"}
COUNTS = {
    "num_repeats", "keep_tokens", "caption_dropout_every_n_epochs", "caption_variants",
    "image_variants", "batch_size", "min_bucket_reso", "max_bucket_reso", "bucket_reso_steps",
}  # fmt: skip
AT_LEAST_ONE = {"caption_variants", "image_variants", "batch_size", "bucket_reso_steps"}
POLICIES = ("empty", "refuse", "skip")
NOTHING = (None, 0, 1, 1.0, False, "")
REFUSED = {
    "face_crop_aug_range": "faces are not looked for: crop the pictures beforehand",
    "token_warmup_min": "cached captions are not lengthened as training goes on",
    "token_warmup_step": "cached captions are not lengthened as training goes on",
    "network_multiplier": "the adapter's strength is the same for all pictures; use loss_weight",
    "validation_split": "set watch.validate_every in the recipe",
    "custom_attributes": "nothing here reads them",
}
IDLE = {
    "cache_info": "latents are cached by content, which needs no list of files",
    "validation_seed": "the recipe's seed holds pictures out",
    "resize_interpolation": "pictures are scaled by Lanczos",
    "skip_image_resolution": "small pictures are scaled, or left out by hand",
}


@dataclass(frozen=True)
class Datasets:
    """The folders of a dataset file, its batch size, and what of it has no effect."""

    path: Path
    subsets: tuple[Subset, ...]
    batch: int | None = None
    remarks: tuple[str, ...] = ()


def read(path: Path, below: Subset = PLAIN, prior: float = 1.0) -> Datasets:
    """Read a dataset file over the recipe's settings; refuses by place what cannot be meant.

    prior: what the samples of regularisation folders count in the loss.
    """
    table = parsed(path)
    known(path, "", table, ("general", "datasets"))
    general: Any = table.get("general", {})
    datasets: Any = table.get("datasets")
    if not isinstance(general, Mapping) or not all_tables(datasets):
        raise Refused(f"{path}: write [general] once and [[datasets]] with [[datasets.subsets]].")
    seen = Seen(path)
    base = seen.settings("general", general, SETTINGS)
    found: list[Subset] = []
    batches: set[int] = set()
    for d, dataset in enumerate(datasets):
        place = f"datasets[{d}]"
        if not all_tables(dataset.get("subsets")):
            raise Refused(f"{path}: {place} has no [[datasets.subsets]], which name the folders.")
        over = base | seen.settings(place, {k: v for k, v in dataset.items() if k != "subsets"})
        batches |= {over["batch_size"]} if "batch_size" in over else set()
        for s, subset in enumerate(dataset["subsets"]):
            own = over | seen.settings(f"{place}.subsets[{s}]", subset, SETTINGS, inner=True)
            found.append(made(path, f"{place}.subsets[{s}]", own, below, prior))
    if len(batches) > 1:
        raise Refused(
            f"{path}: batch_size is {' and '.join(map(str, sorted(batches)))}: one run has one."
        )
    return Datasets(path, tuple(found), next(iter(batches), None), tuple(seen.remarks))


class Seen:
    """The reading of one file: checks keys and values, and gathers remarks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remarks: list[str] = []

    def settings(
        self,
        place: str,
        table: Mapping[str, Any],
        names: tuple[str, ...] = SETTINGS,
        *,
        inner: bool = False,
    ) -> dict[str, Any]:
        """The checked settings of one table."""
        allowed = {*names, "batch_size"} | (set() if inner else set(SIZES))
        if not inner:
            allowed -= set(ABOUT_ONE)
        found: dict[str, Any] = {}
        for name, value in table.items():
            key = f"{place}.{name}"
            if name in REFUSED:
                if value not in NOTHING:
                    raise Refused(f"{self.path}: {key} cannot be honoured: {REFUSED[name]}.")
            elif name in IDLE:
                self.remarks.append(f"{self.path}: {key} has no effect: {IDLE[name]}.")
            elif name in (*SIZES, "batch_size") and inner:
                raise Refused(
                    f"{self.path}: {key} belongs to a dataset, not to one of its folders."
                )
            elif name in ABOUT_ONE and not inner:
                raise Refused(f"{self.path}: {key} belongs to one folder: write it in a subset.")
            else:
                known(self.path, place, {name: value}, sorted(allowed))
                found[name] = checked(self.path, key, name, value)
        return found


def made(path: Path, place: str, own: dict[str, Any], below: Subset, prior: float) -> Subset:
    """A subset of its settings and those below them."""
    own.pop("batch_size", None)
    sizes = {name: own.pop(name) for name in SIZES if name in own}
    for name in PLACES:
        if name in own:
            own[name] = standing(path, own[name])
    if "image_dir" not in own:
        if "metadata_file" not in own:
            raise Refused(f"{path}: {place} names no image_dir.")
        own["image_dir"] = own["metadata_file"].parent
    found = replace(below, **own, sizes=replace(below.sizes, **sizes))
    return replace(found, loss_weight=found.loss_weight * (prior if found.is_reg else 1.0))


def standing(path: Path, name: str) -> Path:
    """A path of the file: absolute, below the file's folder, or else below the current one."""
    beside = path.parent / name
    return beside if beside.exists() else Path(name)


def checked(path: Path, key: str, name: str, value: Any) -> Any:
    """A value of the right kind, or a refusal that says which."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if name in BOOLS:
        right, wanted = isinstance(value, bool), "true or false"
    elif name in COUNTS:
        least = int(name in AT_LEAST_ONE)
        right = number and isinstance(value, int) and least <= value < 10**9
        wanted = f"a whole number of {least} or more"
    elif name in SHARES:
        right, wanted = number and 0 <= value <= 1, "a number from 0 to 1"
    elif name == "loss_weight":
        right, wanted = number and value >= 0, "a number of 0 or more"
    elif name == "resolution":
        pair = value if isinstance(value, list) else [value, value]
        right = len(pair) == 2 and all(type(v) is int and 0 < v <= 16384 for v in pair)
        wanted, value = "a side in pixels, or [width, height]", tuple(pair) if right else value
    elif name == "on_missing_caption":
        right, wanted = value in POLICIES, f"one of {', '.join(POLICIES)}"
    else:
        right = isinstance(value, str) and "\0" not in value and (value > "" or name not in PLACES)
        wanted = "text"
        if name == "caption_extension" and right:
            value = value if not value or value.startswith(".") else f".{value}"
            value = value.lower()
        if name == "caption_separator":
            right, wanted = bool(value), "at least one character"
    if not right:
        raise Refused(f"{path}: {key} is {value!r:.60}; give {wanted}.")
    return float(value) if name in SHARES or name == "loss_weight" else value


def parsed(path: Path) -> dict[str, Any]:
    """The file's tables."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise Refused(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8.") from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise Refused(
            f"{path}: is not valid TOML ({error}); write Windows paths in 'single quotes'."
        ) from error


def all_tables(value: Any) -> bool:
    """True for a list of at least one table."""
    return isinstance(value, list) and bool(value) and all(isinstance(v, Mapping) for v in value)


def known(path: Path, place: str, table: Mapping[str, Any], names: Any) -> None:
    """Refuse a key that does not exist, with the nearest one."""
    for name in table:
        if name not in names:
            near = get_close_matches(name, names, 1, 0.0)[0]
            where = f"{place}.{name}" if place else name
            raise Refused(f"{path}: there is no key {where!r:.100}; the nearest is {near!r}.")
