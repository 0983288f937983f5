"""The recipe fast-80 on a concept that pocket-xl never saw: 40 pictures of an hourglass.

    make bench-fast80             or python bench/fast80.py; what exists is not made again
    python bench/fast80.py shipped/1   only that run; the page has all that there are

40 drawn pictures of a ninth shape with captions ("a big red sks on dots at top") are trained for 80
steps of 48 by the recipe as it ships, but for its sizes (64 pixels, no aspect buckets, 48 pictures
at once). The recipe flips pictures, so none of them is at left or right. The shape's name is one
rare token, as users choose them: pocket-xl never saw it. Original and result then paint 48 of them
at the places of the training, none in a scene of it, 16 at left or right, and 48 scenes of the
eight shapes that pocket-xl knows, from the same noise (25 Euler steps, guidance 3). A judge that
was taught the ninth shape on drawn pictures reads them (bench/_ninth.py). One thread. Rows that are
not there were not run.

"shipped" is the recipe with its published numbers, which are SDXL's. Adam and its kin move each
number of a factor by about the rate, so that what a layer's answer moves by grows with its inputs:
1280 at SDXL's middle levels, 64 here. The change of a product of two factors is as large at
sqrt(1280 / 64) = 4.5 times the rate. The other arms have twice that ("x9"), three times ("x13") or
four times ("x18"), the text encoders' rate in proportion, no multi-resolution noise (on latents of
8 x 8 its layers are as wide as a shape, and what was trained with it painted grounds without their
colour, docs/log.md), and what the model knew is held in one of two ways:

  x..-replay24   24 of a step's 48 are replayed (of "replay16" 16): states and answers that the
  original met while it painted 160 captions that are not judged (data.source = "mix");
  x9-1           a regularisation folder: 160 pictures that the original paints itself, of the same
  captions. They are half of every step's 48, and each counts as much as the number in the arm's
  name. It is the usual way, with the noise of data in its targets.

"small" is the LoRA of x13-replay24 after `recast resize` (the best scores that a tenth of its bytes
can hold) and `recast chop` (without blocks that hold less than a thousandth of the squared change:
four in seed 1, none in the others), added to the original.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from _fast80 import (
    FOLDERS,
    NEW,
    OLD,
    PRIOR,
    known_scenes,
    ninths,
    painted,
    prior_pictures,
    said_by,
)
from _ninth import caption, draw, fit, shares, through, widened, write_folder

if TYPE_CHECKING:
    from recast.layout import Layout
    from recast.pocket.judge import Judge

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "runs" / "bench-fast80"
RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Arm:
    """The rate's factor, what each own picture counts, and how many of a step's 48 are replayed."""

    factor: float = 1.0
    prior: float = 0.0
    replay: int = 0


BATCH = 48  # of a step of the recipe
SCALE = (1280 / 64) ** 0.5  # inputs of a layer at SDXL's middle levels, and of pocket-xl's
ARMS = {
    "shipped": Arm(),
    "x9-1": Arm(2 * SCALE, prior=1.0),
    "x9-2": Arm(2 * SCALE, prior=2.0),
    "x9-0.3": Arm(2 * SCALE, prior=0.3),
    "x18-0.5": Arm(4 * SCALE, prior=0.5),
    "x9-replay24": Arm(2 * SCALE, replay=24),
    "x9-replay16": Arm(2 * SCALE, replay=16),
    "x13-replay24": Arm(3 * SCALE, replay=24),
}
KEPT = "x13-replay24"
RUN = (
    "shipped/0", *(f"x13-replay24/{seed}" for seed in range(3)),
    *(f"x9-replay24/{seed}" for seed in range(3)), *(f"x9-replay16/{seed}" for seed in range(3)),
    *(f"x9-1/{seed}" for seed in range(3)), "x9-2/0", "x9-0.3/0", "x18-0.5/0",
)  # fmt: skip
TENTH, WEAK = 0.1, 0.001  # of the bytes; the share of the whole change below which a block goes


def main() -> None:
    """Train and measure what is missing, then write results and page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="ARM/SEED", help=f"of {', '.join(RUN)}")
    given = parser.parse_args()
    torch.set_num_threads(1)
    asked = Asked()
    if not kept("original"):
        asked.row("original", None)
    for name in given.runs or RUN:
        arm, _, seed = name.partition("/")
        out = RUNS / name.replace("/", "-")
        if not kept(name):
            began = time.process_time()
            train(out, int(seed), ARMS[arm])
            seconds = round(time.process_time() - began)
            asked.row(name, out / "model.safetensors", cpu_s=seconds, bytes=size(out))
        if arm == KEPT and not kept(f"small/{seed}"):
            model, facts = smaller(out)
            asked.row(f"small/{seed}", model, **facts)
    write()


