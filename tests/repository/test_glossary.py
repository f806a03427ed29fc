"""Words: what the glossary forbids stands nowhere in code or documentation."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = "docs/glossary.md"
HISTORY = ("CHANGELOG.md", "changelog.d/", "pytest_sftguard/records/migration.py", "tests/records/test_records.py")
"""Files that tell what was: what they quote stays as it was written."""


def forbidden(title: str) -> list[str]:
    """The left column of the first table after `title` in the glossary."""
    text = (ROOT / GLOSSARY).read_text(encoding="utf-8").partition(title)[2]
    table = re.search(r"\| not \| but \|\n\|---\|---\|\n((?:\|.*\n)+)", text)
    assert table is not None
    return re.findall(r"^\| `([^`]+)` \|", table[1], re.MULTILINE)


WORDS = forbidden("## Words that we do not use")
NAMES = forbidden("No variable, argument or attribute")


def files(*suffixes: str) -> list[str]:
    """Tracked files with one of these suffixes, the glossary and history apart."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    own = (GLOSSARY, *HISTORY, Path(__file__).relative_to(ROOT).as_posix())
    return [f for f in listed.splitlines() if f.endswith(suffixes) and not f.startswith(own)]


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every identifier that a module defines or uses, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            yield node.arg, node.lineno


@pytest.mark.parametrize("word", WORDS)
def test_a_forbidden_word_stands_nowhere(word: str) -> None:
    """Neither in code nor in documentation, whatever its case."""
    pattern = re.compile(rf"(?<![\w-]){re.escape(word)}(?![\w-])", re.IGNORECASE)
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name in files(".py", ".md", ".toml", ".ini", ".yml")
        for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, "\n".join(found)


def test_no_identifier_has_a_forbidden_name() -> None:
    """No variable, argument or attribute, in tests and tools either."""
    found = [
        f"{file}:{line}: {name}"
        for file in files(".py")
        for name, line in names(ast.parse((ROOT / file).read_text(encoding="utf-8")))
        if name in NAMES
    ]
    assert not found, "\n".join(found)
