"""A command line in this process."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from recast import cli


def run(words: Iterable[object], code: int = 0) -> None:
    """Run a command; it must end with this exit code."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    assert end.value.code == code, words
