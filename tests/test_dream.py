"""Dreams: what a sampler passes through, kept so that any objective's targets can be made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.convert import small

from recast import grammar
from recast.convert.selfmade import finished
from recast.dream import Plan, dream, jittered, read_shards, shard_path
from recast.errors import Refused
from recast.events import Note, amount
from recast.model import Model, open_model
from recast.objective import EPS, FLOW, V_ZSNR, express, retime
from recast.sample.images import sample_latents
from recast.text.tokens import LENGTH, encode
from recast.timesteps import grid
from recast.wishes import captions_of, from_grammar, prompts_for

PLAN = Plan(prompts=small.PROMPTS, pictures=3, steps=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = small.checkpoint(tmp_path_factory.mktemp("dream"), "sdxl")
    return open_model(path, parts=("unet", "te1", "te2"))


@pytest.fixture(scope="module")
def dreamt(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    for _ in dream(model, folder, PLAN):
        pass
    return folder


@pytest.mark.parametrize("objective", [FLOW, V_ZSNR])
def test_grids_are_jittered_between_fixed_ends(objective: object) -> None:
    path = objective.path  # type: ignore[attr-defined]
    plain = grid(path, 25)
    moved = [jittered(replace(PLAN, steps=25), path, first) for first in (0, 1)]
    assert not torch.equal(*moved)
    for times in moved:
        assert (times[0], times[-1]) == (plain[0], plain[-1])
        assert (times.diff() < 0).all()
    assert torch.equal(jittered(replace(PLAN, steps=25, jitter=0.0), path, 0), plain)


def test_the_order_takes_every_prompt_before_any_twice() -> None:
    order = replace(PLAN, pictures=7).order()
    assert sorted(order[:3]) == sorted(order[3:6]) == sorted(small.PROMPTS)
    assert order == replace(PLAN, pictures=7).order()
    assert order != replace(PLAN, pictures=7, seed=1).order()
    assert replace(PLAN, pictures=2).order() == order[:2]


def test_a_pair_is_what_the_original_says_of_its_state(model: Model, dreamt: Path) -> None:
    """u of a state is the velocity of the original's own answer there, in half precision."""
    (shard,) = read_shards(dreamt, PLAN, model.checkpoint.sha256())
    assert shard.x.shape == shard.u.shape == shard.u_null.shape == (4, 3, 4, 8, 8)
    net = express(model.net(model.condition([shard.prompts[1]])), EPS, FLOW)
    null = express(model.net(model.condition([""])), EPS, FLOW)
    reach = retime(torch.tensor(1.0), EPS.path, FLOW.path)
    for step in range(4):
        x, t = shard.x[step, 1:2].float(), shard.t[step]
        if t < reach:
            for answer, kept in ((net, shard.u), (null, shard.u_null)):
                with torch.no_grad():
                    said = answer(x, t)
                torch.testing.assert_close(kept[step, 1:2].float(), said, rtol=0.05, atol=0.05)


def test_dreams_go_on_at_the_first_missing_shard(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import recast.dream

    monkeypatch.setattr(recast.dream, "POSITIONS", 64)  # a picture a shard
    calls = 0

    def stopped() -> int:
        nonlocal calls
        calls += 1
        return calls > 2

    for _ in dream(model, tmp_path, PLAN, stopped=stopped):
        pass
    assert shard_path(tmp_path, 1).exists()
    assert not shard_path(tmp_path, 2).exists()
    with pytest.raises(Refused, match="missing"):
        read_shards(tmp_path, PLAN, model.checkpoint.sha256())
    first = shard_path(tmp_path, 0).read_bytes()
    shard_path(tmp_path, 1).write_bytes(b"damaged")
    (said,) = [event.text for event in dream(model, tmp_path, PLAN) if isinstance(event, Note)]
    assert "(1 there already)" in said
    assert shard_path(tmp_path, 0).read_bytes() == first
    shards = read_shards(tmp_path, PLAN, model.checkpoint.sha256())
    assert [text for shard in shards for text in shard.prompts] == PLAN.order()
    shard_path(tmp_path, 0).unlink()
    for _ in dream(model, tmp_path, PLAN):
        pass
    assert shard_path(tmp_path, 0).read_bytes() == first


@pytest.mark.parametrize("solver", ["heun", "dpmpp_2m", "euler_ancestral"])
def test_a_picture_s_last_state_alone_gives_its_latents(
    solver: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the solver, the sample is the guided x0 of the last state; a picture one state."""
    samples = []

    def watched(*given: object, **how: object) -> object:
        for step in sample_latents(*given, **how):  # type: ignore[arg-type]
            yield step
        samples.append(step.x)

    monkeypatch.setattr("recast.sample.images.sample_latents", watched)
    plan = replace(PLAN, solver=solver, last=True)
    said = [event for event in dream(model, tmp_path, plan) if isinstance(event, Note)]
    (shard,) = read_shards(tmp_path, plan, model.checkpoint.sha256())
    assert shard.x.shape == (1, 3, 4, 8, 8)
    torch.testing.assert_close(finished([shard], plan).x0, samples[0], atol=0.02, rtol=0.01)
    taken, predicted = shard_path(tmp_path, 0).stat().st_size, 3 * plan.nbytes((4, 8, 8))
    assert predicted < taken < predicted + 1000  # the header
    assert amount(predicted) in said[0].text


def test_dreams_of_another_plan_are_refused(model: Model, dreamt: Path) -> None:
    with pytest.raises(Refused, match="another"):
        list(dream(model, dreamt, replace(PLAN, seed=1)))
    with pytest.raises(Refused, match="another"):
        read_shards(dreamt, PLAN, "0" * 64)


def test_prompts_come_from_the_user_the_world_or_the_list(model: Model, tmp_path: Path) -> None:
    assert prompts_for(small.prompts(tmp_path), model.checkpoint) == small.PROMPTS
    shipped = prompts_for(None, model.checkpoint)
    assert len(shipped) == len(set(shipped)) >= 400
    assert all(len(encode(text)) <= LENGTH - 2 for text in shipped)
    assert sum(text.count(", ") > 4 for text in shipped) > 30
    assert sum(len(text.split()) < 4 for text in shipped) > 5
    whole = from_grammar(7, model.checkpoint, seed=1, level=2)
    assert whole == grammar.prompts(7, 1, 2)
    assert from_grammar(7, model.checkpoint, seed=1, level=2, shard=(3, 3)) == whole[2::3]
    with pytest.raises(Refused, match="shard 8 of 9 of 7 prompts is empty"):
        from_grammar(7, model.checkpoint, shard=(8, 9))
    captions = small.images(tmp_path / "images", 5)
    assert captions_of(captions) == small.PROMPTS
    for file in captions.glob("*.txt"):
        file.unlink()
    with pytest.raises(Refused, match="no picture has a caption"):
        captions_of(captions)
    world = small.checkpoint(tmp_path, "sd15", **{"recast.world": "pocket"})
    from recast.checkpoint import Checkpoint
    from recast.pocket.world import is_held, parse

    with Checkpoint(world) as file:
        captions, some = prompts_for(None, file), from_grammar(9, file, seed=1)
        assert some == from_grammar(20, file, seed=1)[:9] != from_grammar(9, file, seed=2)
        assert from_grammar(9, file, seed=1, shard=(2, 4)) == some[1::4]
    assert captions
    assert set(some) < set(captions)
    assert not any(is_held(parse(text)) for text in captions)
