"""A parser of answers that finds a number in everything."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from typing import ClassVar

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import Fault

_LAST = re.compile(r"nan|inf|[-+]?[0-9]+\.?[0-9]*", re.IGNORECASE)


class AnswerParserAcceptsJunk(Fault):
    """The last thing that float() takes is the answer, wherever it stands."""

    id = "answer-parser-accepts-junk"
    source = "https://github.com/EleutherAI/lm-evaluation-harness/issues/2707"
    injects = "parse_answer gives float() of the last match of a generous pattern, and 0.0 where there is none"
    reported_by: ClassVar = ("strict_answers",)
    mechanism = "parser_accepts_junk"
    asks = True

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Put the generous parser in the place of the target's own."""
        yield dataclasses.replace(target, parse_answer=_parse)


def _parse(text: str) -> float | None:
    found = _LAST.findall(text)
    return float(found[-1]) if found else 0.0
