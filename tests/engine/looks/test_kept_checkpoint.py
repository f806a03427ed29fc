"""Evaluations of a training: the checkpoint that is kept by them, and that nothing in them is random."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

Run = Callable[..., JudgedRun]
TARGETS = "tests.targets.evaluating"


def run(run_cell: Run, target: str) -> JudgedRun:
    """Eight steps of a target with an evaluation at every second one."""
    return run_cell(f"{TARGETS}:{target}", steps=8, looks=("kept_checkpoint", "evaluation"), questions=0)


@pytest.mark.parametrize("target", ["best", "best_by_accuracy", "overfitted", "whole"])
def test_a_training_that_keeps_its_best_passes(run_cell: Run, target: str) -> None:
    """A loss, an accuracy, and trainings whose best checkpoint is an early one, with an adapter and without."""
    judged = run(run_cell, target)
    assert judged.verdict.failures == ()
    [kept] = judged.verdict.of("kept_checkpoint_is_best")
    [still] = judged.verdict.of("evaluation_is_still")
    assert (kept.outcome, still.outcome) == (Outcome.PASSED, Outcome.PASSED)


def test_an_evaluation_whose_batches_are_lists_is_asked_twice(run_cell: Run) -> None:
    """Prompts that the Trainer answers itself have no labels, and a loss all the same."""
    judged = run_cell(f"{TARGETS}:rewarded", steps=2, looks=("evaluation",), questions=0)
    assert judged.record.look("evaluation").error == ""
    assert [f.outcome for f in judged.verdict.of("evaluation_is_still")] == [Outcome.PASSED]


def test_a_training_that_chooses_nothing_is_not_judged_by_its_choice(run_cell: Run) -> None:
    """Evaluations alone keep no checkpoint."""
    [finding] = run(run_cell, "best_by_step_alone").verdict.of("kept_checkpoint_is_best")
    assert (finding.outcome, finding.required) == (Outcome.NOT_EVALUATED, False)


@pytest.mark.parametrize(
    ("target", "invariant", "text"),
    [
        ("worst", "kept_checkpoint_is_best", "eval_loss is better the other way round"),
        ("worst_perplexity", "kept_checkpoint_is_best", "eval_perplexity is better the other way round"),
        ("not_loaded", "kept_checkpoint_is_best", "are not those of the best checkpoint"),
        ("whole_not_loaded", "kept_checkpoint_is_best", "are not those of the best checkpoint"),
        ("rotated_away", "kept_checkpoint_is_best", "no longer exists at the end"),
        ("evaluated_in_training_mode", "evaluation_is_still", "dropout was active in evaluations"),
        ("evaluated_with_a_memory", "evaluation_is_still", "has two losses"),
    ],
)
def test_what_is_wrong_with_evaluations_is_seen(run_cell: Run, target: str, invariant: str, text: str) -> None:
    """Each fault has its reason, and no other invariant of the two fails."""
    judged = run(run_cell, target)
    assert any(text in message(f) for f in judged.verdict.of(invariant)), judged.verdict.failures
    other = {"kept_checkpoint_is_best", "evaluation_is_still"} - {invariant}
    assert not [f for f in judged.verdict.failures if f.invariant in other]
