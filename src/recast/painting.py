"""Pictures as files: an order of prompts in, PNG files that carry their own parameters out."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from recast.commit import commit
from recast.errors import Refused
from recast.events import Event, Stage, Tick

if TYPE_CHECKING:
    from recast.model import Model
    from recast.sample.images import Picture
    from recast.sample.prompts import Prompt


@dataclass(frozen=True)
class Order:
    """What to paint; a line of the prompts file overrides what stands here."""

    prompts: tuple[str, ...] = ()
    file: Path | None = None
    negative: str = ""
    seed: int = 0
    steps: int = 25
    sampler: str = "euler"
    scale: float = 3.0
    shift: float = 1.0
    objective: str | None = None
    size: str | None = None

    def lines(self) -> list[Prompt]:
        """The prompts given and those of the file, in this order.

        Raises Refused for unknown samplers, objectives, sizes and shifts, here or on a line.
        """
        from recast.objective import OBJECTIVES
        from recast.sample.prompts import Prompt, read_prompts
        from recast.sample.solvers import find_solver

        found = [Prompt(text) for text in self.prompts]
        found += read_prompts(self.file) if self.file else []
        if not found:
            raise Refused("there is nothing to paint: give --prompt TEXT or --prompts FILE.")
        if self.objective is not None and self.objective not in OBJECTIVES:
            raise Refused(
                f"no objective {self.objective!r}: --as takes one of {', '.join(OBJECTIVES)}."
            )
        pixels(self.size)
        for number, prompt in enumerate(found, 1):
            find_solver(prompt.solver or self.sampler)
            shift = self.shift if prompt.shift is None else prompt.shift
            steps = self.steps if prompt.steps is None else prompt.steps
            sides = prompt.size or (8, 8)
            if not shift > 0 or steps < 1 or min(sides) < 8 or any(side % 8 for side in sides):
                raise Refused(
                    f"prompt {number}: shift {shift:g}, {steps} steps, {sides[1]}x{sides[0]} "
                    "pixels: give a shift above 0, 1 step or more, sides that are multiples of 8."
                )
        return found

    def paths(self, out: Path, *, force: bool) -> list[Path]:
        """A file for every picture; raises Refused where one exists, or `out` is no folder."""
        if out.exists() and not out.is_dir():
            raise Refused(f"--out {out} is a file: name a folder.")
        found = [out / f"{i:05d}-{slug(each.text)}.png" for i, each in enumerate(self.lines())]
        if taken := [path for path in found if path.exists() and not force]:
            raise Refused(f"{taken[0]} exists: give another --out, or --force to replace it.")
        return found


def paint(
    model: Model, out: Path, order: Order, written: list[Path], *, force: bool
) -> Iterator[Event]:
    """Paint the order into `out`, one PNG a prompt, appending their paths to `written`.

    Raises Refused, before any picture is made, as `Order.lines` and `Order.paths` do.
    """
    from recast.objective import OBJECTIVES
    from recast.sample.images import sample_prompts

    prompts, paths = order.lines(), order.paths(out, force=force)
    yield Stage("sample", len(prompts), "pictures")
    pictures = sample_prompts(
        model, prompts, seed=order.seed, negative=order.negative, steps=order.steps,
        solver=order.sampler, scale=order.scale, shift=order.shift, size=pixels(order.size),
        as_objective=OBJECTIVES[order.objective] if order.objective else None,
    )  # fmt: skip
    for picture in pictures:
        save(paths[picture.index], picture, order, force=force)
        written.append(paths[picture.index])
        yield Tick(len(written))


def save(path: Path, picture: Picture, order: Order, *, force: bool) -> None:
    """Write one picture; its parameters travel in the PNG as the A1111 family writes them."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(
        "parameters",
        f"{picture.prompt}\nNegative prompt: {order.negative}\nSteps: {order.steps}, Sampler: "
        f"{order.sampler}, CFG scale: {order.scale:g}, Seed: {picture.seed}, "
        f"Shift: {order.shift:g}, Version: recast",
    )
    data = png(picture.image, info)
    commit(path, lambda file: file.write(data), size=len(data), force=force)


def png(image: object, info: object = None) -> bytes:
    """A picture (3, H, W) in [-1, 1] as the bytes of a PNG file."""
    import torch
    from PIL import Image

    assert isinstance(image, torch.Tensor)
    levels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels.permute(1, 2, 0).cpu().numpy()).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def pixels(size: str | None) -> tuple[int, int] | None:
    """ "1024" or "832x1216" (width x height) as (height, width).

    Raises Refused for anything else, and for sides that are no multiple of 8.
    """
    if size is None:
        return None
    found = re.fullmatch(r"(\d{2,5})(?:x(\d{2,5}))?", size.strip().lower())
    if found is None:
        raise Refused(f"--size {size!r} is no size: give pixels such as 1024, or 832x1216.")
    width, height = int(found[1]), int(found[2] or found[1])
    if width % 8 or height % 8:
        raise Refused(f"--size {size}: both sides must be multiples of 8.")
    return height, width


def slug(text: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:48] or "empty"
