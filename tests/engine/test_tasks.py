"""Trainings of every task: silent in health, and reported with a fault at each station."""

from __future__ import annotations

import pytest

from tests.targets.tasks import TASKS
from tools.studies import support

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_judged(task: str) -> None:
    """It passes as it is, with no exception of the guard's own, and fails with each planted fault."""
    if task == "sentence_transformer":
        pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    row = support.supported(f"tests.targets.tasks:{task}")
    assert row.sound, row
