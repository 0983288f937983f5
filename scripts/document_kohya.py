"""Writes docs/kohya.md from the importer's table: scripts/document_kohya.py > docs/kohya.md"""

from __future__ import annotations

from collections.abc import Iterator

INTRODUCTION = """# Commands of kohya's sd-scripts

Written by `python scripts/document_kohya.py > docs/kohya.md` from the table that `recast kohya`
itself uses; a test keeps it true.

```
recast kohya -- accelerate launch sdxl_train_network.py --pretrained_model_name_or_path=… …
recast kohya --file train.bat                          # from a file: .bat, .sh, .ps1, .txt
recast kohya --file train.bat --save-recipe mine.toml  # train nothing, leave the recipe
recast train model.safetensors photos --recipe mine.toml --out runs/mine
```

Commands of `sdxl_train_network.py` and `train_network.py` are read. Line ends `^`, `\\` and
`` ` ``, quotes, Windows paths and variables that the file itself sets are understood.
`--config_file` is read, and its values hold where the command line is silent. Before it trains it
says what became of every flag: a key of the recipe, or nothing and why. A flag that cannot be
honoured ends it, in one sentence, before anything is written.

What no flag says is as in sd-scripts, not as in Recast's own recipes: batch 1, AdamW with weight
decay 0.01, {steps} steps, no caption dropout, no buckets, times drawn evenly, loss `l2`. Four
things are better than there and have no flag: what is trained is always fp32; the target follows
the model's own objective unless a flag says otherwise; captions are read from `.txt` as well as
`.caption`; the same command resumes.

`--model`, `--images` and `--out` stand in for the paths of a command from another machine.
`--size N` stands in for `--resolution` and takes the limits of the buckets along in proportion
(their steps stay multiples of 8): a command for SDXL's 1024 pixels runs on `pocket-xl` with
`--size 64`.

In the tables `MODEL`, `IMAGES` and `OUT` are the arguments of `recast train`; names with
a dot are keys of a recipe ([training.md](training.md)). A flag may be shortened as argparse
allows.
"""


def pages() -> Iterator[str]:
    """The page, piece by piece."""
    from recast.kohya.flags import SECTIONS
    from recast.kohya.turns import STEPS

    yield INTRODUCTION.replace("{steps}", str(STEPS))
    for title, rows in SECTIONS.items():
        yield f"## {title}\n\n| flag | becomes | |\n|---|---|---|"
        dashes = "" if title.startswith("Arguments") else "--"
        for row in rows:
            yield f"| `{dashes}{row.name}` | {row.turn.says} | {row.remark} |"
        yield ""


if __name__ == "__main__":
    print("\n".join(pages()))
