"""Lines for a terminal: how they are wrapped and coloured, and why a cell did not pass in one of them."""

from __future__ import annotations

import math
import re
import shutil
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import told_last
from pytest_sftguard.rendering import told
from pytest_sftguard.verdicts import Finding, JudgedRun


def columns() -> int:
    """Width of the terminal in characters; wide terminals are not filled, as long lines are hard to read."""
    return min(max(shutil.get_terminal_size().columns, 40), 120)


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


def by_step(run: JudgedRun) -> list[Finding]:
    """The failures of `run`, the first step first; within a step, those that say least come last."""
    last = told_last()
    return sorted(run.verdict.failures, key=lambda f: (math.inf if f.step is None else f.step, f.invariant in last))


def headline(run: JudgedRun) -> str:
    """Why a run did not pass, as one sentence: its most likely cause, or else the first finding."""
    if not run.verdict.failures:
        reasons = [told(f) for f in run.verdict.not_evaluated if f.required] or ["nothing in it could be judged"]
        return f"{run.record.cell} not evaluated: {'; '.join(reasons)}"
    for cause in diagnose(run):
        return f"{cause.mechanism}: {cause.summary}"
    first = by_step(run)[0]
    return f"{first.invariant}: {told(first)}"
