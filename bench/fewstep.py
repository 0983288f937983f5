"""A few-step adapter made for the original, on the converted model.

    make bench-fewstep          or python bench/fewstep.py; what exists is not made again
    python bench/fewstep.py --page

Two LoRAs are distilled from pocket-xl as latent consistency models are (Luo et al. 2023): eps
network, guidance 3 folded in, DDIM steps of 1/16 of the path, latents that pocket-xl dreamt. One
is on every layer of the blocks, one leaves the read-out (last up block) alone. pocket-xl converted
from eps to flow by the default recipe then gets the same files, and both paint in 4 and in 2 steps
from the same noise at the same noise levels: `lcm` takes x0 and puts fresh noise (the same for all)
on it each step, `euler` goes on with its own eps. In the last row the LoRA is merged into the
original before that is converted. Figures: share of pictures that the judge finds right, PSNR to
the original's 25-step picture (guidance 3), and PSNR to what the original paints with the same LoRA
or without, same sampler and steps. 48 pictures, half of them of combinations that pocket-xl never
saw. One seed, one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _lcm import BATCH, SITES, distil, fresh, lcm
from torch import Tensor

if TYPE_CHECKING:
    from recast.adapter import Adapter
    from recast.model import Model
    from recast.objective import Net
    from recast.recipe import Recipe

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-fewstep"
RESULTS = ROOT / "bench" / "results"
FEW = (4, 2)
POLISH = 100
TRAINED = {"lora": 600, "lora-trunk": 400}  # steps of distillation
PICTURES = 48
HEAD = "| model | | sampler | right | to the original's 25 steps | to the same on the original |"
Row = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """A model with a LoRA or without, and how it is sampled; `like` is what it should paint as."""

    about: str
    model: str = "original"
    lora: str = ""
    keep: str = "all"  # of the LoRA's modules: all, or trunk, without those of the read-out
    objective: str = ""  # sampled as if trained for this one
    guidance: float = 1.0
    steps: tuple[int, ...] = FEW
    samplers: tuple[str, ...] = ("lcm", "euler")
    like: str = ""


ARMS = {
    "original, 25 steps": Arm("guidance 3", guidance=3.0, steps=(25,), samplers=("euler",)),
    "original": Arm("no LoRA, guidance 3: twice the passes", guidance=3.0),
    "original, unguided": Arm("no LoRA"),
    "original + lora": Arm("every layer", lora="lora", like="original + lora"),
    "original + lora, as flow": Arm(
        "sampled as flow, untrained", lora="lora", objective="flow", like="original + lora"
    ),
    "original + lora-trunk": Arm("trunk only", lora="lora-trunk", like="original + lora-trunk"),
    "converted, 25 steps": Arm(
        "guidance 3", "converted", guidance=3.0, steps=(25,), samplers=("euler",)
    ),
    "converted": Arm(
        "no LoRA, guidance 3: twice the passes", "converted", guidance=3.0, like="original"
    ),
    "converted, unguided": Arm("no LoRA", "converted", like="original, unguided"),
    "converted + lora": Arm("every layer", "converted", "lora", like="original + lora"),
    "converted + lora less read-out": Arm(
        "the file without its read-out modules", "converted", "lora", "trunk",
        like="original + lora",
    ),
    "converted + lora-trunk": Arm(
        "trunk only", "converted", "lora-trunk", like="original + lora-trunk"
    ),
    "merged first, then converted": Arm(
        f"original + lora, the patch, {POLISH} steps", "merged", like="original + lora"
    ),
}  # fmt: skip


def distilled(name: str) -> Adapter:
    """A few-step LoRA of pocket-xl, distilled if it is not there."""
    from recast.adapter import read_adapter, write_adapter

    path = RUNS / f"{name}.safetensors"
    if not path.exists():
        began = time.process_time()
        without = of_readout() if name == "lora-trunk" else ()
        start = fresh(original(), without)
        made = distil(original(), start, TRAINED[name], RUNS / "pairs")
        about = {"bench.cpu_seconds": f"{time.process_time() - began:.0f}"}
        write_adapter(path, made, metadata=about)
    return read_adapter(path)


@cache
def of_readout() -> frozenset[str]:
    """Names of the read-out's entries."""
    from recast.adapter import entry_name

    return frozenset(entry_name(site) for site in original().layout.sites("readout"))


@cache
def original() -> Model:
    """pocket-xl as it ships."""
    from recast import pocket
    from recast.model import open_model

    return open_model(pocket.path("pocket-xl"))


@cache
def converted() -> Model:
    """pocket-xl converted to flow by the default recipe, on the images of bench/convert."""
    from recast import pocket
    from recast.model import open_model
    from recast.recipe import load

    return open_model(turned(pocket.path("pocket-xl"), "converted", load()))


@cache
def merged() -> Model:
    """pocket-xl with the LoRA merged into it, converted by pocket-xl's own patch and a polish."""
    from recast.adapter.rebuild import write_rebuilt
    from recast.model import open_model
    from recast.recipe import load, override

    file = RUNS / "merged.safetensors"
    if not file.exists():
        write_rebuilt(original().checkpoint, None, distilled("lora"), file)
    converted()
    start = RUNS / "converted" / "patch.safetensors"
    polish = override(load("polish"), steps=POLISH, watch={"validate_every": 0})
    return open_model(turned(file, "merged", polish, start))


