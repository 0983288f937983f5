"""Converts the pocket checkpoints: every way the project knows beside the published recipe.

    make bench-convert                      all arms and seeds; start it twice for two cores
    python bench/convert.py 'xl/default*'   arms by name, with wildcards
    python bench/convert.py --list
    python bench/convert.py --page          only writes the table of what is there

A row is one arm with one seed; a row that exists is not run again unless its arm has changed. User
images: 350 pictures of the pocket world without star, ring and moon, a third watermarked. Figures:
64 pictures from the same noise and prompts as the original's, 25 steps, guidance 3, half of them
with a concept that the user images lack. Compute is counted in forwards of one sample through the
UNet, from the operations of the training step (backward and teacher included) and of the pictures
that the original had to make. Times are CPU seconds on one thread.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _arms import ARMS, Arm
from _page import page

if TYPE_CHECKING:
    from torch import Tensor

    from recast.convert import Job
    from recast.recipe import Recipe

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-convert"
RESULTS = ROOT / "bench" / "results"
ABSENT = ("star", "ring", "moon")
PICTURES = 64
KEPT = 0  # the seed whose file other arms go on from
Row = dict[str, Any]


def user_images() -> Path:
    """The user's folder of images, painted once."""
    from recast.commit import lock
    from recast.pocket.world import SHAPES, scenes, write_folder

    folder = RUNS / "images"
    with lock(RUNS):
        if not (RUNS / "images.complete").exists():
            absent = {SHAPES.index(name) for name in ABSENT}
            seen = [scene for scene in scenes(held=False) if scene.shape not in absent]
            write_folder(folder, random.Random(0).sample(seen, 350), seed=0, marked_share=1 / 3)
            (RUNS / "images.complete").touch()
    return folder


def recipe_of(arm: Arm, seed: int) -> Recipe:
    """The arm's recipe."""
    from recast import pocket
    from recast.recipe import load, override

    vae = str(pocket.VAE) if arm.vae else None
    how = override(load(arm.recipe), **arm.settings, objective=arm.objective, vae=vae)
    return override(how, train={"seed": seed}, evaluate={"pictures": PICTURES})


def source_of(name: str) -> Path:
    """The file of a shipped checkpoint, or of another arm's kept seed, which is run if need be."""
    from recast import pocket

    if name in pocket.NAMES:
        return pocket.path(name)
    file = RUNS / name / str(KEPT) / "model.safetensors"
    if not file.exists():
        run_row(name, KEPT)
    return file


def digest(arm: Arm) -> str:
    """Names what an arm asks for, so that a row of an older arm is made again."""
    asked = asdict(arm) | {"about": "", "seeds": 0, "settings": dict(arm.settings)}
    if not asked.pop("vae"):
        chain = [asked]
    else:
        from recast.pocket import VAE

        chain = [asked | {"vae": sha256(VAE.read_bytes()).hexdigest()}]
    if arm.model in ARMS:
        chain.append({"model": digest(ARMS[arm.model])})
    return sha256(json.dumps(chain, sort_keys=True).encode()).hexdigest()[:12]


def run_row(name: str, seed: int) -> Row:
    """Convert and measure; raises Refused when another process is at this very row."""
    from recast.convert import Job
    from recast.errors import Diverged

    arm = ARMS[name]
    out = RUNS / name / str(seed)
    images = user_images() if arm.images == "user" else None
    job = Job(source_of(arm.model), out, recipe_of(arm, seed), images=images, measure=False)
    share_cache(out)
    row: Row = {"arm": name, "seed": seed, "digest": digest(arm)}
    try:
        row["cpu_seconds"] = convert(job)
    except Diverged as error:
        return save(row | {"diverged": str(error)})
    row |= figures(job, arm) | compute(job)
    keep = seed == KEPT and name in {other.model for other in ARMS.values()}
    for path in out.iterdir():
        if path.is_symlink():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.name != "log.jsonl" and not (keep and path.name == "model.safetensors"):
            path.unlink()
    return save(row)


def share_cache(out: Path) -> None:
    """Let the run find latents and conditions that other runs made; entries name all they need."""
    out.mkdir(parents=True, exist_ok=True)
    (RUNS / "cache").mkdir(exist_ok=True)
    if not (out / "cache").is_symlink():
        (out / "cache").symlink_to(RUNS / "cache", target_is_directory=True)


