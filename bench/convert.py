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
that the original had to make. Times are CPU seconds on one thread. Memory of a step: what is
trained, its gradients and moments in fp32, and what autograd keeps for the way back.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from _arms import ARMS, FAMILIES, Arm
from _claims import claims
from _compute import compute
from _figures import RUNS, figures, user_images
from _page import page

if TYPE_CHECKING:
    from recast.convert import Job
    from recast.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
PICTURES = 64
# the keys of the default that an arm's figures rest on where it says nothing of them
DECIDE = {
    "target": ("teacher", "above", "control", "guided"),
    "train": ("profile", "rank", "steps", "max_steps", "batch", "optimizer", "lr", "schedule",
              "distance", "weighting", "times", "shift", "warm", "ema"),
    "data": ("source", "mix_with", "mix_share", "caption_dropout", "null", "pictures"),
}  # fmt: skip
KEPT = 0  # the seed whose file other arms go on from
Row = dict[str, Any]


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
    """Names what an arm asks for, so that a row of an older arm or default is made again."""
    how = recipe_of(arm, 0).model_dump()
    decided = {
        section: {key: how[section][key] for key in keys} for section, keys in DECIDE.items()
    }
    asked = asdict(arm) | {"about": "", "seeds": 0, "settings": dict(arm.settings)}
    asked |= {"decided": decided}
    if asked.pop("vae"):
        from recast.pocket import VAE

        asked |= {"vae": sha256(VAE.read_bytes()).hexdigest()}
    chain = [asked]
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
    row |= figures(job, arm, source_of(arm.against or arm.model)) | compute(job)
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
    text = page(found, ARMS, __doc__ or "", tuple(claims(found, tuple(FAMILIES))))
    (RESULTS / "convert.md").write_text(text, encoding="utf-8")


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
