"""The student as a file in the original's layout, and the proof that the file is the student.

Written, opened again, counted, hashed; its UNet differs from the base's and answers as the student
in memory does, rounded to the file's precision, within 1e-5. Only then is an older file removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recast.checkpoint import Checkpoint, write
from recast.distillation.config import Config, dump_toml
from recast.distillation.folder import MODEL, read_json, write_json
from recast.distillation.networks import Lazy, Pair, unet_of
from recast.errors import CheckFailed
from recast.layout import keymap, to_file
from recast.layout.names import ROOTS, UNET, VAE
from recast.markers import marker_specs, stamp, strip
from recast.objective import OBJECTIVES, Objective

if TYPE_CHECKING:
    from recast.layout import Layout
    from recast.layout.keymap import Entry
    from recast.train import Draw

TOLERANCE = 1e-5  # of the largest number of the answer
# an adapter beside its layer and one added to it differ by the arithmetic of the network's dtype
MERGED = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}
GOOD = "good.json"
COMPONENTS = "recast.components"
SAME_SEEN = 8  # samples of the draw that answers are compared on


@dataclass(frozen=True)
class Proof:
    """What was found of a written file; `error` is relative to the largest number of the answer.

    `rounded`: how far rounding to the file's precision moves the answer; `changed` of `unet`
    tensors differ from the base's.
    """

    file: str
    step: int
    sha256: str
    size: int
    tensors: int
    unet: int
    changed: int
    error: float
    rounded: float


def model_path(out: Path, step: int, steps: int) -> Path:
    """Where the student of a step is written: the last one is the result."""
    return out / MODEL if step == steps else out / "models" / f"step{step:08d}.safetensors"


def parts_of(layout: Layout, config: Config) -> tuple[str, ...]:
    """The parts that a file holds: the UNet, and what of the others the config and the base say."""
    texts = layout.text_parts if config.save.text else ()
    vae = ("vae",) if config.save.vae and layout.vae else ()
    return ("unet", *texts, *vae)


def write_student(
    base: Checkpoint, layout: Layout, unet: Mapping[str, Tensor], path: Path, config: Config,
    objective: Objective, about: Mapping[str, str],
) -> str:  # fmt: skip
    """Stream a file of the parts wanted, each tensor in the base's precision; returns its sha256.

    Every tensor of the UNet comes from `unet`, one to one and one at a time; the others are the
    base's bytes.
    """
    wanted = parts_of(layout, config)
    part = {entry.key: entry.part for entry in keymap(layout)}
    made = in_file(unet, layout)
    keys = [key for key in strip(base.specs) if (part.get(key) or home_of(key, config)) in wanted]
    marks = marker_specs(objective.name)
    specs = {**marks, **{k: (base.specs[k].dtype, base.specs[k].shape) for k in keys}}
    header = {
        **base.metadata, **about, "recast.role": "checkpoint", COMPONENTS: ",".join(wanted),
        "recast.base_sha256": base.sha256(), "recast.distil": dump_toml(config),
    }  # fmt: skip

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from ((key, torch.zeros(shape)) for key, (_, shape) in marks.items())
        for key in keys:
            if key not in made:
                yield key, base[key]
                continue
            value = made[key].to(base.specs[key].torch_dtype).reshape(base.specs[key].shape)
            if not value.isfinite().all():
                raise CheckFailed(f"{key} leaves the range of {value.dtype}: train more gently")
            yield key, value

    path.parent.mkdir(parents=True, exist_ok=True)
    return write(path, specs, tensors(), stamp(header, objective.name), force=True)


def in_file(unet: Mapping[str, Tensor], layout: Layout) -> Mapping[str, Tensor]:
    """A UNet's tensors by the names of a file; raises CheckFailed unless there is one for each."""
    entries: dict[str, list[Entry]] = {}
    for entry in keymap(layout):
        if entry.part == "unet":
            entries.setdefault(entry.key, []).append(entry)
    named = {entry.param for group in entries.values() for entry in group}
    if odd := sorted(named ^ set(unet)):
        raise CheckFailed(f"the student and its file differ in {len(odd)} names, first {odd[0]}")

    def read(key: str) -> Tensor:
        ((_, tensor),) = to_file(tuple(entries[key]), {"unet": unet})
        return tensor

    return Lazy(tuple(entries), read)


def home_of(key: str, config: Config) -> str:
    """The part that a tensor which no network reads goes along with; a whole file carries all."""
    if key.startswith(VAE):
        return "vae"
    if key.startswith(ROOTS[2:]):
        return "te1"
    whole = config.save.text and config.save.vae
    return "unet" if whole or key.startswith(UNET) else ""