def convert(job: Job) -> float:
    """Train and write, without the report; returns CPU seconds."""
    from recast import console
    from recast.convert import run

    began = time.process_time()
    console.follow(run(job))
    return round(time.process_time() - began, 1)


def figures(job: Job, arm: Arm) -> Row:
    """Fidelity to the model itself (or what the arm names), concepts kept, watermarks."""
    from recast.checkpoint import Checkpoint
    from recast.convert import bridge
    from recast.convert.folder import Folder, digest_of, read_identity
    from recast.convert.material import examples_of
    from recast.convert.measure import choose, paint
    from recast.evaluate.agreement import agreement
    from recast.evaluate.concepts import concepts, scenes
    from recast.model import open_model

    captions = [e.caption for e in examples_of(user_images(), skip_broken=False)]
    with Checkpoint(source_of("pocket-xl")) as pocket:
        test = choose(job, pocket, captions)
    written = open_model(job.out / "model.safetensors")
    over = bridge.read(Folder(job.out, digest_of(read_identity(job.out) or {})))
    painter = bridge.painter(written, over)
    made = [picture.image for picture in paint(painter, job, test, None)]
    against = source_of(arm.against or arm.model)
    old = original(against, job, None)
    worlds = scenes(test.prompts)
    assert worlds is not None, "the prompts are captions of the pocket world"
    here, there = concepts(made, worlds, test.seen), concepts(old, worlds, test.seen)
    ceiling = original(against, job, None if arm.objective == "same" else arm.objective)
    found = {
        "psnr": agreement(old, made).mean,
        "psnr_wrapper": agreement(ceiling, made).mean,
        "ceiling": agreement(old, ceiling).mean,
    }
    for key in ("alignment", "retention", "leakage"):
        found |= {key: getattr(here, key), f"{key}_original": getattr(there, key)}
    return {key: round(value, 4) for key, value in found.items()}


def original(file: Path, job: Job, objective: str | None) -> list[Tensor]:
    """Pictures of the original, by its own sampler or as another objective; painted once."""
    import torch

    from recast.checkpoint import Checkpoint, write_dict
    from recast.convert.material import examples_of
    from recast.convert.measure import choose, paint
    from recast.model import open_model
    from recast.objective import OBJECTIVES

    with Checkpoint(file) as checkpoint:
        path = RUNS / "originals" / f"{checkpoint.sha256()[:16]}-{objective}.safetensors"
    if not path.exists():
        captions = [e.caption for e in examples_of(user_images(), skip_broken=False)]
        with Checkpoint(source_of("pocket-xl")) as pocket:
            test = choose(job, pocket, captions)
        wanted = OBJECTIVES[objective] if objective else None
        pictures = [p.image for p in paint(open_model(file), job, test, wanted)]
        write_dict(path, {"pictures": torch.stack(pictures)}, {}, force=True)
    with Checkpoint(path) as checkpoint:
        return list(checkpoint["pictures"])


def compute(job: Job) -> Row:
    """Forward-equivalents of the arm: those of its training steps, and of making its pictures."""
    from recast.checkpoint import Checkpoint
    from recast.convert.sources import sources_of
    from recast.markers import read_objective

    how, data = job.recipe.train, job.recipe.data
    with Checkpoint(job.model) as checkpoint:
        source = str(read_objective(checkpoint.specs, checkpoint.metadata).objective)
    given = sources_of(job)
    one, step = operations(job, source, replay=given.images is None)
    if given.images and given.dreams == "replay":
        dearer, cheaper = step, operations(job, source, replay=True)[1]
        step = data.mix_share * dearer + (1 - data.mix_share) * cheaper
    steps = taken(job.out)
    dreamt = data.pictures * data.replay_steps * 2 if given.dreams else 0
    trained = steps * how.batch * how.accumulate * step / one
    return {"forwards": round(trained + dreamt), "step": round(step / one, 3), "steps": steps}


def taken(out: Path) -> int:
    """How many steps the run took, by its log."""
    *_, last = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return int(json.loads(last)["step"])


