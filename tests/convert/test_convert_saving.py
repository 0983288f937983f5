"""Which adapters stay as files on the way."""

from pathlib import Path

import pytest

from recast.convert import saving
from recast.recipe import load, override


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep_last": 3}, [6, 7, 8]),
        ({"keep_last": 2, "keep_every": 3}, [3, 6, 7, 8]),
        ({"keep_last": 9}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"keep_every": 4}, [1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_the_newest_and_every_so_many_stay(
    rule: dict[str, int], kept: list[int], tmp_path: Path
) -> None:
    recipe = override(load(), save={"every": 1, **rule})
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "mine.safetensors").touch()
    for step in range(1, 9):
        saving.path_of(tmp_path, step).touch()
        saving.thin(tmp_path, recipe)
    found = sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert found == ["mine.safetensors", *(saving.path_of(tmp_path, k).name for k in kept)]


def test_files_are_due_every_so_many_steps() -> None:
    recipe = override(load(), save={"every": 3})
    assert [step for step in range(1, 10) if saving.due(recipe, step)] == [3, 6, 9]
    assert not any(saving.due(load(), step) for step in range(1, 10))
