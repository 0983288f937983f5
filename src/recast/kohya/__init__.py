"""Commands written for kohya's sd-scripts, as recipes: what each flag becomes, or why nothing.

    words -> flags and their values -> (row by row of the table) -> a recipe, a model, a folder

Where a flag is not given, sd-scripts' own default holds, not Recast's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recast.errors import Refused
from recast.kohya.flag import Given, Idle, Outcome, Settings, turned
from recast.kohya.flags import FLAGS, LAUNCH
from recast.kohya.parse import Command, read
from recast.kohya.shell import read_command
from recast.kohya.turns import optimizer, rates, schedule, steps
from recast.recipe import Recipe, load, override

__all__ = [
    "Told",
    "Translation",
    "begun",
    "local",
    "localised",
    "read_command",
    "scaled",
    "translate",
]

TOLD = ("MODEL", "IMAGES", "OUT")  # what the run is told beside the recipe
NEEDED = {"network_module": "what is trained", "pretrained_model_name_or_path": "the model"}
PATHS = (
    ("data", "vae"), ("network", "weights"), ("watch", "prompts"), ("images", "masks"),
)  # fmt: skip
DEFAULTS: Settings = {  # where sd-scripts' differ from recipes/default.toml
    "target.objective": "same",
    "target.teacher": "data",
    "target.guided": 1.0,
    "train.batch": 1,
    "train.clip": 1.0,
    "train.times": "uniform",
    "train.huber_schedule": "snr",
    "train.precision": "fp32",
    "train.warm": "none",
    "network.save": "fp32",
    "data.caption_dropout": 0.0,
    "images.enable_bucket": False,
    "images.min_bucket_reso": 256,
    "images.max_bucket_reso": 1024,
    "watch.validate_every": 0,
    "watch.alarm": False,
}


@dataclass(frozen=True)
class Told:
    """What became of a flag: settings, or why there are none."""

    flag: str
    value: Any
    settings: Settings
    why: str = ""


@dataclass(frozen=True)
class Translation:
    """A training command as Recast's; None where the command names no path."""

    recipe: Recipe
    told: tuple[Told, ...]
    model: str | None = None
    images: str | None = None
    out: str | None = None


def translate(words: Sequence[str]) -> Translation:
    """Translate the words of a training command.

    Raises Refused for what cannot be read or honoured, naming the flag.
    """
    command = read(words)
    for flag, meaning in NEEDED.items():
        if flag not in command.given:
            raise Refused(f"--{flag} is missing: it says {meaning}.")
    told = tuple(each(command))
    recipe = load()
    for settings in defaults(command.given):
        recipe = laid(recipe, settings, "sd-scripts' defaults")
    for one in told:
        recipe = laid(recipe, one.settings, f"--{one.flag}")
    run = {key: value for one in told for key, value in one.settings.items() if "." not in key}
    about = run.get("about", "From a command of sd-scripts.")
    return Translation(override(recipe, about=about), told, *(run.get(key) for key in TOLD))


def defaults(given: Given) -> Iterator[Settings]:
    """What sd-scripts does where no flag says otherwise."""
    yield DEFAULTS
    for settings in (optimizer("", given), rates("", given), schedule("", given), steps("", given)):
        if not isinstance(settings, Idle):
            yield settings


def each(command: Command) -> Iterator[Told]:
    """What became of every flag, in the command's order; first those of accelerate."""
    given = {**command.given, **({"script": command.script} if command.script else {})}
    for table, said in ((LAUNCH, command.launch), (FLAGS, command.given)):
        for name, value in said.items():
            yield one(name, value, turned(table[name], value, given, f"--{name}"))


def one(name: str, value: Any, outcome: Outcome) -> Told:
    if isinstance(outcome, Idle):
        return Told(name, value, {}, str(outcome))
    return Told(name, value, outcome)


def laid(recipe: Recipe, settings: Settings, name: str) -> Recipe:
    """A recipe with settings laid over it; a refusal names where they come from."""
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, field = key.partition(".")
        if field:
            nested.setdefault(section, {})[field] = value
    try:
        return override(recipe, **nested) if nested else recipe
    except Refused as error:
        said = str(error).removeprefix("recipe flags: ")
        raise Refused(f"{name} cannot be honoured: {said}") from error


def scaled(recipe: Recipe, size: int) -> Recipe:
    """The recipe at another size in pixels, the limits of its buckets in proportion.

    Steps of buckets stay multiples of 8, which the VAE asks for.
    """
    factor = size / (recipe.data.size or size)
    images = recipe.images
    shrunk = {
        "min_bucket_reso": max(8, round(images.min_bucket_reso * factor)),
        "max_bucket_reso": max(8, round(images.max_bucket_reso * factor)),
        "bucket_reso_steps": max(8, round(images.bucket_reso_steps * factor / 8) * 8),
    }
    return override(recipe, data={"size": size}, images=shrunk)


def local(path: str) -> Path:
    """A path of the command here: separators of Windows are read as such elsewhere too."""
    return Path(path if "/" in path else path.replace("\\", "/"))


def localised(recipe: Recipe) -> Recipe:
    """The recipe with the paths in it as they are here."""
    changes: dict[str, dict[str, str]] = {}
    for section, key in PATHS:
        if named := getattr(getattr(recipe, section), key):
            changes.setdefault(section, {})[key] = str(local(named))
    return override(recipe, **changes) if changes else recipe


def begun(recipe: Recipe) -> Recipe:
    """The recipe, of kind principal where the adapter that it goes on from is principal.

    The factors that `recast split` writes are those the run would make itself.
    """
    from recast.checkpoint import Checkpoint

    path = Path(recipe.network.weights)
    if not recipe.network.weights or not path.is_file():
        return recipe
    with Checkpoint(path) as file:
        role = file.metadata.get("recast.role", "")
    if not role.startswith("pissa"):
        return recipe
    weights = "" if role == "pissa-init" else recipe.network.weights
    dim = recipe.network.dim
    return override(recipe, network={"kind": "principal", "weights": weights}, rank=dim)
