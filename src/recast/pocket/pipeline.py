"""The pocket pipeline: judges, VAE, gate, latents, teachers, gates, files (see stages.py).

Every function is one stage: it returns the path of its artefact and does nothing if that exists.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from recast.pocket import gate, primer, teacher, vae
from recast.pocket.files import read_checkpoint
from recast.pocket.judge import HEADS, Judge, agreement, examples, fit, judge
from recast.pocket.primer import PrimerRun
from recast.pocket.stages import Tensors, Workshop, load_into
from recast.pocket.teacher import SCALES, TEACHERS, Teacher, TeacherRun
from recast.pocket.vae import VaeRun
from recast.pocket.world import Scene, caption, render, scenes, to_bytes

Made = tuple[Tensors, dict[str, str]]
Decode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class JudgeRun:
    seed: int
    steps: int
    batch: int = 64


@dataclass(frozen=True)
class LatentsRun:
    seed: int
    renders: int


@dataclass(frozen=True)
class GateRun:
    seed: int
    count: int = gate.COUNT
    guidance: float = 3.0
    chunk: int = 80


@dataclass(frozen=True)
class Lesson:
    """How pocket-15 learns: with a primed text encoder, frozen, and from the finished pocket-xl."""

    text: Path
    guide: Path

    def begin(self, net: Teacher) -> Teacher:
        """Give the net its text encoder; returns the guide, frozen."""
        load_into(net.text, self.text).requires_grad_(False)
        return load_into(TEACHERS["pocket-xl"](), self.guide).eval().requires_grad_(False)


CRITIC = JudgeRun(seed=11, steps=600)
JUDGE = JudgeRun(seed=1, steps=1500)
VAE = VaeRun(seed=2, steps=6500, rate=2e-3)
DECODER = VaeRun(seed=3, steps=1700, rate=8e-4)
LATENTS = LatentsRun(seed=4, renders=5)
PRIMER = PrimerRun(seed=11, steps=500)
RUNS = {
    "pocket-xl": TeacherRun(seed=5, steps=6500),
    "pocket-15": TeacherRun(seed=6, steps=2400, average=0.998),
}
GATE = GateRun(seed=7)
GLANCE = GateRun(seed=8, count=64)


def train_judge(shop: Workshop, name: str, run: JudgeRun) -> Path:
    """Train a judge and measure it on fresh, softened pictures."""

    def make() -> Made:
        torch.manual_seed(run.seed)
        net = Judge()
        for _ in shop.follow(name, fit(net, run.seed, run.steps, run.batch), run.steps):
            pass
        net.eval()
        pictures, truth = examples(2000, torch.Generator().manual_seed(run.seed + 1000))
        answers = judge(pictures, net)
        hits = {head: (answers[head] == truth[head]).float().mean() for head in HEADS}
        return net.state_dict(), {head: f"{share:.4f}" for head, share in hits.items()}

    return shop.stage(name, run, (), make)


def train_vae(shop: Workshop, critic: Path, reader: Judge, run: VaeRun = VAE) -> Path:
    """Train the VAE on all combinations, with a look every 1,000 steps."""

    def make() -> Made:
        torch.manual_seed(run.seed)
        net, eye = vae.build(), load_into(Judge(), critic).requires_grad_(False)
        for step in shop.follow("vae", vae.fit(net, eye, run), run.steps):
            if step % 1000 == 0:
                figures, _ = vae.ceiling(net, gate.sample(False, 160, 5), 5, reader=reader)
                shop.say(f"vae: {gate.text(figures)}")
                save_file(net.state_dict(), shop.folder / "vae-snapshot.safetensors")
        return net.state_dict(), {}

    return shop.stage("vae", run, (critic,), make)


def train_decoder(shop: Workshop, critic: Path, trained: Path, run: VaeRun = DECODER) -> Path:
    """Train the decoder on from there, its encoder frozen."""

    def make() -> Made:
        net, eye = load_into(vae.build(), trained), load_into(Judge(), critic).requires_grad_(False)
        for _ in shop.follow("decoder", vae.fit_decoder(net, eye, run), run.steps):
            pass
        return net.state_dict(), {}

    return shop.stage("decoder", run, (critic, trained), make)


def encode_world(shop: Workshop, trained: Path, run: LatentsRun = LATENTS) -> Path:
    """Encode unmarked pictures of every trained combination and whiten them."""

    def make() -> Made:
        net, generator = load_into(vae.build(), trained), torch.Generator().manual_seed(run.seed)
        pool = scenes(held=False)
        z = torch.cat([vae.encode(net, render(pool, generator)) for _ in range(run.renders)])
        mean, matrix = vae.whitening(z)
        white = vae.whiten(z, mean, matrix)
        return {"latents": white, "mean": mean, "matrix": matrix}, {}

    return shop.stage("latents", run, (trained,), make)


def paint(net: Teacher, decode: Decode, batch: list[Scene], run: GateRun) -> Tensor:
    """Return pictures sampled for these scenes, (B, 3, 64, 64)."""
    words = [caption(scene) for scene in batch]
    starts = range(0, len(words), run.chunk)
    parts = (words[start : start + run.chunk] for start in starts)
    return torch.cat(
        [
            decode(teacher.ddim(net, part, 1000 * run.seed + start, run.guidance))
            for start, part in zip(starts, parts, strict=True)
        ]
    )


def prime(shop: Workshop, run: PrimerRun = PRIMER) -> Path:
    """Train pocket-15's text encoder to say the five words of a caption."""

    def make() -> Made:
        torch.manual_seed(run.seed - 1)
        net = TEACHERS["pocket-15"]()
        for _ in shop.follow("primer", primer.fit(net.text, run), run.steps):
            pass
        return net.text.state_dict(), {}

    return shop.stage("primer", run, (), make)


