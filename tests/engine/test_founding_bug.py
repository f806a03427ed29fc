"""The bug that this project began with: `loss: 0.0, grad_norm: nan` from step 2, and a test suite that stayed green."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.reports import failure
from pytest_sftguard.reports._screen import Screen
from pytest_sftguard.verdicts import JudgedRun


@pytest.fixture(scope="module", params=["half_precision_adapters", "homework_half_precision_adapters"])
def buggy(request: pytest.FixtureRequest, run_cell: Callable[..., JudgedRun]) -> JudgedRun:
    """float16 adapters under non-fused AdamW, on the tiny and on the embedded model."""
    return run_cell(request.param, precision="fp16-true", batch=(4, 1), questions=2)


def test_the_log_reads_as_the_public_reports_do(buggy: JudgedRun) -> None:
    """The Trainer logs a fine first step, and then loss 0.0 with grad_norm nan for ever."""
    first, *others = buggy.record.log
    assert math.isfinite(first.loss)
    assert math.isfinite(first.grad_norm)
    assert [(line.loss, str(line.grad_norm)) for line in others] == [(0.0, "nan")] * 5


def test_a_naive_assertion_is_green(buggy: JudgedRun) -> None:
    """'The loss is finite and went down' holds for the log of a dead run."""
    logged = [line.loss for line in buggy.record.log]
    assert all(map(math.isfinite, logged))
    assert logged[-1] < logged[0]


@pytest.mark.parametrize("invariant", ["raw_loss_finite", "gradients_finite"])
def test_the_guard_fails_it_at_step_two(buggy: JudgedRun, invariant: str) -> None:
    """The raw loss and the gradients are not finite from step 2 on."""
    [finding] = buggy.verdict.of(invariant)
    assert (finding.outcome.name, finding.step) == ("FAILED", 2)


def test_the_guard_sees_the_weights_die_in_step_one(buggy: JudgedRun) -> None:
    """The optimizer wrote the NaN one step before the log showed anything."""
    assert min(f.step for f in buggy.verdict.of("weights_and_moments_finite") if f.step) == 1


def test_the_mechanism_is_named_first(buggy: JudgedRun) -> None:
    """The diagnosis is eps rounding to 0 in float16."""
    assert diagnose(buggy)[0].mechanism == "eps_underflow_in_float16"


def test_the_text_says_what_to_change(buggy: JudgedRun) -> None:
    """The failure names 0/0, eps and the cure."""
    text = " ".join(failure.message(buggy, "pytest x", Screen(width=120)).split())
    assert "0 / (sqrt(0) + 0)" in text
    assert "eps 1e-08 is below the smallest float16" in text
    assert "autocast_adapter_dtype=True" in text


def test_the_cure_cures(run_cell: Callable[..., JudgedRun]) -> None:
    """The same cell with the adapter in float32 passes."""
    assert run_cell(precision="fp16-true", batch=(4, 1)).verdict.passed
