"""Measured tables in pages of the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.benchmarks.pages import put


@pytest.mark.parametrize("held", ["", "| an old one |\n"], ids=["empty", "filled"])
def test_a_table_takes_its_place(tmp_path: Path, held: str) -> None:
    """Whether there was one before or not; the rest of the page stays."""
    page = tmp_path / "page.md"
    page.write_text(f"one\n<!-- other -->\nx\n<!-- end -->\n<!-- table -->\n{held}<!-- end -->\ntwo\n")
    put(page, "table", "| new |")
    assert page.read_text() == "one\n<!-- other -->\nx\n<!-- end -->\n<!-- table -->\n| new |\n<!-- end -->\ntwo\n"


@pytest.mark.parametrize("text", ["no place\n", "<!-- table -->\nno end\n"])
def test_a_page_without_a_place_is_an_error(tmp_path: Path, text: str) -> None:
    """Nothing that was measured is lost in silence."""
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit, match=r"page\.md has no place for a table"):
        put(page, "table", "| new |")
    assert page.read_text() == text