def train_teacher(
    shop: Workshop,
    name: str,
    latents: Path,
    look: Callable[[Teacher], str],
    run: TeacherRun,
    lesson: Lesson | None = None,
) -> Path:
    """Train one teacher, with a look every 1,000 steps; the artefact holds the averaged weights."""

    def make() -> Made:
        torch.manual_seed(run.seed)
        net = TEACHERS[name]()
        guide = lesson.begin(net) if lesson else None
        average, world = teacher.shadow(net), load_file(latents)["latents"]
        words = [caption(scene) for scene in scenes(held=False)]
        words *= len(world) // len(words)
        losses = teacher.fit(net, average, world, words, run, guide)
        for step in shop.follow(name, losses, run.steps):
            if step % 1000 == 0:
                save_file(average.state_dict(), shop.folder / f"{name}-snapshot.safetensors")
                shop.say(f"{name}: {look(average)}")
        return average.state_dict(), {}

    parents = (latents, lesson.text, lesson.guide) if lesson else (latents,)
    return shop.stage(name, run, parents, make)


def looks(autoencoder: AutoencoderKL, latents: Path, reader: Judge) -> Callable[[Teacher], str]:
    """Return the glance taken at a teacher in training: 64 seen and 64 held scenes."""
    world = load_file(latents)

    def decode(white: Tensor) -> Tensor:
        return vae.decode(autoencoder, vae.colour_again(white, world["mean"], world["matrix"]))

    def look(net: Teacher) -> str:
        told = []
        for held in (False, True):
            batch = gate.sample(held, GLANCE.count, GLANCE.seed)
            figures = agreement(paint(net, decode, batch, GLANCE), batch, reader)
            told.append(f"{'held' if held else 'seen'} {gate.text(figures)}")
        return "; ".join(told)

    return look


def measure_vae(shop: Workshop, decoder: Path, reader: Judge, run: GateRun = GATE) -> Path:
    """Measure the ceiling: drawn pictures through the VAE, seen and held, unmarked and marked."""

    def make() -> Made:
        net, figures = load_into(vae.build(), decoder), {}
        for held in (False, True):
            batch = gate.sample(held, run.count, run.seed)
            clean, _ = vae.ceiling(net, batch, run.seed, reader=reader)
            marked, _ = vae.ceiling(net, batch, run.seed, watermark=True, reader=reader)
            side = "held" if held else "seen"
            figures[side] = json.dumps(clean | {"marked": marked["watermark"]})
        return {}, figures

    return shop.stage("ceiling", run, (decoder,), make)


def measure(
    shop: Workshop, name: str, file: Path, parents: tuple[Path, ...], reader: Judge, run: GateRun
) -> Path:
    """Measure a written file's pictures; the artefact keeps 64 of them, seen and held."""

    def make() -> Made:
        net, autoencoder = read_checkpoint(file, name)
        kept, figures = {}, {}
        for held in (False, True):
            side, batch = "held" if held else "seen", gate.sample(held, run.count, run.seed)
            pictures = paint(
                net, lambda white: vae.decode(autoencoder, white / SCALES[name]), batch, run
            )
            figures[side] = json.dumps(agreement(pictures, batch, reader))
            kept[side] = to_bytes(pictures[:64])
        return kept, figures

    return shop.stage(f"{name}-measured", run, parents, make)
