"""Trainings of every task: silent in health, and reported with a fault at each station."""

from __future__ import annotations

import itertools

import pytest

from tests.targets.tasks import TASKS
from tools.studies import support

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("task", "station"), list(zip(TASKS, itertools.cycle(support.PLANTED), strict=False)), ids=TASKS
)
def test_a_task_is_judged(task: str, station: str) -> None:
    """It passes as it is, with no exception of the guard's own, and fails with a planted fault.

    They take turns here; `python -m tools.studies.support` plants each of them in every task.
    """
    if task == "sentence_transformer":
        pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    row = support.supported(f"tests.targets.tasks:{task}", [station])
    assert row.sound, row
