"""The grammar of prompts: five levels, any number, each a pure function of seed and place."""

from __future__ import annotations

import random

import pytest

from recast.errors import Refused
from recast.grammar import Scene, Thing, prompts, scene, scenes


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    assert prompts(40, seed=3)[:15] == prompts(15, seed=3)
    assert prompts(40, seed=3) != prompts(40, seed=4)
    assert len(set(prompts(500))) > 400


def test_levels_come_in_turn_and_add_to_one_another() -> None:
    made = [found for found, _ in scenes(200)]
    assert [found.level for found in made[:6]] == [1, 2, 3, 4, 5, 1]
    for found in made:
        assert len(found.others) == {1: 0, 2: 0, 3: 1, 4: 1, 5: 2}[found.level]
        assert bool(found.thing.adjectives) == (found.level > 1)
        assert bool(found.place and found.light) == (found.level > 3)
        assert bool(found.style and found.view) == (found.level > 4)
    assert {found.level for found, _ in scenes(9, level=4)} == {4}
    with pytest.raises(Refused, match="1 to 5"):
        scene(6, random.Random(0))


def test_a_scene_is_said_in_words_or_in_tags() -> None:
    fox = Thing("animal", "fox", ("old",), "with bright eyes")
    boxes = Thing("plant", "rose", ("red",), count=3)
    found = Scene(
        5, fox, (("behind", boxes),), "in a forest clearing", "at dusk", "an etching of", "close-up"
    )
    assert found.text() == (
        "an etching of an old fox with bright eyes behind three red roses, in a forest clearing, "
        "at dusk, close-up"
    )
    assert found.text("tags") == (
        "fox, old, bright eyes, 3 roses, red, forest clearing, dusk, close-up, etching"
    )


def test_every_tag_list_names_what_its_sentence_names() -> None:
    tagged = 0
    for found, prompt in scenes(300):
        if prompt == found.text("tags") != found.text():
            tagged += 1
            assert found.thing.adjectives[0] in prompt
    assert 20 < tagged < 90


@pytest.mark.parametrize("level", [0, 4])
def test_shards_are_the_whole_each_prompt_once(level: int) -> None:
    whole = prompts(23, seed=5, level=level)
    parts = [prompts(23, seed=5, level=level, shard=(i, 4)) for i in (1, 2, 3, 4)]
    assert [len(part) for part in parts] == [6, 6, 6, 5]
    dealt: list[str] = [""] * 23
    for i, part in enumerate(parts):
        dealt[i::4] = part
    assert tuple(dealt) == whole
    assert prompts(2, shard=(3, 4)) == ()


@pytest.mark.parametrize("shard", [(0, 4), (5, 4), (1, 0)])
def test_a_shard_that_there_is_not_is_refused(shard: tuple[int, int]) -> None:
    with pytest.raises(Refused, match="no shard"):
        prompts(5, shard=shard)


def test_the_command_line_names_a_shard() -> None:
    from recast.cli_dream import part_of

    assert part_of("3/8") == (3, 8)
    for wrong in ("3", "3/", "-1/4", "a/b"):
        with pytest.raises(Refused, match="i/n"):
            part_of(wrong)
