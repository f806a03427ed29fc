"""What the first step of a real training shows of its random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_sftguard.verdicts import JudgedRun

NEFTUNE = {"neftune_noise_alpha": 5.0}


@pytest.mark.parametrize(
    ("precision", "arguments", "noise"),
    [
        ("bf16-true", NEFTUNE, "uniform_"),
        ("fp16-true", NEFTUNE, "uniform_"),
        # the embeddings are float32
        ("bf16-mixed", NEFTUNE, ""),
        ("fp32", NEFTUNE, ""),
        ("bf16-true", {}, ""),
    ],
)
def test_noise_in_half_precision_is_another(
    run_cell: Callable[..., JudgedRun], precision: str, arguments: dict[str, Any], noise: str
) -> None:
    """Torch draws it for each type by itself, unlike dropout's masks."""
    record = run_cell(precision=precision, training_arguments=arguments, steps=1).record
    assert record.first_step is not None
    assert record.first_step.noise == noise