def turned(model: Path, name: str, how: Recipe, start: Path | None = None) -> Path:
    """A checkpoint converted from eps to flow, or found converted."""
    from convert import user_images

    from recast import console
    from recast.convert import Job, run
    from recast.recipe import override

    out = RUNS / name
    how = override(how, objective="flow")
    job = Job(model, out, how, images=user_images(), measure=False, start=start, far=True)
    console.follow(run(job))
    return out / "model.safetensors"


MODELS = {"original": original, "converted": converted, "merged": merged}


@torch.no_grad()
def painted(name: str, sampler: str, count: int) -> list[Tensor]:
    """An arm's pictures in so many steps."""
    from recast.adapter import Adapter, attach
    from recast.objective import EPS, OBJECTIVES, express, retime, start
    from recast.sample.guidance import plain
    from recast.sample.solvers import ddim
    from recast.timesteps import grid, trailing

    arm = ARMS[name]
    model = MODELS[arm.model]()
    objective = OBJECTIVES[arm.objective] if arm.objective else model.objective
    times = retime(trailing(EPS.path, count), EPS.path, objective.path)
    if count not in FEW:
        times = grid(objective.path, count)
    run: Callable[..., Iterator[Tensor]] = {"lcm": lcm, "euler": ddim}[sampler]
    attached = None
    if arm.lora:
        lora = distilled(arm.lora)
        if arm.keep == "trunk":
            entries = {k: v for k, v in lora.entries.items() if k not in of_readout()}
            lora = Adapter(entries, lora.metadata)
        attached = attach({"unet": model.unet}, lora, model.layout.sites(SITES))
    pictures: list[Tensor] = []
    prompts, shape = test_prompts(), model.latent_shape()
    for first in range(0, len(prompts), BATCH):
        rows = range(first, min(first + BATCH, len(prompts)))
        generators = [torch.Generator().manual_seed(1000 + k) for k in rows]
        eps = torch.stack([torch.randn(shape, generator=each) for each in generators])
        net = express(bound(model, prompts[first : first + BATCH], arm.guidance), model.objective,
                      objective)  # fmt: skip
        noisy = start(objective.path, eps, float(times[0]))
        *_, x = run(plain(net, objective), objective.path, noisy, times, generator=generators)
        pictures += list(model.decode(x).clamp(-1, 1))
    if attached:
        attached.detach()
    return pictures


def bound(model: Model, prompts: list[str], guidance: float) -> Net:
    """The network under its prompts, guided if asked."""
    net = model.net(model.condition(prompts))
    if guidance == 1:
        return net
    bare = model.net(model.condition([""]))
    return lambda x, t: torch.lerp(bare(x, t), net(x, t), guidance)


@cache
def test_prompts() -> list[str]:
    """Half of combinations that pocket-xl was trained on, half of others."""
    import random

    from recast.pocket.world import caption, scenes

    chance = random.Random(1)
    chosen = [chance.sample(scenes(held=held), PICTURES // 2) for held in (False, True)]
    return [caption(scene) for both in zip(*chosen, strict=True) for scene in both]


def rows() -> Iterator[Row]:
    """Every arm's figures."""
    from recast.evaluate.agreement import agreement
    from recast.pocket.judge import agreement as judged
    from recast.pocket.world import parse

    for name in TRAINED:
        distilled(name)
    for opened in MODELS.values():
        opened()
    made = {
        (name, sampler, count): painted(name, sampler, count)
        for name, arm in ARMS.items()
        for sampler in arm.samplers
        for count in arm.steps
    }
    scenes = [parse(prompt) for prompt in test_prompts()]
    best = made["original, 25 steps", "euler", 25]
    for (name, sampler, count), pictures in made.items():
        arm = ARMS[name]
        row: Row = {"arm": name, "about": arm.about, "sampler": sampler, "steps": count}
        row["right"] = judged(torch.stack(pictures), scenes)["all"]
        if pictures is not best:
            row["psnr"] = agreement(best, pictures).mean
        if arm.like and arm.like != name:
            row["psnr_like"] = agreement(made[arm.like, sampler, count], pictures).mean
        yield row


def page(found: list[Row], about: Row) -> str:
    """The results as Markdown."""
    seconds = ", ".join(f"{name} {value} s" for name, value in about["cpu_seconds"].items())
    lines = ["# bench/fewstep", "", (__doc__ or "").strip(), "", f"Distilled in: {seconds}.", ""]
    for count in sorted({row["steps"] for row in found}, reverse=True):
        lines += [f"## {count} steps", "", HEAD, "|---|---|---|--:|--:|--:|"]
        for row in (row for row in found if row["steps"] == count):
            figures = [f"{row[k]:.1f} dB" if k in row else "–" for k in ("psnr", "psnr_like")]
            cells = [row["arm"], row["about"], row["sampler"], format(row["right"], ".2f")]
            lines.append(f"| {' | '.join([*cells, *figures])} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the table again")
    given = parser.parse_args()
    path = RESULTS / "fewstep.json"
    if not given.page:
        found = list(rows())
        seconds = {name: distilled(name).metadata.get("bench.cpu_seconds", "?") for name in TRAINED}
        about = {"torch": torch.__version__, "threads": 1, "cpu_seconds": seconds}
        RESULTS.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")
    stored = json.loads(path.read_text())
    text = page(stored["rows"], stored["about"])
    (RESULTS / "fewstep.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