class Asked:
    """What is painted and who judges it, made when first needed."""

    def __init__(self) -> None:
        from recast.pocket.world import caption as said

        _, self.new, self.aside = ninths()
        self.old = known_scenes()
        self.prompts = [*map(caption, self.new), *map(said, self.old), *map(caption, self.aside)]
        self.judge: Judge | None = None

    def row(self, name: str, model: Path | None, **facts: Any) -> None:
        """Paint with a model, or the original, and keep what the judge says."""
        from recast import pocket
        from recast.model import open_model

        original = open_model(pocket.path("pocket-xl"))
        self.judge = self.judge or taught_judge(original)
        if model is None:
            facts["ceiling"] = shares(self.judge, through(original, draw(self.new, 1)), self.new)
        made = painted(open_model(model) if model else original, self.prompts)
        facts["new"] = shares(self.judge, made[:NEW], self.new)
        facts["old"] = shares(self.judge, made[NEW : NEW + OLD], self.old)
        facts["aside"] = shares(self.judge, made[NEW + OLD :], self.aside)
        note(name).write_text(json.dumps({"name": name} | facts) + "\n", encoding="utf-8")


def taught_judge(original: Any) -> Judge:
    """The judge of nine shapes, kept from one call to the next."""
    from safetensors.torch import load_file, save_file

    from recast.pocket.judge import load_judge

    file = RUNS / "judge.safetensors"
    if not file.exists():
        RUNS.mkdir(parents=True, exist_ok=True)
        partial = RUNS / f"judge-{os.getpid()}"
        save_file(fit(original).state_dict(), partial)
        partial.rename(file)
    judge = widened(load_judge())
    judge.load_state_dict(load_file(file))
    return judge.eval().requires_grad_(False)


def train(out: Path, seed: int, arm: Arm) -> None:
    """Run the recipe, or what is missing of it, as an arm has it."""
    from recast import pocket
    from recast.convert import Job, run
    from recast.recipe import load, override

    images = RUNS / f"images-{seed}"
    write_folder(images, ninths()[0], seed)
    if arm.prior:
        prior_pictures(RUNS)
        (RUNS / f"{images.name}.toml").write_text(FOLDERS.format(images.name), encoding="utf-8")
        images = RUNS / f"{images.name}.toml"
    recipe = load("fast-80")
    how, calls = recipe.train, BATCH // (arm.replay or BATCH)
    data: dict[str, Any] = {"size": 64}
    if arm.replay:
        data |= {
            "source": "mix", "mix_share": 1 - arm.replay / BATCH, "pictures": PRIOR,
            "prompts": str(said_by(RUNS)),
        }  # fmt: skip
    recipe = override(
        recipe,
        train={
            "seed": seed, "lr": how.lr * arm.factor, "precision": "fp32", "recompute": False,
            "batch": BATCH // calls, "accumulate": calls,
        },
        data=data, images={"enable_bucket": False, "prior_loss_weight": arm.prior or None},
        network={"merge": True},
        noise={"multires": 0 if arm.prior or arm.replay else None},
        watch={"previews_every": 0}, save={"every": 0},
    )  # fmt: skip
    for _ in run(Job(pocket.path("pocket-xl"), out, recipe, images=images, measure=False)):
        pass


