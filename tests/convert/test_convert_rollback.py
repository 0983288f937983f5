"""Runs that fall ill, run out of time or of disk, and what is computed how: on a tiny UNet."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.convert.test_convert_training import Memory, recipe
from tests.faults import Faults
from torch import Tensor

from recast.adapter import Adapter, attach
from recast.adapter.decompose import decompose, zeros_full
from recast.convert import course, running, training
from recast.convert.running import check, recompute
from recast.convert.training import learn, loss_of, student
from recast.errors import NoRoom, NotFinite, Refused, Stopped
from recast.events import Event, Note, Stage
from recast.model import Model, open_model
from recast.objective import OBJECTIVES
from recast.recipe import Recipe, override
from recast.train import Seen, latest

torch.set_num_threads(1)
NEVER: Callable[[], int] = lambda: 0  # noqa: E731


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return open_model(home / "sdxl.safetensors", parts=("unet",), objective="eps")


@pytest.fixture(scope="module")
def half(home: Path) -> Model:
    return open_model(
        home / "sdxl.safetensors", parts=("unet",), objective="eps", dtype=torch.float16
    )


def how(steps: int = 6, **train: object) -> Recipe:
    return recipe(train={"steps": steps, "profile": "OUT08", "checkpoint_every": 2, **train})


def run(
    model: Model,
    wanted: Recipe,
    root: Path,
    stopped: Callable[[], int] = NEVER,
    told: list[Event] | None = None,
) -> dict[str, Tensor]:
    """Train to the end, or go on doing so; the trained numbers by name."""
    sites = model.layout.sites(wanted.train.places)
    rank = wanted.train.rank
    start = (
        decompose(model.checkpoint, sites, rank) if rank else zeros_full(model.checkpoint, sites)
    )
    attached = attach({"unet": model.unet}, start, sites)
    objective = OBJECTIVES[wanted.target.objective]
    root.mkdir(parents=True, exist_ok=True)
    material = Memory(wanted, objective)
    events = learn(model, attached, material, wanted, objective, root, "run", stopped)
    try:
        return tensors(followed(events, told))
    finally:
        attached.detach()


def followed(events: Iterator[Event], told: list[Event] | None) -> Adapter:
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return end.value
        if told is not None:
            told.append(event)


def tensors(found: Adapter) -> dict[str, Tensor]:
    return {
        f"{name}.{field}": value
        for name, entry in found.entries.items()
        for field, value in vars(entry).items()
        if isinstance(value, Tensor)
    }


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def lines(root: Path) -> list[dict]:
    """The log without what a clock says."""
    found = [json.loads(line) for line in (root / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "pace"} for line in found]


class Ill:
    """A loss that is NaN where `when(call)` says so; calls are counted from 1."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool]) -> None:
        self.when, self.calls = when, 0
        monkeypatch.setattr(training, "loss_of", self.loss_of)

    def loss_of(self, *given: object, **options: object) -> Callable:
        measure = loss_of(*given, **options)

        def answer(net: object, draw: object) -> Seen:
            self.calls += 1
            seen = measure(net, draw)
            sick = self.when(self.calls)
            return Seen(seen.distance, seen.weighted * torch.nan) if sick else seen

        return answer


