"""Answers that are NaN satisfy every comparison that is written the wrong way round."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import Fault


class NanSlipsThroughComparison(Fault):
    """The target's reader of answers gives NaN: `abs(nan - right) > limit` is False, and so nothing is wrong."""

    id = "nan-slips-through-comparison"
    source = "https://github.com/huggingface/trl/issues/6702"
    injects = "parse_answer gives NaN for every text"
    reported_by: ClassVar = ("strict_answers", "evidence_complete")
    mechanism = "nan_taken_for_a_number"
    asks = True

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Exchange the reader, where there is one."""
        yield dataclasses.replace(target, parse_answer=_nan) if target.parse_answer is not None else target


def _nan(text: str) -> float:
    return math.nan
