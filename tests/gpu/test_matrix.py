"""The stability matrix of this repository: the training app of `homework` in every precision and batch.

    pytest -m gpu_stability

On a CPU every cell is trained for real, float16 included; on a CUDA device the same cells run there.
"""

from __future__ import annotations

import pytest

from pytest_sftguard.verdicts import JudgedRun


@pytest.mark.gpu_stability
def test_trains(sft_run: JudgedRun) -> None:
    """The cell trains soundly, and what it saves answers with numbers: the verdict on the run fails the test."""