def test_an_ill_run_goes_back_and_on_at_half_the_rate(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 3 to 5 are bad once: back to step 2, then to the end, with no line twice."""
    wanted = how(schedule="constant")
    Ill(monkeypatch, lambda call: call in (3, 4, 5))
    told: list[Event] = []
    run(model, wanted, tmp_path, told=told)
    log = lines(tmp_path)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["lr"] for line in log] == [1e-3] * 2 + [0.5e-3] * 4
    assert log[2]["rolled_back"]["to"] == 2
    assert "step 5" in log[2]["rolled_back"]["why"]
    assert [line.get("factor") for line in log] == [None, None, 0.5, 0.5, 0.5, 0.5]
    assert [e.done for e in told if isinstance(e, Stage)] == [0, 2]
    notes = [e.text for e in told if isinstance(e, Note)]
    assert any("going back to step 2 at half the rate" in note for note in notes)
    assert sum("is skipped" in note for note in notes) == 2
    assert notes[0] == "The network computes in float32, fp32 is trained, attention is sdpa."


def test_before_any_state_it_goes_back_to_the_beginning(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = how(3, schedule="constant")
    Ill(monkeypatch, lambda call: call <= 3)
    mended = run(model, wanted, tmp_path / "ill")
    assert [line["step"] for line in lines(tmp_path / "ill")] == [1, 2, 3]
    board = EventAccumulator(str(tmp_path / "ill" / "tb")).Reload()
    assert [event.step for event in board.Scalars("loss/current")] == [1, 2, 3]
    monkeypatch.undo()
    low = run(model, override(wanted, lr=0.5e-3), tmp_path / "low")
    assert same(mended, low)


def test_killed_after_going_back_it_ends_with_the_same_bytes(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps after the return are lost, the state of step 2 knows nothing of it."""
    wanted = how()
    sick = {3, 4, 5}
    ill = Ill(monkeypatch, lambda call: call in sick)
    whole = run(model, wanted, tmp_path / "whole")
    ill.calls = 0
    asked: list[int] = []

    def kill() -> int:
        asked.append(1)
        if len(asked) == 5:  # steps 1 to 4, then 3 again
            raise KeyboardInterrupt
        return 0

    with pytest.raises(KeyboardInterrupt):
        run(model, wanted, tmp_path / "killed", kill)
    assert latest(tmp_path / "killed" / "state").step == 2
    ill.calls = 2  # the same draws make the same steps ill
    assert same(run(model, wanted, tmp_path / "killed"), whole)
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


def test_ill_for_good_it_stops_in_a_sentence_with_the_last_state(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ill(monkeypatch, lambda call: call > 2)
    with pytest.raises(NotFinite, match=r"step 5: .* on at 0\.5 of train\.lr; .* give another"):
        run(model, how(), tmp_path / "one")
    assert latest(tmp_path / "one" / "state").step == 2
    monkeypatch.undo()
    Ill(monkeypatch, lambda call: call > 2)
    with pytest.raises(NotFinite, match=r"the 3\. step in a row that is not finite; lower"):
        run(model, how(rollbacks=0), tmp_path / "none")


def test_a_disk_that_fills_up_costs_the_steps_since_the_last_state(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(model, how(), tmp_path / "whole")
    saved: list[int] = []
    kept = course.save

    def save(*given: object, step: int, **options: object) -> object:
        saved.append(step)
        if step < 4:
            return kept(*given, step=step, **options)
        full = Faults(3, errno.ENOSPC)
        with monkeypatch.context() as patch:
            patch.setattr("recast.commit.os", full)
            patch.setattr("recast.disk.os", full)
            return kept(*given, step=step, **options)

    monkeypatch.setattr(course, "save", save)
    with pytest.raises(NoRoom):
        run(model, how(), tmp_path / "full")
    monkeypatch.undo()
    assert saved == [2, 4]
    assert latest(tmp_path / "full" / "state").step == 2
    assert same(run(model, how(), tmp_path / "full"), whole)
    assert lines(tmp_path / "full") == lines(tmp_path / "whole")


def test_minutes_end_a_run_and_interruptions_do_not_count(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = how(9, max_minutes=4.5)
    minute = iter(range(0, 10_000, 60))
    monkeypatch.setattr(course, "monotonic", lambda: float(next(minute)))
    calls = iter([0, 2])
    with pytest.raises(Stopped):
        run(model, wanted, tmp_path, lambda: next(calls))
    run(model, wanted, tmp_path)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5]
    assert latest(tmp_path / "state").step == 5
    run(model, wanted, tmp_path)  # nothing is left to do
    assert len(lines(tmp_path)) == 5
    run(model, how(9, max_minutes=4.5, min_steps=7), tmp_path / "more")
    assert len(lines(tmp_path / "more")) == 7


HOW: dict[str, dict[str, object]] = {
    "saveus": {"optimizer": "saveus", "lr": 1e-3, "schedule": "cosine", "cycles": 0.375},
    "bf16 masters": {"masters": "bf16"},
    "bf16 prodigyplus": {"masters": "bf16", "optimizer": "prodigyplus", "lr": 1.0},
    "recompute": {"recompute": True, "ema": 0.9, "accumulate": 2},
}


@pytest.mark.parametrize("name", HOW)
def test_stopped_and_resumed_it_is_the_same_to_the_bit(
    name: str, model: Model, tmp_path: Path
) -> None:
    wanted = how(4, **HOW[name])
    whole = run(model, wanted, tmp_path / "whole")
    assert any(value.any() for value in whole.values())
    for _ in range(3):
        with pytest.raises(Stopped):
            run(model, wanted, tmp_path / "broken", lambda: 2)
    assert same(run(model, wanted, tmp_path / "broken"), whole)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")


def test_fp16_scales_its_loss_and_resumes_with_the_scale(half: Model, tmp_path: Path) -> None:
    wanted = how(4)
    whole = run(half, wanted, tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(Stopped):
            run(half, wanted, tmp_path / "broken", lambda: 2)
    assert same(run(half, wanted, tmp_path / "broken"), whole)
    log = lines(tmp_path / "broken")
    assert log == lines(tmp_path / "whole")
    assert log[0]["scale"] == 65536.0


def test_recomputing_keeps_less_and_changes_nothing(model: Model, tmp_path: Path) -> None:
    plain, again = (how(1, profile="unet", recompute=value) for value in (False, True))
    assert same(run(model, plain, tmp_path / "one"), run(model, again, tmp_path / "two"))
    sites = model.layout.sites("unet")
    attached = attach({"unet": model.unet}, zeros_full(model.checkpoint, sites), sites)
    objective = OBJECTIVES["flow"]
    draw = next(Memory(plain, objective).draws(0))
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept[-1] += tensor.numel()
        return tensor

    try:
        for change in (lambda: None, lambda: recompute(model.unet)):
            change()
            kept.append(0)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                student(model, objective)(draw)
    finally:
        running.forgo(model.unet)
        attached.detach()
    assert kept[1] < 0.5 * kept[0]


def test_a_layout_of_weights_changes_no_answer(model: Model) -> None:
    """Forward alone: see `running.check`."""
    draw = next(Memory(how(), OBJECTIVES["flow"]).draws(0))
    weight = model.unet.get_submodule("conv_in").weight
    with torch.no_grad():
        before = student(model, OBJECTIVES["flow"])(draw)
        running.lay_out(model.unet, torch.channels_last)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        after = student(model, OBJECTIVES["flow"])(draw)
    running.lay_out(model.unet, torch.contiguous_format)
    assert weight.is_contiguous()
    assert torch.allclose(before, after, atol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "BACKEND", "eager")
    plain = run(model, how(2), tmp_path / "plain")
    compiled = run(model, how(2, compile=True), tmp_path / "compiled")
    for name, value in plain.items():
        assert torch.allclose(value, compiled[name], atol=2e-4), name
    assert all(block._compiled_call_impl is None for block in running.blocks(model.unet))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Refused, match="layers trained whole"):
        check(how(masters="bf16", rank=4), "cpu")
    with pytest.raises(Refused, match=r"train\.ema"):
        check(how(masters="bf16", ema=0.9), "cpu")
    with pytest.raises(Refused, match="channels_last is a layout for GPUs"):
        check(how(channels_last=True), "cpu")
    monkeypatch.setattr(running, "BACKEND", "no such compiler")
    with pytest.raises(Refused, match=r"torch\.compile does not run on cpu"):
        check(how(compile=True), "cpu")
    check(how(), "cpu")
