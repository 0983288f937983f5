"""The judge's figures, with a judge that reads answers off the pixels."""

import pytest
import torch

from recast.evaluate import concepts as module
from recast.evaluate.concepts import concepts, present, scenes

CAPTIONS = [
    "a big red star on dots at left",
    "a small blue moon on plain at top",
    "a big red circle on dots at left",
]


def test_prompts_of_the_world_are_scenes_and_others_are_not() -> None:
    found = scenes(CAPTIONS)
    assert found is not None
    assert len(found) == 3
    assert scenes(["a photo of a cat"]) is None


def test_present_means_every_word_was_in_some_caption() -> None:
    assert present(
        CAPTIONS, ["a big red star on plain at left", "a big red star on dots at top"]
    ) == [True, False, False]
    assert present(CAPTIONS, []) == [False] * 3


def test_shares_are_counted_on_their_own_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(pictures: torch.Tensor, batch: list) -> dict[str, float]:
        value = pictures[:, 0, 0, 0].mean().item()
        return {"shape": value, "all": value, "watermark": 0.25}

    monkeypatch.setattr(module, "agreement", fake)
    batch = scenes(CAPTIONS)
    assert batch is not None
    pictures = [torch.full((3, 64, 64), value) for value in (1.0, 0.0, 0.5)]
    found = concepts(pictures, batch, [True, False, True])
    assert (found.alignment, found.retention, found.leakage, found.right) == (0.75, 0.0, 0.25, 0.5)
    assert (found.seen, found.absent, found.attributes) == (2, 1, {"shape": 0.5})
    assert concepts(pictures, batch, [False] * 3).alignment is None
