"""docs/cli.md is what the commands say of themselves; the README names every verb and module."""

import sys
from pathlib import Path

import typer

from recast.cli import app

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

import document_cli  # noqa: E402


def test_docs_cli_is_up_to_date() -> None:
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert page == "\n".join(document_cli.pages()) + "\n", (
        "run python scripts/document_cli.py > docs/cli.md"
    )


def test_every_verb_has_help_an_example_and_a_line_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, command in typer.main.get_command(app).commands.items():
        assert "Example: recast" in (command.help or ""), f"{name} has no example"
        assert f"`{name}`" in readme or f"make {name}" in readme, f"README does not name {name}"
        for parameter in command.params:
            assert parameter.name == "help" or getattr(parameter, "help", None), (name, parameter)


def test_the_readme_s_tree_names_every_module() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    internal = {"__init__.py", "__main__.py", "errors.py", "events.py", "console.py", "show.py"}
    for path in (ROOT / "src" / "recast").glob("*.py"):
        if path.name not in internal and not path.name.startswith("cli_"):
            assert f"─ {path.name} " in readme, f"the tree in README.md lacks {path.name}"
