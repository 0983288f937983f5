"""Imports point down only: every module of recast may import lower layers, never its siblings."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "recast"
LAYERS = {
    **dict.fromkeys(["errors", "events"], 0.0),
    **dict.fromkeys(["disk", "header", "processes", "subspace"], 0.1),
    **dict.fromkeys(["commit", "opened"], 0.15),
    **dict.fromkeys(["checkpoint", "objective", "lowrank"], 0.2),
    **dict.fromkeys(["markers", "quantise", "timesteps", "weighting"], 0.3),
    "grammar": 1,
    "layout": 2,
    **dict.fromkeys(["text", "adapter_facts"], 2.5),
    **dict.fromkeys(["model", "adapter"], 3),
    **dict.fromkeys(["train", "distill", "sample", "data", "optim", "pocket"], 4),
    **dict.fromkeys(["evaluate", "recipe", "inspection"], 5),
    **dict.fromkeys(["wishes", "kohya"], 5.4),
    **dict.fromkeys(["dream", "painting"], 5.5),
    "surgery": 5.6,
    **dict.fromkeys(["convert", "distillation", "verification"], 6),
    "assessing": 6.1,
    "console": 6.5,
    "show": 6.6,
    "cli": 7,
    "__main__": 8,
}


def unit(path: Path) -> str:
    """The top-level unit a file belongs to: `train/loop.py` -> "train", `cli_train.py` -> "cli"."""
    first = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    return "cli" if first.startswith("cli_") else first


def imported_units(path: Path) -> set[str]:
    """Units of recast that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "recast":
                names |= {f"recast.{alias.name}" for alias in node.names}
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative import")
    parts = [name.split(".") for name in names if name.startswith("recast.")]
    units = {p[1] for p in parts}
    return {"cli" if name.startswith("cli_") else name for name in units} - {"__version__"}


@pytest.mark.parametrize(
    "path", sorted(SOURCE.rglob("*.py")), ids=lambda p: str(p.relative_to(SOURCE))
)
def test_imports_point_down(path: Path) -> None:
    if path.parent == SOURCE and path.name == "__init__.py":
        return
    me = unit(path)
    assert me in LAYERS, f"{me} is in no layer: add it to LAYERS"
    for other in imported_units(path) - {me}:
        assert other in LAYERS, f"{path.name} imports recast.{other}, which is in no layer"
        assert LAYERS[other] < LAYERS[me], (
            f"{path.name} ({me}) imports recast.{other} upwards or sideways"
        )
