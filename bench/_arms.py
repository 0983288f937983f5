"""The arms of bench/convert: what is converted, how, and with how many seeds.

An arm names only what differs from a recipe. `model` may be another arm, whose first seed's result
is converted on; `against` is what the pictures are compared to, the model itself unless named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

CLAIMED = 5  # seeds of an arm that a claim rests on
FAMILIES = {"xl": "pocket-xl", "15": "pocket-15"}


@dataclass(frozen=True)
class Arm:
    """One way to convert; `settings` are recipe keys, `images` says whose: user, dreams."""

    about: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: str = "default"
    model: str = "pocket-xl"
    objective: str = "flow"
    images: str = "user"
    seeds: int = 1
    against: str = ""
    vae: bool = False  # into the latent space of pocket-eq


REFERENCE = "flow-dadaptlion"
EVERYTHING = {"profile": "unet"}
LOWRANK = {"profile": "principal", "rank": 16}
# the bare read-out that single ideas are tried on: images alone, 400 steps, no warm start
BARE = {"steps": 400, "source": "images", "warm": "none"}
DREAMT = {"steps": 400, "warm": "none"}
STEPS = {"steps": 400}
EIGHTH, EQUAL = 34, 274  # steps that cost an eighth of the recipe's forwards, and as many
BEST = (100, 200)  # steps after which the recipe's pictures are best, where a third are marked
# steps of batch 8 that cost an eighth of 100 of those, with replay and on images alone; and of 200
SOON, SOON_IMAGES, SHORT_IMAGES = 17, 19, 38
FIRST = "readout,IN,IN00,IN01"


def main_arms() -> dict[str, Arm]:
    """Both families, eps -> flow: the default and the published recipe along their budgets."""
    found: dict[str, Arm] = {}
    for family, model in FAMILIES.items():
        default = Arm("the default", model=model, seeds=CLAIMED)
        recipe = Arm("the published recipe", recipe=REFERENCE, model=model, seeds=CLAIMED)
        found[f"{family}/default"] = default
        found[f"{family}/recipe"] = recipe
        for name, steps in (("eighth", EIGHTH), ("equal", EQUAL), ("400", 400)):
            found[f"{family}/default-{name}"] = replace(
                default, about=f"the default, {steps} steps", settings={"steps": steps}
            )
        soon = {"steps": SOON, "batch": 8}
        found[f"{family}/default-soon"] = replace(
            default, about=f"the default, {SOON} steps of batch 8", settings=soon
        )
        found[f"{family}/images-soon"] = replace(
            default, about=f"the default on images alone, {SOON_IMAGES} steps of batch 8",
            settings={"steps": SOON_IMAGES, "batch": 8, "source": "images"},
        )  # fmt: skip
        found[f"{family}/images-short"] = replace(
            default, about=f"the default on images alone, {SHORT_IMAGES} steps of batch 8",
            settings={"steps": SHORT_IMAGES, "batch": 8, "source": "images"},
        )  # fmt: skip
        for steps in (25, 50, 100, 200):
            found[f"{family}/recipe-{steps}"] = replace(
                recipe, about=f"the published recipe, {steps} steps", settings={"steps": steps},
                seeds=CLAIMED if steps in BEST else 1,
            )  # fmt: skip
    return found


def rates(stem: str, base: Arm, tried: tuple[float, ...]) -> dict[str, Arm]:
    """An arm at several learning rates."""
    return {
        f"{stem}-{rate:g}": replace(
            base, about=f"{base.about}, rate {rate:g}", settings={**base.settings, "lr": rate}
        )
        for rate in tried
    }


def tuned_arms() -> dict[str, Arm]:
    """What else could be trained, each at three rates (b, c, d and e of the plan)."""
    adamw = {"optimizer": "adamw", "schedule": "linear", "optimizer_args": {"weight_decay": 0.0}}
    found: dict[str, Arm] = {}
    for family, model in FAMILIES.items():
        found |= rates(
            f"{family}/recipe-adamw",
            Arm("the published recipe with AdamW", adamw, REFERENCE, model),
            (3e-4, 1e-3, 3e-3),
        )
        found |= rates(
            f"{family}/everything",
            Arm("everything in place of the read-out", {**EVERYTHING, **STEPS}, model=model),
            (2e-4, 5e-4, 1e-3),
        )
        found |= rates(
            f"{family}/lowrank",
            Arm("principal rank 16 in place of the read-out", {**LOWRANK, **STEPS}, model=model),
            (3e-4, 1e-3, 3e-3),
        )
        found |= rates(f"{family}/readout", Arm("the default", STEPS, model=model), (5e-4, 2e-3))
        best = f"{family}/everything-0.0002"
        found[best] = replace(found[best], seeds=CLAIMED)
    return found


def choice_arms() -> dict[str, Arm]:
    """What the defaults are chosen from, each idea on the bare read-out, and some together."""
    mix = {"source": "mix", "pictures": 100}
    clock = {"warm": "clock"}
    ideas: dict[str, dict[str, Any]] = {
        "bare": {},
        "clock": clock,
        "time": {"profile": "readout,time"},
        "everything-0.0002": {**EVERYTHING, "lr": 2e-4},
        "mix": mix,
        "mix-20": {**mix, "pictures": 20},
        "clock-mix": {**mix, **clock},
        "clock-time": {**clock, "profile": "readout,time"},
        "clock-time-mix": {**mix, **clock, "profile": "readout,time"},
        "clock-fallback": {**clock, "above": "fallback"},
        "clock-both": {**clock, "above": "both"},
        "clock-auto": {**clock, "steps": "auto"},
        "clock-mix-20-auto": {**mix, **clock, "pictures": 20, "steps": "auto"},
        "clock-mix-20-auto-0.002": {
            **mix, **clock, "pictures": 20, "steps": "auto", "lr": 2e-3,
        },
        "25": {"steps": 25},
    }  # fmt: skip
    found = {f"xl/bare-{n}": Arm(said(s), {**BARE, **s}) for n, s in ideas.items()}
    found["xl/bare"] = found.pop("xl/bare-bare")
    found["xl/bare-25"] = replace(found["xl/bare-25"], seeds=2)
    found["15/bare"] = replace(found["xl/bare"], model="pocket-15")
    return dict(sorted(found.items()))


def said(settings: Mapping[str, Any]) -> str:
    """What is changed of the bare read-out."""
    changed = ", ".join(f"{key} {value}" for key, value in settings.items())
    return f"the bare read-out{': ' if changed else ''}{changed}"


def readout_arms() -> dict[str, Arm]:
    """Variants of the read-out, their materials and targets, and controls of the place."""
    profiles = {
        "out08": "OUT08,OUT",
        "readout-time": "readout,time",
        "readout-first": FIRST,
        "out02-out08": "OUT02,OUT08,OUT",
        "control-first": "IN,IN00,IN01,IN02",
        "control-middle": "MID0,MID1,MID2",
    }
    found = {
        f"xl/{name}": Arm(f"the default with layers {profile}", {**STEPS, "profile": profile})
        for name, profile in profiles.items()
    }
    images = {**STEPS, "source": "images"}
    found["xl/images"] = Arm("the default on images alone", images)
    found["xl/data"] = Arm("on images, data target", {**images, "teacher": "data"})
    found["xl/mix-target"] = Arm("on images, half data, half teacher", {**images, "teacher": "mix"})
    late = [[0, 0.0], [0.8, 0.0], [1, 1.0]]
    found["xl/mix-target-t"] = Arm(
        "on images, the data's share rising from t = .8", {**images, "teacher": "mix", "mix": late}
    )
    found["15/fallback"] = Arm("fallback above the range", {"above": "fallback"}, model="pocket-15")
    found["xl/fallback"] = Arm("fallback above the range", {**STEPS, "above": "fallback"})
    found["xl/amplification"] = Arm("amplification weighed", {**STEPS, "control": True})
    found["xl/dreams"] = Arm(
        "on images and pictures of its own", {**STEPS, "source": "mix", "mix_with": "dreams"}
    )
    found["xl/dream-128"] = Arm("the default, dreams of twice the side", {"dream_size": 128})
    widen = {"widen": "OUT00,OUT01,OUT02,OUT03,OUT04,OUT05"}
    found["xl/widen"] = Arm("further up blocks from half-time on", {**STEPS, **widen})
    for pictures in (20, 100, 400):
        found[f"xl/replay-{pictures}"] = Arm(
            f"no images: replay of {pictures} pictures", {**STEPS, "pictures": pictures},
            images="dreams",
        )  # fmt: skip
    found["xl/bare-replay-100"] = Arm(
        "the bare read-out, replay of 100 pictures", {**DREAMT, "pictures": 100}, images="dreams"
    )
    found["15/replay-100"] = replace(found["xl/replay-100"], model="pocket-15")
    long = {"steps": 4000}
    found["xl/long-default"] = Arm("the default, ten times the steps", long)
    found["xl/long-everything"] = Arm(
        "everything, ten times the steps", {**EVERYTHING, **long, "lr": 2e-4}
    )
    found["xl/long-replay"] = Arm("replay of 400, ten times the steps", {**long, "pictures": 400},
                                  images="dreams")  # fmt: skip
    return found


def direction_arms() -> dict[str, Arm]:
    """Every direction; sources that are not shipped are made by another arm."""
    made = {"v": "v", "v-zsnr": "v-zsnr", "flow": "default"}
    found: dict[str, Arm] = {}
    for family, model in FAMILIES.items():
        for objective in ("v", "v-zsnr"):
            found[f"{family}/{objective}"] = Arm(
                f"eps to {objective}", model=model, objective=objective
            )
        for source, arm in made.items():
            for objective in {"eps", "v", "v-zsnr", "flow"} - {source}:
                found[f"{family}/{source}-to-{objective}"] = Arm(
                    f"{source} to {objective}", model=f"{family}/{arm}", objective=objective
                )
        found[f"{family}/round-trip"] = Arm(
            "eps to flow and back", model=f"{family}/default", objective="eps", against=model
        )
        found[f"{family}/through-v-zsnr"] = Arm(
            "eps to v-zsnr to flow", model=f"{family}/v-zsnr", against=model
        )
    return dict(sorted(found.items()))


def vae_arms() -> dict[str, Arm]:
    """Into the latent space of pocket-eq: with eps -> flow in one run, and alone."""
    first = {**BARE, "profile": FIRST}
    wide = {**BARE, **EVERYTHING, "lr": 5e-4}
    both = {
        "start": ("nothing trained but the rotation", {**BARE, "steps": 1, "lr": 1e-9}),
        "readout": ("read-out, teacher over the bridge", BARE),
        "teacher": ("first block and read-out, teacher over the bridge", first),
        "mix": ("first block and read-out, half data", {**first, "teacher": "mix"}),
        "data": ("first block and read-out, data", {**first, "teacher": "data"}),
        "everything-teacher": ("everything, teacher over the bridge", wide),
        "everything-mix": ("everything, half data", {**wide, "teacher": "mix"}),
        "everything-data": ("everything, data", {**wide, "teacher": "data"}),
    }
    found = {
        f"xl/vae-flow-{name}": Arm(f"VAE and eps to flow: {about}", settings, vae=True)
        for name, (about, settings) in both.items()
        if name != "start"
    }
    for name in ("start", "teacher", "mix", "data"):
        about, settings = both[name]
        found[f"xl/vae-same-{name}"] = Arm(
            f"VAE alone: {about}", settings, objective="same", vae=True
        )
    found["xl/vae-dreams"] = replace(
        found["xl/vae-flow-mix"], images="dreams",
        about="VAE and eps to flow: first block and read-out, half data, 350 pictures of its own",
        settings={**DREAMT, "profile": FIRST, "teacher": "mix", "pictures": 350},
    )  # fmt: skip
    return found


ARMS = {
    **main_arms(), **tuned_arms(), **choice_arms(), **readout_arms(), **direction_arms(),
    **vae_arms(),
}  # fmt: skip