def operations(job: Job, source: str, *, replay: bool) -> tuple[float, float]:
    """Floating-point operations of one sample: a forward, and a training step."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from recast.adapter import attach
    from recast.adapter.decompose import decompose, zeros_full
    from recast.convert.training import student, target_of
    from recast.convert.trunk import shared
    from recast.model import open_model
    from recast.objective import OBJECTIVES
    from recast.train import criterion, noised, replayed

    model = open_model(job.model, objective=source)
    wanted = job.recipe.target.objective
    objective = OBJECTIVES[source if wanted == "same" else wanted]
    sites = model.layout.sites(job.recipe.train.places)
    rank = job.recipe.train.rank
    start = (
        decompose(model.checkpoint, sites, rank) if rank else zeros_full(model.checkpoint, sites)
    )
    attached = attach({"unet": model.unet}, start, sites)
    condition, half = model.condition([""]), torch.full((1,), 0.5)
    x = torch.randn(1, *model.latent_shape())
    made = replayed if replay else noised
    draw = made(objective, x, half, x, condition, half.long())
    moved = bool(job.recipe.data.vae)
    trunk = None if moved else shared(model.unet, attached, model.objective, objective)
    target = target_of(job.recipe, model, attached, objective, condition, trunk)
    loss = criterion(target, objective)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.net(condition)(x, half)
    with FlopCounterMode(display=False) as whole:
        loss(student(model, objective, trunk), draw).weighted.mean().backward()
    attached.detach()
    return float(forward.get_total_flops()), float(whole.get_total_flops())


def save(row: Row) -> Row:
    """Leave the row where every process finds it."""
    path = RUNS / "rows" / f"{row['arm'].replace('/', '_')}-{row['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    return row


def rows() -> list[Row]:
    """Rows of the arms as they are now: those committed, and those made here since."""
    committed = RESULTS / "convert.json"
    found: dict[tuple[str, int], Row] = {}
    if committed.exists():
        found = {(r["arm"], r["seed"]): r for r in json.loads(committed.read_text())["rows"]}
    for path in sorted((RUNS / "rows").glob("*.json")):
        row = json.loads(path.read_text(encoding="utf-8"))
        found[row["arm"], row["seed"]] = row
    order = list(ARMS)
    mine = [r for r in found.values() if r["arm"] in ARMS and r["digest"] == digest(ARMS[r["arm"]])]
    return sorted(mine, key=lambda r: (order.index(r["arm"]), r["seed"]))


def missing(chosen: list[str]) -> Iterator[tuple[str, int]]:
    """Rows still to be made: first seeds of all arms first, so that the table fills evenly."""
    for seed in range(max(ARMS[name].seeds for name in chosen)):
        for name in chosen:
            done = {(row["arm"], row["seed"]) for row in rows()}
            if seed < ARMS[name].seeds and (name, seed) not in done:
                yield name, seed


def write_results() -> None:
    """The committed figures and their page."""
    import torch

    about = {"torch": torch.__version__, "threads": 1, "device": "cpu"}
    found = rows()
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"about": about, "rows": found}, indent=1)
    (RESULTS / "convert.json").write_text(text + "\n", encoding="utf-8")
    (RESULTS / "convert.md").write_text(page(found, ARMS, __doc__ or ""), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("arms", nargs="*", default=["*"], help="names, with wildcards")
    parser.add_argument("--list", action="store_true", help="name the arms and leave")
    parser.add_argument("--page", action="store_true", help="write the table of what is there")
    given = parser.parse_args()
    chosen = [name for name in ARMS if any(fnmatch.fnmatch(name, g) for g in given.arms)]
    if given.list or given.page or not chosen:
        if given.page:
            write_results()
        else:
            print("\n".join(f"{name:28} {ARMS[name].about}" for name in chosen or ARMS))
        return
    import torch

    from recast.errors import Refused

    torch.set_num_threads(1)
    for name, seed in missing(chosen):
        try:
            row = run_row(name, seed)
        except Refused as error:
            print(f"{name} seed {seed}: not run, {error}", flush=True)
            continue
        print(f"{name} seed {seed}: {row.get('psnr', row.get('diverged'))}", flush=True)
        write_results()


if __name__ == "__main__":
    main()
