"""Which saved states a run in doubt may lose: never the last that was known to be good."""

import shutil
from pathlib import Path

from recast.train.state import NAME


def newer(root: Path, step: int) -> list[Path]:
    """Saved states below `root` of later steps, whole or not, oldest first."""
    found = [(m, path) for path in root.glob("step*") if (m := NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda f: f[1].name) if int(match[1]) > step]


def keep(root: Path, good: int, least: int = 2) -> int:
    """How many states `save` must keep for the newest one up to step `good` to be among them."""
    return max(least, len(newer(root, good)) + 2)


def forget(root: Path, good: int) -> None:
    """Remove the states of steps after `good`, newest first; each is whole or gone."""
    for path in reversed(newer(root, good)):
        doomed = path.with_name(f".removed-{path.name}")
        if doomed.exists():
            shutil.rmtree(doomed)
        path.rename(doomed)
        shutil.rmtree(doomed)
