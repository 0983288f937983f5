"""`python -m recast.pocket`: make the judge and the two pocket checkpoints, and measure them.

Resumable: the same command goes on at the first artefact that is missing.  Two hours on one core;
`eq-vae` alone tunes pocket-eq from the shipped pocket-xl, in six minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from recast.checkpoint import write_dict
from recast.pocket import (
    DATA,
    NAMES,
    equivariant,
    files,
    gate,
    path,
    pipeline,
    report,
    vae,
)  # fmt: skip
from recast.pocket.judge import Judge
from recast.pocket.stages import Workshop, load_into
from recast.pocket.teacher import TEACHERS, Teacher

Models = dict[str, Path]
EQ = "eq-vae"


def make_judge(shop: Workshop) -> tuple[Path, Judge]:
    """Train critic and judge, ship the judge; returns the critic's artefact and the judge."""
    critic = pipeline.train_judge(shop, "critic", pipeline.CRITIC)
    trained = pipeline.train_judge(shop, "judge", pipeline.JUDGE)
    weights = {key: value.half() for key, value in load_file(trained).items()}
    write_dict(DATA / "judge.safetensors", weights, force=True)
    reader = Judge()
    reader.load_state_dict({key: value.float() for key, value in weights.items()})
    return critic, reader.eval().requires_grad_(False)


def make_vae(shop: Workshop, critic: Path, reader: Judge) -> tuple[Path, Path, Path]:
    """Train the VAE up to its gate; returns the artefacts of decoder, ceiling and latents."""
    trained = pipeline.train_vae(shop, critic, reader)
    decoder = pipeline.train_decoder(shop, critic, trained)
    ceiling = pipeline.measure_vae(shop, decoder, reader)
    for side, figures in report.figures(ceiling).items():
        gate.check(f"the VAE on {side} combinations", figures, gate.VAE_GATE)
    return decoder, ceiling, pipeline.encode_world(shop, trained)


def teach(
    shop: Workshop, name: str, latents: Path, look: Callable[[Teacher], str], models: Models
) -> Path:
    """Train a teacher; pocket-15 takes its lesson from pocket-xl.  Returns the artefact."""
    lesson = None
    if name == "pocket-15":
        guide = models.get("pocket-xl") or teach(shop, "pocket-xl", latents, look, models)
        lesson = pipeline.Lesson(pipeline.prime(shop), guide)
    return pipeline.train_teacher(shop, name, latents, look, pipeline.RUNS[name], lesson)


def make_checkpoint(
    shop: Workshop, name: str, trained: Path, decoder: Path, latents: Path, reader: Judge
) -> Path:
    """Write a teacher's file and measure that; returns the measurement's artefact."""
    average = load_into(TEACHERS[name](), trained)
    ready = files.folded(load_into(vae.build(), decoder), load_file(latents), name)
    metadata = {"modelspec.title": name, "modelspec.prediction_type": "epsilon"}
    digest = files.write_checkpoint(path(name), name, average, ready, metadata)
    shop.say(f"{name}: sha256 {digest}")
    measured = pipeline.measure(shop, name, path(name), (trained, decoder), reader, pipeline.GATE)
    report.sheet(shop.folder / f"{name}.png", load_file(measured))
    for side, least in (("seen", gate.SEEN_GATE), ("held", gate.HELD_GATE)):
        figures = report.figures(measured)[side]
        shop.say(f"{name}: {side} {gate.text(figures)}")
        gate.check(f"{name} on {side} combinations", figures, least)
    return measured


def main() -> None:
    """Run the pipeline for the named checkpoints, by default both, and write the report."""
    parser = argparse.ArgumentParser(prog="python -m recast.pocket", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"of {', '.join(NAMES)}; both; {EQ} alone makes the second VAE from pocket-xl",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=Path("runs/pocket"), help="for artefacts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", type=Path, help="also write the measured table there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    shop = Workshop(options.work)
    if options.names == [EQ]:
        equivariant.make(shop)
        return
    critic, reader = make_judge(shop)
    decoder, ceiling, latents = make_vae(shop, critic, reader)
    look = pipeline.looks(load_into(vae.build(), decoder), latents, reader)
    models: Models = {}
    measured = {}
    for name in options.names or NAMES:
        models[name] = teach(shop, name, latents, look, models)
        measured[name] = make_checkpoint(shop, name, models[name], decoder, latents, reader)
    if options.report:
        options.report.write_text(report.table(ceiling, measured), encoding="utf-8")


if __name__ == "__main__":
    main()
