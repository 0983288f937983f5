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


def main_arms() -> dict[str, Arm]:
    """Both families, eps -> flow: the default and the published recipe along their budgets."""
    found: dict[str, Arm] = {}
    for family, model in FAMILIES.items():
        default = Arm("the default", model=model, seeds=CLAIMED)
        recipe = Arm("the published recipe", recipe=REFERENCE, model=model, seeds=CLAIMED)
        found[f"{family}/default"] = default
        found[f"{family}/recipe"] = recipe
        for steps in (25, 50, 100, 200):
            short = {"steps": steps}
            found[f"{family}/default-{steps}"] = replace(
                default, about=f"the default, {steps} steps", settings=short
            )
            found[f"{family}/recipe-{steps}"] = replace(
                recipe, about=f"the published recipe, {steps} steps", settings=short
            )
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
            f"{family}/everything", Arm("everything, teacher", EVERYTHING, model=model, seeds=3),
            (2e-4, 5e-4, 1e-3),
        )  # fmt: skip
        found |= rates(
            f"{family}/lowrank", Arm("principal rank 16, teacher", LOWRANK, model=model),
            (3e-4, 1e-3, 3e-3),
        )  # fmt: skip
        found |= rates(f"{family}/readout", Arm("read-out, teacher", model=model), (5e-4, 2e-3))
    return found


def readout_arms() -> dict[str, Arm]:
    """Variants of the read-out, their materials and targets, and controls of the place."""
    profiles = {
        "out08": "OUT08,OUT",
        "readout-time": "readout,time",
        "readout-first": "readout,IN,IN00,IN01",
        "out02-out08": "OUT02,OUT08,OUT",
        "control-first": "IN,IN00,IN01,IN02",
        "control-middle": "MID0,MID1,MID2",
    }
    found = {
        f"xl/{name}": Arm(f"layers {profile}, teacher", {"profile": profile})
        for name, profile in profiles.items()
    }
    found["xl/data"] = Arm("read-out, data target", {"teacher": "data"}, seeds=3)
    found["xl/mix"] = Arm("read-out, half data, half teacher", {"teacher": "mix"})
    found["xl/fallback"] = Arm("read-out, fallback above the range", {"above": "fallback"})
    found["xl/control-amplification"] = Arm("read-out, amplification weighed", {"control": True})
    for dropout in (0.1, 0.5):
        found[f"xl/dropout-{dropout:g}"] = Arm(
            f"read-out, captions dropped {dropout:.0%}", {"caption_dropout": dropout}, seeds=3
        )
    for pictures in (20, 100, 400):
        found[f"xl/replay-{pictures}"] = Arm(
            f"read-out, replay of {pictures} pictures", {"pictures": pictures}, images="dreams",
            seeds=CLAIMED if pictures == 100 else 1,
        )  # fmt: skip
    found["15/replay-100"] = replace(
        found["xl/replay-100"], model="pocket-15", about="read-out, replay of 100 pictures"
    )
    long = {"steps": 4000}
    found["xl/long-default"] = Arm("the default, ten times the steps", long)
    found["xl/long-everything"] = Arm(
        "everything, teacher, ten times the steps", {**EVERYTHING, **long, "lr": 5e-4}
    )
    found["xl/long-replay"] = Arm("replay of 400, ten times the steps", {**long, "pictures": 400},
                                  images="dreams")  # fmt: skip
    return found


