"""Replay: the original paints pictures, and what it passes through are the training pairs.

Every step of the sampler asks the network at a state x_t, with the prompt and without. Both answers
are kept, in the well-conditioned form that any objective's target can be made from:

    x = (1 - t) x0 + t eps        u = eps - x0        (t: flow time of the state's noise level)
    x0 = x - t u                  eps = x + (1 - t) u

Time grids are jittered, so that a hundred pictures cover every noise level (docs/theory.md). A
shard holds a batch of pictures and is committed whole; the same command goes on at the first
missing one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from recast.checkpoint import Checkpoint, write_dict
from recast.commit import commit, lock, require_room, standing
from recast.errors import RecastError, Refused
from recast.events import Event, Note, Stage, Tick, amount

if TYPE_CHECKING:
    from torch import Tensor

    from recast.model import Model
    from recast.objective import Path as Levels
    from recast.text.encode import Condition

DIGEST_KEY = "recast.dream"
PLAN = "plan.json"  # beside the shards: the plan, the model's hash, and what that predicts
POSITIONS = 1024  # latent positions sampled at once: 16 pictures of 64 pixels, 1 of 1024
AHEAD = 32  # shards whose prompts are encoded before the first of them is dreamt


@dataclass(frozen=True)
class Plan:
    """What to dream of, and how; `jitter` in grid steps, `size` in pixels, None the model's own.

    last: keep the last state only, which is all that a picture's latents need.
    null: what is no prompt: empty (the negative), zero (zeroed conditioning) or both, then
    `zero_share` of the pictures have zeros.
    """

    prompts: tuple[str, ...]
    pictures: int = 100
    steps: int = 25
    guidance: float = 3.0
    jitter: float = 1.0
    seed: int = 0
    size: int | None = None
    objective: str = "flow"
    negative: str = field(default="", kw_only=True)
    null: str = field(default="empty", kw_only=True)
    zero_share: float = field(default=0.5, kw_only=True)
    solver: str = field(default="euler", kw_only=True)
    last: bool = field(default=False, kw_only=True)

    def digest(self, model_sha256: str) -> str:
        """Names the pairs: the plan and the model that dreamt."""
        text = json.dumps({"model": model_sha256, **asdict(self)}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def states(self) -> int:
        """How many states of each picture are kept."""
        return 1 if self.last else self.steps

    def nbytes(self, latent: tuple[int, int, int]) -> int:
        """What a picture takes on disk: x, u and u without prompt in half precision."""
        channels, height, width = latent
        return 6 * self.states * channels * height * width

    def zeroed(self, first: int, count: int) -> tuple[bool, ...]:
        """Which pictures have zeroed conditioning as what is no prompt."""
        import random

        share = {"empty": 0.0, "zero": 1.0, "both": self.zero_share}[self.null]
        places = range(first, first + count)
        return tuple(random.Random(f"{self.seed}/zero/{k}").random() < share for k in places)

    def order(self) -> list[str]:
        """A prompt for every picture: the list over and over, shuffled anew each time."""
        import random

        chosen: list[str] = []
        rounds = 0
        while len(chosen) < self.pictures:
            batch = list(self.prompts)
            random.Random(f"{self.seed}/{rounds}").shuffle(batch)
            chosen += batch
            rounds += 1
        return chosen[: self.pictures]


@dataclass(frozen=True)
class Shard:
    """A batch of pictures' states: x, u and u without prompt are (S, B, C, h, w), t is (S,).

    `zeroed` says of each picture whether u_null is the answer to zeroed conditioning.
    """

    prompts: tuple[str, ...]
    t: Tensor
    x: Tensor
    u: Tensor
    u_null: Tensor
    zeroed: tuple[bool, ...] = ()

    def latents(self, guidance: float) -> Tensor:
        """What the pictures ended as under the guidance they were dreamt with: x - t u."""
        u, u_null = self.u[-1].float(), self.u_null[-1].float()
        return self.x[-1].float() - self.t[-1] * (u_null + guidance * (u - u_null))


def dream(
    model: Model, folder: Path, plan: Plan, *, stopped: Callable[[], int] = lambda: 0
) -> Iterator[Event]:
    """Write the plan's shards into `folder`, those that are missing; yields progress.

    Raises Refused if the folder holds the dreams of another plan or model.
    """
    from recast.sample.solvers import find_solver

    find_solver(plan.solver)
    latent = model.latent_shape(_square(plan.size))
    batch = max(1, POSITIONS // (latent[1] * latent[2]))
    digest = plan.digest(model.checkpoint.sha256())
    prompts = plan.order()
    starts = list(range(0, plan.pictures, batch))
    have = sum(
        len(prompts[first : first + batch])
        for number, first in enumerate(starts)
        if _present(shard_path(folder, number), digest)
    )
    each = plan.nbytes(latent)
    require_room(standing(folder), each * (plan.pictures - have))
    with lock(folder):
        yield Note(
            f"Dreaming {plan.pictures} pictures; their pairs take {amount(each * plan.pictures)}"
            + (f" ({have} there already)." if have else ".")
        )
        _write_plan(model, folder / PLAN, plan)
        yield Stage("dream", plan.pictures, "pictures", 0)
        for group in range(0, len(starts), AHEAD):
            numbers = range(group, min(group + AHEAD, len(starts)))
            missing = [k for k in numbers if not _present(shard_path(folder, k), digest)]
            texts = {k: prompts[starts[k] : starts[k] + batch] for k in missing}
            made = _dreamt(model, plan, {starts[k]: texts[k] for k in missing})
            for number in numbers:
                if number in texts:
                    if stopped():
                        return
                    _write(next(made), shard_path(folder, number), digest)
                yield Tick(min(starts[number] + batch, plan.pictures))


def _dreamt(model: Model, plan: Plan, batches: Mapping[int, Sequence[str]]) -> Iterator[Shard]:
    """A shard of each batch of prompts, which are named by their first picture.

    All are encoded before any is dreamt: text encoders and UNet may take turns on the device.
    """
    asked = {first: _asked(model, plan, texts) for first, texts in batches.items()}
    for first, texts in batches.items():
        yield _dream_batch(model, plan, texts, asked[first], first)


def _asked(model: Model, plan: Plan, texts: Sequence[str]) -> Condition:
    """Conditions of a batch's prompts, then as many of no prompt."""
    import torch

    with torch.no_grad():
        return model.condition([*texts, *[plan.negative] * len(texts)], size=_square(plan.size))


