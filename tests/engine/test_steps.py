"""What is seen step by step: each fault is caught where it happens, and looks leave the training as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard import registry
from pytest_sftguard.engine import faults
from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._injected import injected
from pytest_sftguard.verdicts import JudgedRun, Outcome

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
FAULTS = (
    "nan_loss_logged_as_zero",
    "loss_decrease_assert_fooled",
    "fp16_adam_eps_zero_division",
    "fp16_adam_moment_underflow_blowup",
    "bf16_adapter_update_swallow",
    "fp16_flag_ignored_on_cpu",
    "skipped_step_flag_lies_with_fused_adam",
    "nan_counts_as_changed",
    "vacuous_evidence",
    "fp16_forward_overflow",
    "loss_scale_collapse",
    "clip_with_nonfinite_norm",
    "single_nonfinite_batch_poisons_run",
    "lr_zero_or_warmup_longer_than_run",
    "schedule_runs_n_times_too_fast",
    "momentum_poisoned_by_discarded_step",
)


def fault(name: str) -> Fault:
    """The fault called so."""
    loaded: Fault = registry.load(name, faults.__name__)()
    return loaded


@pytest.fixture
def run_fault(run_cell: Callable[..., JudgedRun]) -> Callable[..., JudgedRun]:
    """Trains a target with a fault in it as the fault says, with the look `replay`."""

    def run(name: str, target: str = SUMS) -> JudgedRun:
        what = fault(name)
        with injected(name, target) as path:
            return run_cell(
                path,
                precision=what.precision,
                batch=what.batch,
                steps=what.steps,
                training_arguments=what.arguments,
                questions=0,
                looks=("replay",),
            )

    return run


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(run_fault: Callable[..., JudgedRun], name: str) -> None:
    """Every invariant that exists for a fault reports it, at its step and with its tensor."""
    what, run = fault(name), run_fault(name)
    assert not run.verdict.passed
    for invariant in what.reported_by:
        found = [f for f in run.verdict.of(invariant) if f.outcome is not Outcome.PASSED]
        assert found, f"{invariant} says nothing: {run.verdict.failures}"
    findings = [f for n in what.reported_by for f in run.verdict.of(n)]
    assert what.step is None or what.step in {f.step for f in findings}, findings
    assert any(what.tensor in f.message for f in findings), findings
