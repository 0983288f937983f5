"""What recipe keys do to training: which layers move and how far, and one trunk for two."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.convert import small

from recast.adapter import Adapter, Attached, attach, entry_name
from recast.adapter.decompose import decompose, zeros_full
from recast.convert import Job, training, trunk
from recast.convert.course import Course
from recast.convert.groups import check
from recast.convert.material import Material
from recast.convert.noising import dealt, draw
from recast.convert.training import learn, student, target_of
from recast.errors import Refused
from recast.lowrank import Full
from recast.model import Model, open_model
from recast.objective import OBJECTIVES, Objective
from recast.recipe import Recipe, load, override
from recast.text.encode import Condition
from recast.train import Aware, Draw, seeded

torch.set_num_threads(1)
ROWS = 2


def conditions(count: int, *counters: int | str) -> Condition:
    gen = seeded(*counters)
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(count, 1)
    context = torch.randn(count, 77, 80, generator=gen)
    return Condition(context, torch.randn(count, 40, generator=gen), sizes)


@dataclass(frozen=True)
class Memory:
    """Random latents; what `Images` does without files."""

    recipe: Recipe
    objective: Objective
    bridge: None = None

    def draws(self, done: int, aware: Aware | None = None) -> Iterator[Draw]:
        how = self.recipe.train
        for step in range(done, how.limit):
            for micro, (t, weight) in enumerate(dealt(self.recipe, step, aware)):
                number = step * how.accumulate + micro
                x0 = torch.randn(how.batch, 4, 8, 8, generator=seeded("x0", number))
                yield draw(
                    self.recipe, self.objective, number, x0, t, weight,
                    conditions(how.batch, "condition", number), torch.arange(how.batch),
                )  # fmt: skip

    def null(self) -> Condition:
        return replace(conditions(1, "null"), time_ids=None)


@pytest.fixture(scope="module")
def model(home: Path) -> Model:
    return open_model(home / "sdxl.safetensors", parts=("unet",), objective="eps")


def recipe(to: str = "flow", **sections: dict[str, object]) -> Recipe:
    short = {"steps": 2, "batch": ROWS, "checkpoint_every": 2, "clip": 0.0}
    chosen = {**sections, "train": {**short, **sections.get("train", {})}}
    return override(load(), objective=to, **chosen)


def trained(model: Model, how: Recipe, root: Path) -> Adapter:
    """What two steps of a recipe make of the model."""
    sites = model.layout.sites(how.train.places)
    rank = how.train.rank
    start = (
        decompose(model.checkpoint, sites, rank) if rank else zeros_full(model.checkpoint, sites)
    )
    attached = attach({"unet": model.unet}, start, sites)
    objective = OBJECTIVES[how.target.objective]
    root.mkdir(parents=True, exist_ok=True)
    events = learn(model, attached, Memory(how, objective), how, objective, root, "run", lambda: 0)
    try:
        while True:
            next(events)
    except StopIteration as end:
        return end.value
    finally:
        attached.detach()


def moved(found: Adapter) -> dict[str, float]:
    """The largest change of each full entry."""
    return {k: v.delta.abs().max().item() for k, v in found.entries.items() if isinstance(v, Full)}


@pytest.mark.parametrize(
    ("profile", "blocks"),
    [
        ("OUT08", {"OUT08"}),
        ("readout", {"OUT06", "OUT07", "OUT08", "OUT"}),
        ("readout,time", {"OUT06", "OUT07", "OUT08", "OUT", "TIME"}),
        ("readout,IN01", {"OUT06", "OUT07", "OUT08", "OUT", "IN01"}),
        ("OUT02,OUT08", {"OUT02", "OUT08"}),
        ("unet", None),
    ],
)
def test_every_parameter_of_a_profile_is_trained_and_no_other(
    profile: str, blocks: set[str] | None, model: Model, tmp_path: Path
) -> None:
    found = moved(trained(model, recipe(train={"profile": profile}), tmp_path))
    wanted = {
        entry_name(site)
        for site in model.layout.sites("unet")
        if blocks is None or site.block in blocks
    }
    assert found.keys() == wanted
    kinds = {s.kind for s in model.layout.sites("unet") if entry_name(s) in wanted}
    assert {"norm", "conv"} <= kinds
    assert any(name.endswith("bias") for name in wanted)
    still = [name for name, far in found.items() if far == 0]
    assert still == []


def test_principal_factors_everywhere_are_trained(model: Model, tmp_path: Path) -> None:
    how = recipe(train={"profile": "principal", "rank": 2})
    found = trained(model, how, tmp_path)
    start = decompose(model.checkpoint, model.layout.sites("principal"), 2)
    assert found.entries.keys() == start.entries.keys()
    for name, entry in found.entries.items():
        assert not torch.equal(entry.up, start.entries[name].up), name


def test_layers_have_their_rates_and_join_late(model: Model, tmp_path: Path) -> None:
    """Adam's first step is as long as its rate in every coordinate."""
    rates = {"readout": 0.5, "OUT08": 2.0}
    how = recipe(
        train={
            "rates": rates, "widen": "time", "widen_at": 0.5, "widen_rate": 0.1, "lr": 1e-3,
            "schedule": "constant", "profile": "readout,IN01",
        }
    )  # fmt: skip
    block = {entry_name(site): site.block for site in model.layout.sites("unet")}
    lengths = {"IN01": 1.0, "OUT06": 0.5, "OUT07": 0.5, "OUT": 0.5, "OUT08": 2.0, "TIME": 0.1}

    def far(recipe: Recipe, folder: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, change in moved(trained(model, recipe, tmp_path / folder)).items():
            found[block[name]] = max(found.get(block[name], 0.0), change / 1e-3)
        return found

    one = far(override(how, steps=1, widen_at=1.0), "one")
    assert one == pytest.approx({**lengths, "TIME": 0.0}, rel=1e-3)
    two = far(how, "two")
    assert two.pop("TIME") == pytest.approx(0.1, rel=1e-3)  # the late layer's first step
    assert all(1.2 * one[name] < length <= 2.01 * one[name] for name, length in two.items())


def test_a_rate_for_what_is_not_trained_is_refused(model: Model) -> None:
    with pytest.raises(Refused, match="'IN01', which 'readout' does not train"):
        check(model.layout, recipe(train={"rates": {"IN01": 2.0}}))
    with pytest.raises(Refused, match="no profile and no block"):
        check(model.layout, recipe(train={"rates": {"OUT99": 2.0}}))
    with pytest.raises(Refused, match="one rate for all layers"):
        check(model.layout, recipe(train={"optimizer": "prodigy", "lr": 1.0, "widen": "time"}))
    check(model.layout, recipe(train={"rates": {"OUT": 2.0}, "widen": "time"}))


class Passes:
    """Counts the passes of the first layer."""

    def __init__(self, model: Model) -> None:
        self.count = 0
        self.hook = model.unet.get_submodule("conv_in").register_forward_hook(self.add)

    def add(self, *_: object) -> None:
        self.count += 1


@pytest.mark.parametrize(
    ("to", "profile", "guided", "passes"),
    [
        ("v", "readout", 1.0, 1),
        ("v", "OUT08", 3.0, 2),
        ("v", "readout,time", 1.0, 2),
        ("v", "OUT02,OUT08", 1.0, 2),
        ("v-zsnr", "readout", 1.0, 2),
        ("flow", "readout", 1.0, 2),
    ],
)
def test_the_trunk_runs_once_where_teacher_and_student_share_it(
    to: str,
    profile: str,
    guided: float,
    passes: int,
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = recipe(to, train={"profile": profile}, target={"guided": guided})
    counted = Passes(model)
    try:
        one = trained(model, how, tmp_path / "one")
        assert counted.count == 2 * passes
        monkeypatch.setattr(training, "shared", lambda *_: None)
        two = trained(model, how, tmp_path / "two")
    finally:
        counted.hook.remove()
    for name, entry in one.entries.items():
        assert torch.equal(entry.delta, two.entries[name].delta), name


def test_only_the_readout_keeps_activations(model: Model) -> None:
    """The frozen trunk builds no graph: what autograd saves is what it saves of the last block."""
    sites = model.layout.sites("readout")
    attached = attach({"unet": model.unet}, zeros_full(model.checkpoint, sites), sites)
    how = recipe("v")
    (d, *_) = Memory(how, OBJECTIVES["v"]).draws(0)
    saved: list[list[int]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[-1].append(tensor.numel())
        return tensor

    try:
        shared = trunk.shared(model.unet, attached, model.objective, OBJECTIVES["v"])
        target_of(how, model, attached, OBJECTIVES["v"], conditions(1), shared)(d)
        for using in (None, shared):
            saved.append([])
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                answer = student(model, OBJECTIVES["v"], using)(d)
            assert answer.requires_grad
        deep = model.unet.get_submodule("mid_block")
        outs: list[torch.Tensor] = []
        hook = deep.register_forward_hook(lambda module, given, out: outs.append(out))
        student(model, OBJECTIVES["v"])(d)
        hook.remove()
    finally:
        attached.detach()
    assert saved[0] == saved[1] != []
    assert not outs[0].requires_grad


@pytest.mark.parametrize(
    "key",
    [
        {"train": {"distance": "huber", "huber_schedule": "snr", "huber_c": 0.3}},
        {"train": {"distance": "fft", "fft_phase": 0.0, "fft_bands": [2.0, 1.0]}},
        {"train": {"weighting": "min-snr", "gamma": 1.0}},
        {"train": {"weighting": "p2", "p2_k": 2.0, "p2_gamma": 0.5}},
        {"train": {"curve": [[0.0, 1.0], [1.0, 3.0]]}},
        {"train": {"times": "stratified-logit-normal", "mean": 1.0}},
        {"train": {"shift": 2.0, "shift_side": 32}},
        {"noise": {"multires": 3}},
        {"noise": {"offset": 0.5}},
        {"noise": {"perturbation": 0.5}},
        {"noise": {"pairing": "optimal"}, "train": {"batch": 4}},
        {"target": {"teacher": "mix", "mix": [[0.0, 0.2], [1.0, 1.0]]}},
        {"target": {"above": "both"}, "train": {"shift": 20.0}},
        {"target": {"guided": 4.0}},
        {"target": {"control": True}, "train": {"shift": 20.0}},
    ],
    ids=str,
)
def test_every_key_reaches_the_loss(
    key: dict[str, dict[str, object]], model: Model, tmp_path: Path
) -> None:
    """The first step's loss is another one than without the key."""
    how = recipe(**key)
    plain = recipe(train={"batch": how.train.batch})
    if "target" in key:
        plain = recipe(train=dict(key.get("train", {})))
    losses = []
    for each in (how, plain):
        sites = model.layout.sites("OUT")
        attached = attach({"unet": model.unet}, zeros_full(model.checkpoint, sites), sites)
        try:
            objective = OBJECTIVES["flow"]
            material = Memory(each, objective)
            target = target_of(each, model, attached, objective, material.null())
            measure = training.loss_of(each, target, objective)
            with torch.no_grad():
                seen = measure(student(model, objective), next(material.draws(0)))
            losses.append(seen.weighted)
        finally:
            attached.detach()
    assert torch.isfinite(losses[0]).all()
    assert not torch.allclose(losses[0], losses[1], rtol=1e-3)


@pytest.mark.parametrize("family", ["sdxl", "sd15"])
@pytest.mark.parametrize("null", ["empty", "zero"])
def test_a_guided_teacher_leans_on_what_the_model_makes_of_no_prompt(
    family: str, null: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = override(small.recipe(home, steps=1), guided=2.0, data={"null": null})
    met: list[Material] = []

    def steps_of(course: Course, model: Model, attached: Attached, material: Material, to: object):
        met.append(material)
        return kept(course, model, attached, material, to)

    kept = training.steps_of
    monkeypatch.setattr(training, "steps_of", steps_of)
    file, images = home / f"{family}.safetensors", home / "images"
    small.convert(Job(file, tmp_path / "out", how, images=images, measure=False))
    wanted = open_model(file, objective="eps").condition([""])
    found = met[0].null()
    for name in ("context", "pooled"):
        mine, theirs = getattr(found, name), getattr(wanted, name)
        if theirs is None:
            assert mine is None
        else:
            assert torch.allclose(mine, theirs if null == "empty" else 0 * theirs, atol=1e-5)