def smaller(out: Path) -> tuple[Path, dict[str, int]]:
    """The LoRA of a run in a tenth of its bytes, added to the original; what it is like."""
    from recast import pocket
    from recast.layout import detect, open_checkpoint
    from recast.surgery.chop import chop
    from recast.surgery.merging import write_merge
    from recast.surgery.recipes import Added, Step
    from recast.surgery.resize import resize
    from recast.surgery.scores import recipes
    from recast.surgery.weights import Weights

    lora, resized, chopped = (out / f"{name}.safetensors" for name in ("lora", "resized", "small"))
    model, base = out / "small-model.safetensors", pocket.path("pocket-xl")
    mib = TENTH * lora.stat().st_size / 2**20
    with open_checkpoint(base) as file:
        found = recipes(f"fro_ckpt=1,size={mib:.5f}")[0]
        (made,) = resize(lora, [(resized, found)], base=file, force=True)
        layout = detect(file)
    weak = Weights(tuple((block, 0.0) for block in weak_blocks(resized, layout)))
    done = chop(resized, chopped, weak, layout=layout, force=True)
    write_merge(Step("lora", (base,), adapters=(Added(chopped),)), model, force=True)
    facts = {"bytes": size(out, "small"), "modules": done.kept, "blocks_out": len(weak.rules)}
    return model, facts | {"resized_bytes": size(out, "resized"), "rank": max(made.ranks)}


def weak_blocks(lora: Path, layout: Layout) -> Iterator[str]:
    """Blocks that hold less than WEAK of the squared change of a file."""
    from recast.adapter.formats import open_raw
    from recast.surgery.contents import energy, held, rows

    with open_raw(lora, layout, strangers=True) as raw:
        modules, _ = held(raw, lora, layout)
        energies = {module.spot.lora: energy(lora, module) for module in modules}
        for row in rows(modules, energies):
            if row.energy is not None and row.energy < WEAK:
                yield row.block


def size(out: Path, name: str = "lora") -> int:
    """Bytes of a LoRA of a run."""
    return (out / f"{name}.safetensors").stat().st_size


def note(name: str) -> Path:
    """Where a row is kept."""
    RUNS.mkdir(parents=True, exist_ok=True)
    return RUNS / f"{name.replace('/', '-')}.json"


def kept(name: str) -> dict[str, Any] | None:
    """A row that was measured before."""
    file = note(name)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def write() -> None:
    """Write bench/results/fast80.json and .md of the rows that there are."""
    small = [f"small/{name.partition('/')[2]}" for name in RUN if name.startswith(KEPT)]
    rows = [row for row in map(kept, ("original", *RUN, *small)) if row]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "fast80.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    page = "\n".join(lines(rows)) + "\n"
    (RESULTS / "fast80.md").write_text(page, encoding="utf-8")
    print(page)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """The page."""
    first, ceiling = rows[0]["old"]["all"], rows[0]["ceiling"]
    made = [
        "# fast-80 on a new concept", "", (__doc__ or "").split("\n\n", 2)[2].strip(), "",
        f"The judge on drawn hourglasses of those scenes after the VAE, the ceiling: shape "
        f"{ceiling['shape']:.3f}, all five {ceiling['all']:.3f}.", "",
        "| arm/seed | hourglass | all five of it | at left or right | other shapes | "
        "all five of them | to the original | called hourglass | LoRA, bytes | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for each in rows:
        new, old = each["new"], each["old"]
        made.append(
            f"| {each['name']} | {new['shape']:.3f} | {new['all']:.3f} | "
            f"{each['aside']['shape']:.3f} | {old['shape']:.3f} | "
            f"{old['all']:.3f} | {old['all'] / first:.3f} | {old['ninth']:.3f} | "
            f"{each.get('bytes', '')} | {each.get('cpu_s', '')} |"
        )
    return made


if __name__ == "__main__":
    main()
