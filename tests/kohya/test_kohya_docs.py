"""docs/kohya.md is what the importer's table says."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "scripts"))

import document_kohya  # noqa: E402


def test_docs_kohya_is_up_to_date() -> None:
    page = (ROOT / "docs" / "kohya.md").read_text(encoding="utf-8")
    assert page == "\n".join(document_kohya.pages()) + "\n", (
        "run python scripts/document_kohya.py > docs/kohya.md"
    )
