"""Recipes: presets, overlays, refusals that name the nearest key, exact round trips."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recast import recipe as recipes
from recast.errors import Refused
from recast.recipe import differences, dump_toml, load, override, presets

SOURCE = Path(__file__).parents[1] / "src"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def permitted(section: str, key: str) -> set[str]:
    """The names a Literal field lists, also inside a union."""
    found: set[Any] = set()
    for part in get_args(recipes.SECTIONS[section][key].annotation):
        found |= set(get_args(part)) if get_args(part) else {part}
    return {name for name in found if isinstance(name, str)}


@pytest.mark.parametrize("name", presets())
def test_presets_load_and_survive_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    again = load(write(tmp_path, dump_toml(recipe)))
    assert again == recipe
    assert again.digest() == recipe.digest()


def test_default_is_the_readout_and_the_reference_is_the_published_run() -> None:
    default, reference = load(), load("flow-dadaptlion")
    assert (default.train.profile, default.target.teacher, default.train.lr) == (
        "readout",
        "teacher",
        1e-3,
    )
    assert (reference.train.profile, reference.train.rank, reference.train.shift) == (
        "principal",
        16,
        2.5,
    )
    assert reference.train.optimizer_args == {"betas": [0.9, 0.99], "d0": 1e-5, "weight_decay": 0.0}
    assert reference.data.caption_dropout == 0.1
    same = default.data.model_copy(update={"caption_dropout": 0.1})
    assert reference.data == same


def test_a_recipe_names_only_what_differs(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, "[train]\nsteps = 7\n"))
    assert differences(recipe, load()) == ("train.steps",)
    assert recipe.digest() != load().digest()
    assert recipe.digest("data") == load().digest("data")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nstpes = 3", "'train.stpes'; the nearest is 'train.steps'"),
        ("[trian]\nsteps = 3", "'trian'; the nearest is 'train'"),
        (
            "[train]\ntimes = 'unifrom'",
            "train.times is 'unifrom'; permitted are 'uniform', 'stratified'",
        ),
        (
            "[train]\noptimizer = 'adam'\nlr = 1.0",
            "train.optimizer is 'adam'; permitted are 'adamw'",
        ),
        ("[train]\nsteps = -3", "train.steps is -3; it should be greater than or equal to 1"),
        ("[train]\nsteps = '3'", "train.steps is '3'; it should be a valid integer"),
        ("[train]\nsteps = true", "train.steps is True"),
        ("[train]\nlr = nan", "train.lr is nan; it should be a finite number"),
        (
            "[train]\noptimizer_args = {betas = ['x']}",
            "train.optimizer_args.betas is ['x']; permitted are",
        ),
        ("[train]\noptimizer = 'dadaptlion'", "so give train.lr too"),
        ("train = 3", "train is 3"),
        ('[data]\nimages = "a\\u0000b"', "data.images is"),
        ("[train]\nprofile = '../x'", "train.profile is '../x'"),
        ("[train]\nrates = {OUT08 = 0}", "train.rates is 0; it should be greater than 0"),
        ("[noise]\nofset = 1.0", "'noise.ofset'; the nearest is 'noise.offset'"),
        ("[train]\nhuber_c = 0.0", "train.huber_c is 0.0; it should be greater than 0"),
        ("[train", "not valid TOML"),
        ("x = " + "[" * 3000, "not valid TOML"),
    ],
)
def test_mistakes_are_named(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        load(write(tmp_path, text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the nearest is 'flow-dadaptlion'"):
        load("flow-dadaptlio")
    with pytest.raises(Refused, match="No such file"):
        load(tmp_path / "none.toml")
    with pytest.raises(Refused, match="cannot be read"):
        load(tmp_path / "a\x00b.toml")
    (tmp_path / "latin.toml").write_bytes(b"about = '\xff'")
    with pytest.raises(Refused, match="not UTF-8"):
        load(tmp_path / "latin.toml")
    with pytest.raises(Refused, match="too large"):
        load(write(tmp_path, "#" * 70_000))


def test_override_changes_single_keys_and_checks_them() -> None:
    recipe = override(
        load(), train={"steps": 5, "seed": None}, objective="v", rank=None, pictures=3
    )
    assert (recipe.train.steps, recipe.train.seed, recipe.target.objective) == (5, 0, "v")
    assert differences(recipe, load()) == ("data.pictures", "target.objective", "train.steps")
    assert differences(override(load(), steps=5), load()) == ("train.steps",)
    with pytest.raises(Refused, match=r"flags: target\.objective is 'vee'"):
        override(load(), target={"objective": "vee"})


def test_another_optimizer_does_not_inherit_arguments(tmp_path: Path) -> None:
    recipe = load(write(tmp_path, "[train]\noptimizer = 'lion'\nlr = 1e-4\n"))
    assert recipe.train.optimizer_args == {}


@given(st.text(max_size=20).filter(lambda key: key not in recipes.SECTIONS["train"]))
@settings(max_examples=50, deadline=None)
def test_any_unknown_key_is_one_sentence(key: str) -> None:
    with pytest.raises(Refused) as caught:
        override(load(), train={key: 1})
    assert "\n" not in str(caught.value)


@given(
    st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False),
    st.text(
        st.characters(min_codepoint=32, exclude_characters="\x7f", exclude_categories=["Cs"]),
        max_size=30,
    ),
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
        st.integers(-9, 9),
        max_size=3,
    ),
)
@settings(max_examples=50, deadline=None)
def test_round_trip_of_any_value(lr: float, text: str, arguments: dict[str, int]) -> None:
    recipe = override(load(), train={"lr": lr, "optimizer_args": arguments}, data={"images": text})
    assert recipes._checked("again", recipes._parse("again", dump_toml(recipe))) == recipe


def test_names_are_those_of_the_tables() -> None:
    from recast.objective import OBJECTIVES
    from recast.optim import OPTIMIZERS
    from recast.timesteps import TIMES
    from recast.train.loss import DISTANCES, HUBERS
    from recast.train.schedules import SCHEDULES
    from recast.weighting import WEIGHTINGS

    assert permitted("target", "objective") == {*OBJECTIVES, "same"}
    assert permitted("train", "optimizer") >= set(OPTIMIZERS)
    train = {
        "times": [*TIMES, "loss-aware"],
        "distance": DISTANCES,
        "huber_schedule": HUBERS,
        "schedule": SCHEDULES,
        "weighting": [*WEIGHTINGS, "edm2"],
    }
    for key, table in train.items():
        assert permitted("train", key) == set(table), key


def test_recipes_need_no_torch() -> None:
    code = "import sys, recast.recipe as r; r.load(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": "src"})


@pytest.mark.parametrize("value", [0, 1, 0.25, [[0, 0.5]], [[0, 0], [0.5, 1.0], [1, 0.25]]])
def test_a_curve_is_a_number_or_points(value: object, tmp_path: Path) -> None:
    recipe = override(load(), target={"mix": value}, train={"curve": value})
    assert recipe.target.mix == recipe.train.curve == value
    assert load(write(tmp_path, dump_toml(recipe))) == recipe


@pytest.mark.parametrize(
    "value",
    [2, -1, True, "0.5", [], [0, 1], [[0.5, 1], [0.2, 1]], [[0, 1, 2]], [[0, 1.5]], [[-0.1, 1]]],
)
def test_other_curves_are_refused_in_one_sentence(value: object) -> None:
    with pytest.raises(Refused, match=r"target\.mix is .*; it should be a number from 0 to 1, or"):
        override(load(), target={"mix": value})


def test_rates_survive_a_round_trip(tmp_path: Path) -> None:
    recipe = override(load(), rates={"readout,time": 0.5, "OUT08": 2})
    assert load(write(tmp_path, dump_toml(recipe))) == recipe
    assert "train.rates.OUT08" in differences(recipe, load())


def test_places_are_all_that_is_ever_trained() -> None:
    assert load().train.places == "readout"
    assert override(load(), widen="time,IN01").train.places == "readout,time,IN01"


def test_the_same_recipe_is_the_same_text_in_every_process() -> None:
    code = "from recast.recipe import dump_toml, load; print(dump_toml(load()))"
    texts = {
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(SOURCE)},
        ).stdout
        for seed in range(5)
    }  # fmt: skip
    assert len(texts) == 1
