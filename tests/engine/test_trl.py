"""An SFTTrainer of TRL is a target as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard.tiers import LOOKS
from pytest_sftguard.verdicts import JudgedRun, Outcome

pytest.importorskip("trl")

TARGETS = "tests.targets.trl"


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true"])
@pytest.mark.parametrize("target", ["build_trainer", "chats"])
def test_a_healthy_sft_trainer_passes(run_cell: Callable[..., JudgedRun], target: str, precision: str) -> None:
    """Prompts with completions, and conversations."""
    run = run_cell(f"{TARGETS}:{target}", precision=precision, batch=(2, 2), questions=0)
    assert run.verdict.outcome is Outcome.PASSED, run.verdict.findings


@pytest.mark.parametrize("target", ["build_trainer", "chats"])
def test_every_look_fits_an_sft_trainer(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """None of them is broken by TRL's own forward pass, template or collator."""
    run = run_cell(f"{TARGETS}:{target}", batch=(4, 1), questions=4, steps=40, looks=LOOKS)
    assert run.verdict.outcome is Outcome.PASSED, run.verdict.findings
    assert [look.name for look in run.record.looks if look.error] == []


@pytest.mark.parametrize(
    ("target", "precision", "invariant", "step"),
    [
        ("nan_in_the_adapter", "fp32", "raw_loss_finite", 1),
        ("half_precision_adapters", "fp16-true", "gradients_finite", 2),
        ("empty_assistant_mask", "fp32", "effective_steps", 1),
    ],
)
def test_an_unsound_sft_trainer_fails(
    run_cell: Callable[..., JudgedRun], target: str, precision: str, invariant: str, step: int
) -> None:
    """At its step."""
    run = run_cell(f"{TARGETS}:{target}", precision=precision, batch=(4, 1), questions=0)
    assert step in {f.step for f in run.verdict.failures if f.invariant == invariant}, run.verdict.failures


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("target", ["preferences", "judgements", "rewarded"])
def test_other_trainers_pass(run_cell: Callable[..., JudgedRun], target: str, precision: str) -> None:
    """DPO, KTO, and a GRPO with steps in which every group's rewards tie."""
    run = run_cell(f"{TARGETS}:{target}", precision=precision, batch=(4, 1), questions=0, looks=LOOKS)
    assert run.verdict.outcome is Outcome.PASSED, run.verdict.findings
    assert [look.name for look in run.record.looks if look.error] == []