def choice_arms() -> dict[str, Arm]:
    """What the defaults are chosen from: materials, warm starts, steps (e, g and k of the plan)."""
    mix = {"source": "mix", "pictures": 100}
    settings: dict[str, dict[str, Any]] = {
        "mix-replay": mix,
        "mix-replay-20": {"source": "mix", "pictures": 20},
        "mix-dreams": {**mix, "mix_with": "dreams"},
        "warm-clock": {"warm": "clock"},
        "warm-output": {"warm": "output"},
        "rate-0.002": {"lr": 2e-3},
        "warm-clock-input": {"warm": "clock,input"},
        "warm-clock-input-mix": {**mix, "warm": "clock,input"},
        "warm-clock-input-mix-20": {**mix, "pictures": 20, "warm": "clock,input"},
        "warm-clock-input-auto": {"warm": "clock,input", "steps": "auto"},
        "warm-clock-input-mix-auto": {**mix, "warm": "clock,input", "steps": "auto"},
        "clock-mix": {**mix, "warm": "clock"},
        "clock-auto": {"warm": "clock", "steps": "auto"},
        "clock-mix-auto": {**mix, "warm": "clock", "steps": "auto"},
        "clock-output": {"warm": "clock,output"},
        "clock-fallback": {"warm": "clock", "above": "fallback"},
        "clock-both": {"warm": "clock", "above": "both"},
        "clock-control": {"warm": "clock", "control": True},
        "clock-fallback-mix": {**mix, "warm": "clock", "above": "fallback"},
        "clock-fallback-800": {"warm": "clock", "above": "fallback", "steps": 800},
        "clock-rate-0.002": {"warm": "clock", "lr": 2e-3},
        "clock-fallback-everything": {
            "warm": "clock",
            "above": "fallback",
            "profile": "unet",
            "lr": 2e-4,
        },
        "clock-time": {"warm": "clock", "profile": "readout,time"},
        "clock-time-mix": {**mix, "warm": "clock", "profile": "readout,time"},
        "clock-time-mix-20": {**mix, "pictures": 20, "warm": "clock", "profile": "readout,time"},
        "steps-800": {"steps": 800},
        "auto": {"steps": "auto"},
        "mix-auto": {**mix, "steps": "auto"},
        "ema": {"ema": 0.99},
        "widen": {"widen": "OUT00,OUT01,OUT02,OUT03,OUT04,OUT05"},
        "target-mix-t": {"teacher": "mix", "mix": [[0, 0.0], [0.9, 0.0], [1, 1.0]]},
    }
    found = {f"xl/{n}": Arm(f"read-out, {', '.join(map(str, s))}", s) for n, s in settings.items()}
    found["xl/replay-auto"] = Arm(
        "read-out, replay of 100 pictures, auto", {"steps": "auto", "pictures": 100},
        images="dreams",
    )  # fmt: skip
    found["xl/warm-clock-input-replay"] = Arm(
        "read-out, clock and input warm, replay of 100 pictures",
        {"warm": "clock,input", "pictures": 100}, images="dreams",
    )  # fmt: skip
    found["xl/clock-replay"] = Arm(
        "read-out, clock warm, replay of 100 pictures", {"warm": "clock", "pictures": 100},
        images="dreams",
    )  # fmt: skip
    found["xl/clock-time-replay"] = Arm(
        "read-out and time, clock warm, replay of 100 pictures",
        {"warm": "clock", "profile": "readout,time", "pictures": 100}, images="dreams",
    )  # fmt: skip
    found["xl/replay-100-800"] = Arm(
        "read-out, replay of 100 pictures, 800 steps", {"steps": 800, "pictures": 100},
        images="dreams",
    )  # fmt: skip
    return found


def direction_arms() -> dict[str, Arm]:
    """Every direction; sources that are not shipped are made by another arm."""
    made = {"v": "v", "v-zsnr": "v-zsnr", "flow": "default"}
    found: dict[str, Arm] = {}
    for family, model in FAMILIES.items():
        for objective in ("v", "v-zsnr"):
            found[f"{family}/{objective}"] = Arm(
                f"eps to {objective}", model=model, objective=objective, seeds=2
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
    first = {"profile": FIRST}
    wide = {**EVERYTHING, "lr": 5e-4}
    both = {
        "start": ("nothing trained but the rotation", {"steps": 1, "lr": 1e-9}),
        "readout": ("read-out, teacher over the bridge", {}),
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
        settings={**first, "teacher": "mix", "pictures": 350},
    )  # fmt: skip
    return found


FIRST = "readout,IN,IN00,IN01"
ARMS = {
    **main_arms(), **tuned_arms(), **readout_arms(), **choice_arms(), **direction_arms(),
    **vae_arms(),
}  # fmt: skip
