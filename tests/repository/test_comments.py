"""Comments: they stand above the line that they explain, and the formatter is never switched off."""

from __future__ import annotations

import re
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOR_TOOLS = re.compile(r"#\s*(type: ignore|noqa)")


def comments() -> list[tuple[str, bool]]:
    """Every comment of the repository's Python files as `file:line: text`, and whether code stands before it."""
    listed = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = []
    for name in listed.splitlines():
        with open(ROOT / name, "rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type == tokenize.COMMENT and not FOR_TOOLS.match(token.string):
                    line, column = token.start
                    found.append((f"{name}:{line}: {token.string}", bool(token.line[:column].strip())))
    return found


def test_comments_stand_above_their_line() -> None:
    """Nobody reads them behind the code, but for those that tools read."""
    assert [text for text, behind in comments() if behind] == []


def test_the_formatter_is_never_switched_off() -> None:
    """How code is laid out is for ruff to decide."""
    assert [text for text, _ in comments() if re.search(r"# fmt: (skip|off)$", text)] == []
