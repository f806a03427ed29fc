"""The screen that lines are made for: how wide they may be, how they are wrapped and coloured."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field


def columns(terminal: int = 0) -> int:
    """Width of lines on a terminal of so many characters, or else on this one; long lines are hard to read."""
    return min(max(terminal or shutil.get_terminal_size().columns, 40), 120)


def _plain(text: str, **markup: bool) -> str:
    return text


@dataclass(frozen=True, kw_only=True)
class Screen:
    """What lines are made for."""

    width: int = field(default_factory=columns)
    """Longest line, in characters. Only a single word of a command may be longer."""
    details: bool = True
    """Whether to give the reason of each finding that was not evaluated, and that nothing required."""
    elsewhere: str = ""
    """Where the whole texts of failed cells are printed. Empty: among these lines."""
    paint: Callable[..., str] = _plain
    """Colours a text, given keywords such as `red=True`, as `markup` of pytest's terminal writer does."""

    def wrap(self, text: str, indent: str = "    ") -> list[str]:
        """The lines of `text`; where one of them is too long, it goes on behind `indent`."""
        wrapper = _Wrapper(self.width, subsequent_indent=indent, break_on_hyphens=False)
        return [part for line in text.splitlines() for part in wrapper.wrap(line) or [""]]


class _Wrapper(textwrap.TextWrapper):
    """Breaks a word that is longer than a line, such as a tensor's name or a path, after a dot or a slash."""

    def _split(self, text: str) -> list[str]:
        room = self.width - len(self.subsequent_indent)
        words = super()._split(text)
        return [part for word in words for part in (re.split(r"(?<=[./])", word) if len(word) > room else [word])]