def _write_plan(model: Model, path: Path, plan: Plan) -> None:
    said = {"model": model.checkpoint.sha256(), "source": model.objective.name, **asdict(plan)}
    text = json.dumps(said, indent=1, ensure_ascii=False).encode()
    commit(path, lambda file: file.write(text), size=len(text), force=True)


def _write(shard: Shard, path: Path, digest: str) -> None:
    prompts = json.dumps(list(shard.prompts), ensure_ascii=False)
    write_dict(
        path,
        {"t": shard.t, "u": shard.u, "u_null": shard.u_null, "x": shard.x},
        {DIGEST_KEY: digest, "recast.prompts": prompts},
        force=True,
    )


def _dream_batch(
    model: Model, plan: Plan, texts: Sequence[str], condition: Condition, first: int
) -> Shard:
    """Sample one batch along a jittered grid and keep what the network was asked and said."""
    import torch

    from recast.objective import FLOW, OBJECTIVES, express, levels
    from recast.sample.images import sample_latents

    objective = OBJECTIVES[plan.objective]
    size = _square(plan.size)
    shape = model.latent_shape(size)
    noise = [
        torch.Generator().manual_seed((plan.seed << 32) + first + k) for k in range(len(texts))
    ]
    eps = torch.stack([torch.randn(shape, generator=each) for each in noise])
    times = jittered(plan, objective.path, first)
    zeroed = plan.zeroed(first, len(texts))
    if any(zeroed):
        rows = torch.tensor([False] * len(texts) + list(zeroed), device=condition.context.device)
        condition = condition.zeros().where(rows, condition)
    net = express(model.net(condition), model.objective, objective)
    kept: list[tuple[Tensor, ...]] = []
    start = eps.to(model.device)
    run = sample_latents(
        net, objective, start, times, scale=plan.guidance, solver=plan.solver, paired=True,
        generator=noise,
    )  # fmt: skip
    for step in run:
        met = step.met[0]
        alpha, sigma = levels(objective.path, met.t, met.x)
        pairs = [one[1] - one[0] for one in (met.positive, met.negative) if one is not None]
        flow_time = FLOW.path.time(alpha.flatten(), sigma.flatten())
        kept.append(
            (flow_time[0].cpu(), (met.x / (alpha + sigma)).cpu(), *(u.cpu() for u in pairs))
        )
    kept = kept[-plan.states :]
    t, x, u, u_null = (torch.stack(column) for column in zip(*kept, strict=True))
    half = torch.float16
    return Shard(tuple(texts), t.float(), x.to(half), u.to(half), u_null.to(half), zeroed)


