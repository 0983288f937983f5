"""What to dream of: the user's prompts, the list that ships, captions of pictures, the grammar.

The pocket checkpoints know the sentences of their own world and no others, so where the list or
the grammar would be taken they get those; what they never saw is left out, to be asked for
afterwards.
"""

from __future__ import annotations

import random
from importlib.resources import files
from pathlib import Path

from recast import grammar
from recast.checkpoint import Checkpoint
from recast.errors import Refused

CAPTIONS, GRAMMAR = "captions", "grammar"  # what data.prompts may say instead of a file's name


def prompts_for(file: Path | None, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The prompts of a file, else the list that ships, or the pocket world's captions."""
    from recast.sample.prompts import parse_prompts, read_prompts

    if file is not None:
        return tuple(prompt.text for prompt in read_prompts(file))
    if in_pocket(checkpoint):
        return pocket_world()
    text = (files("recast") / "prompts" / "real.txt").read_text(encoding="utf-8")
    return tuple(prompt.text for prompt in parse_prompts(text.splitlines(), "real.txt"))


def captions_of(folder: Path) -> tuple[str, ...]:
    """The captions of a folder's pictures, each once, as they come.

    Raises Refused where none has one.
    """
    from recast.data.gather import gather

    found = gather(folder, headers=False).examples
    captions = tuple(dict.fromkeys(example.caption for example in found if example.caption))
    if not captions:
        raise Refused(f"{folder}: no picture has a caption to dream of; write .txt files beside.")
    return captions


def from_grammar(
    count: int,
    checkpoint: Checkpoint,
    *,
    seed: int = 0,
    level: int = 0,
    shard: grammar.Shard = (1, 1),
) -> tuple[str, ...]:
    """That many prompts put together at random, a longer list beginning with the shorter.

    level 1 to 5 says how much is in each, 0 takes the five in turn; the pocket world has one.
    Of a shard (i, n) every n-th of them from the i-th on. Raises Refused where that is none.
    """
    which, of = grammar.checked(shard)
    if which > count:
        raise Refused(f"shard {which} of {of} of {count} prompts is empty: ask for {of} at least.")
    if in_pocket(checkpoint):
        whole = random.Random(f"{seed}/world").choices(pocket_world(), k=count)
        return tuple(whole[which - 1 :: of])
    return grammar.prompts(count, seed, level, shard)


def in_pocket(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint knows the pocket world only."""
    return checkpoint.metadata.get("recast.world") == "pocket"


def pocket_world() -> tuple[str, ...]:
    """Every caption of the pocket world that its checkpoints were trained on."""
    from recast.pocket.world import caption, scenes

    return tuple(caption(scene) for scene in scenes(held=False))