def checkpoint(pair: Pair, config: Config, out: Path, step: int, draw: Draw, digest: str) -> Proof:
    """Write the student of a step, prove the file, and note it as the last good one.

    Raises CheckFailed, and leaves what was good before, where the file is not the student.
    """
    path = model_path(out, step, config.run.steps)
    dense = pair.dense()
    model = pair.model
    told = {"recast.run": digest, "recast.step": str(step)}
    sha = write_student(model.checkpoint, model.layout, dense, path, config, pair.objective, told)
    proof = prove(pair, config, path, step, sha, dense, draw)
    write_json(out / GOOD, asdict(proof))
    return proof


def prove(
    pair: Pair, config: Config, path: Path, step: int, sha: str, dense: Mapping[str, Tensor],
    draw: Draw,
) -> Proof:  # fmt: skip
    """Open a file again and hold it against the student in memory."""
    base, layout = pair.model.checkpoint, pair.model.layout
    rows = slice(SAME_SEEN)
    given = (draw.x[rows].float(), draw.t[rows], draw.condition[rows])
    with Checkpoint(path) as file:
        if file.sha256() != sha:
            raise CheckFailed(f"{path} is not what was written (its hash differs): check the disk")
        changed, unet = differing(base, file, layout)
        if not changed:
            raise CheckFailed(
                f"{path}: all {unet} tensors of the UNet equal the base's, so nothing was learned "
                "or nothing was saved; raise optimizer.lr or run.steps"
            )
        there = answer_of(pair, unet_of(file, layout), given)
        tensors, size = len(file), file.nbytes
    exact, inside = answer_of(pair, dense, given), answer_of(pair, rounded(pair, dense), given)
    with torch.no_grad():
        living = pair.student.bind(given[2])(given[0], given[1]).float().cpu()
    scale = exact.abs().max().item()
    off, unlike = (
        (a - b).abs().max().item() / scale for a, b in ((there, inside), (exact, living))
    )
    apart = TOLERANCE if pair.learner is not pair.model else MERGED[pair.model.dtype]
    for error, limit in ((off, TOLERANCE), (unlike, apart)):
        if not error <= limit:
            raise CheckFailed(
                f"{path}: its answer is off the student's by {error:.1e}, more than {limit:.0e}; "
                "the file before it is kept"
            )
    return Proof(
        str(path.name), step, sha, size, tensors, unet, changed, off,
        (exact - inside).abs().max().item() / scale,
    )  # fmt: skip


def differing(base: Checkpoint, file: Checkpoint, layout: Layout) -> tuple[int, int]:
    """(tensors of the UNet whose bytes are not the base's, tensors of the UNet)."""
    keys = [*dict.fromkeys(e.key for e in keymap(layout) if e.part == "unet")]
    return sum(base.raw(key) != file.raw(key) for key in keys), len(keys)


def rounded(pair: Pair, dense: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The student as its file's precision has it."""
    base = pair.model.checkpoint
    kinds = {
        e.param: base.specs[e.key].torch_dtype
        for e in keymap(pair.model.layout)
        if e.part == "unet"
    }
    return Lazy(tuple(dense), lambda name: dense[name].to(kinds[name]).float())


@torch.no_grad()
def answer_of(pair: Pair, dense: Mapping[str, Tensor], given: tuple[Tensor, Tensor, Any]) -> Tensor:
    """What a UNet of these parameters, in fp32, answers to (x, t, condition); on the CPU.

    The network is gone again once it has answered: beside what is trained there is one at most.
    """
    from dataclasses import replace

    from recast.model.load import build, fill

    model = pair.model
    module = build(model.layout, "unet")
    fill(module, iter(dense.items()), torch.float32, model.device, "unet")
    module = module.to(model.device).eval().requires_grad_(False)
    painter = replace(model, parts={"unet": module}, dtype=torch.float32)
    x, t, condition = given
    return painter.net(condition, pair.objective)(x, t).float().cpu()


def good(out: Path) -> Mapping[str, object]:
    """The proof of the last good file; empty before the first."""
    return read_json(out / GOOD)


def prune(out: Path, keep: int) -> list[Path]:
    """Remove all but the `keep` newest files of steps, never the last good one; returns them.

    Only to be called once the newest is proven.
    """
    pinned = good(out).get("file")
    files = sorted((out / "models").glob("step*.safetensors"))
    doomed = [path for path in files[: max(0, len(files) - keep)] if path.name != pinned]
    for path in doomed:
        path.unlink()
    return doomed


def objective_in(path: Path) -> Objective:
    """What a written student predicts."""
    with Checkpoint(path) as file:
        return OBJECTIVES[file.metadata["recast.objective"]]
