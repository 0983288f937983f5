"""The table of sd-scripts' flags: of the training scripts, and of `accelerate launch` before them.

docs/kohya.md is written from it, so what the page says is what the importer does.
"""

from __future__ import annotations

from recast.kohya.flag import Flag
from recast.kohya.flags_data import DATA
from recast.kohya.flags_model import FORKS, LOSS, MODEL, NETWORK
from recast.kohya.flags_run import RUN
from recast.kohya.flags_train import LAUNCHED, TRAIN
from recast.kohya.network import NETWORK_ARGS

SCRIPTS = ("sdxl_train_network.py", "train_network.py")
SECTIONS = {
    "Model": MODEL,
    "Network": NETWORK,
    "Arguments of `--network_args`": NETWORK_ARGS,
    "Images, captions, caches": DATA,
    "Optimizer, rates, steps, precision, machines": TRAIN,
    "Objective, loss, noise": LOSS,
    "Flow matching and other VAEs, in forks of sd-scripts": FORKS,
    "Saving, previews, validation, logs": RUN,
    "Of `accelerate launch`, before the script": LAUNCHED,
}


def table(*rows: tuple[Flag, ...]) -> dict[str, Flag]:
    return {row.name: row for group in rows for row in group}


FLAGS = table(MODEL, NETWORK, DATA, TRAIN, LOSS, FORKS, RUN)
LAUNCH = table(LAUNCHED)