def jittered(plan: Plan, path: Levels, first: int) -> Tensor:
    """The sampling grid with every inner time moved within its neighbourhood; ends stay."""
    import torch

    from recast.timesteps import grid

    times = grid(path, plan.steps)
    generator = torch.Generator().manual_seed((plan.seed << 32) + (1 << 31) + first)
    gaps = torch.minimum(times[:-2] - times[1:-1], times[1:-1] - times[2:])
    moves = torch.rand(len(gaps), generator=generator, dtype=torch.float64) - 0.5
    times[1:-1] += 0.98 * plan.jitter * moves * gaps
    return times


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:05d}.safetensors"


def read_shards(folder: Path, plan: Plan, model_sha256: str) -> list[Shard]:
    """Every shard of a finished dream, in memory.

    Raises Refused if one is missing or of another plan.
    """
    found: list[Shard] = []
    count = 0
    for path, texts in shards(folder, plan, model_sha256):
        found.append(read_shard(path, plan.zeroed(count, len(texts))))
        count += len(texts)
    return found


def read_shard(path: Path, zeroed: tuple[bool, ...] = ()) -> Shard:
    """One shard, in memory."""
    with Checkpoint(path) as file:
        texts = tuple(json.loads(file.metadata["recast.prompts"]))
        t, x, u, u_null = (file[key] for key in ("t", "x", "u", "u_null"))
    return Shard(texts, t, x, u, u_null, zeroed)


def shards(folder: Path, plan: Plan, model_sha256: str) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Every shard of a finished dream by its header: the file, and the prompts of its pictures.

    Raises Refused as `read_shards` does.
    """
    digest = plan.digest(model_sha256)
    number = count = 0
    while count < plan.pictures:
        path = shard_path(folder, number)
        if not _present(path, digest):
            raise Refused(f"{path} is missing or of another plan: run recast dream again.")
        with Checkpoint(path) as file:
            texts = tuple(json.loads(file.metadata["recast.prompts"]))
        yield path, texts
        number, count = number + 1, count + len(texts)


def _present(path: Path, digest: str) -> bool:
    """Whether a shard is there and whole; a shard of another plan is refused, not overwritten."""
    if not path.exists():
        return False
    try:
        with Checkpoint(path) as file:
            theirs = file.metadata.get(DIGEST_KEY)
    except RecastError:
        return False
    if theirs != digest:
        raise Refused(
            f"{path} was dreamt by another model or plan: give another folder, or remove this one."
        )
    return True


def _square(size: int | None) -> tuple[int, int] | None:
    return None if size is None else (size, size)
