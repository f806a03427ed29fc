"""Real trainings: what happens to gradients and updates beside backward and the optimizer is seen in the tier quick."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.verdicts import JudgedRun
from tests.targets import stepping

SEEN = {
    "factor_scaled": ("factor_gradients_agree", 2, "factor_gradient_altered"),
    "factor_of_an_older_step": ("factor_gradients_agree", 3, "factor_gradient_altered"),
    "two_elements_exchanged": ("factor_gradients_agree", 2, "factor_gradient_altered"),
    "rounded_between_the_factors": ("factor_gradients_agree", 2, "factor_gradient_altered"),
    "gradient_permuted_before_the_step": ("norm_honest", 2, "gradients_altered"),
    "small_gradient_scaled_before_the_step": ("norm_honest", 1, "gradients_altered"),
    "loss_divided_again": ("loss_is_the_models", 1, "loss_changed_on_the_way"),
    "loss_negated": ("loss_is_the_models", 1, "loss_changed_on_the_way"),
    "loss_scaled_later": ("loss_is_the_models", 3, "loss_changed_on_the_way"),
    "loss_with_an_offset": ("loss_is_the_models", 1, "loss_changed_on_the_way"),
    "penalty_without_a_gradient": ("loss_is_the_models", 1, "loss_changed_on_the_way"),
    "noise_at_times": ("loss_is_the_models", 3, "loss_changed_on_the_way"),
    "loss_rounded": ("loss_is_the_models", 1, "loss_changed_on_the_way"),
    "mean_that_nothing_divides": ("loss_counts_once", 1, "loss_grows_with_micro_batches"),
    "number_of_labels_left_out": ("loss_counts_once", 1, "loss_grows_with_micro_batches"),
    "loss_function_that_takes_no_number": ("loss_counts_once", 1, "loss_grows_with_micro_batches"),
    "divided_by_own_code_too": ("loss_counts_once", 1, "loss_divided_twice"),
    "written_out_and_tripled": ("loss_counts_once", 1, "loss_changed_on_the_way"),
    "update_scaled": ("update_repeats", 2, "update_is_not_the_optimizers"),
    "update_left_out_in_part": ("update_repeats", 2, "update_is_not_the_optimizers"),
}
"""The invariant that ought to see each fault, the first step that shows it (A has no gradient before B moves), and the
first cause."""
SOUND = [n for n, thing in vars(stepping).items() if inspect.isfunction(thing) and "sound" in str(thing.__doc__)]
MINE = {invariant for invariant, *_ in SEEN.values()}


@pytest.mark.parametrize("target", SEEN)
def test_a_fault_is_seen(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The invariant that exists for it fails at the first step that shows it, and the cause is the right one."""
    run = run_cell(f"tests.targets.stepping:{target}", batch=(4, 2), steps=5)
    invariant, step, cause = SEEN[target]
    assert (invariant, step) in {(f.invariant, f.step) for f in run.verdict.failures}
    assert diagnose(run)[0].mechanism == cause


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed"])
@pytest.mark.parametrize("target", SOUND)
def test_what_is_sound_is_passed_over(run_cell: Callable[..., JudgedRun], target: str, precision: str) -> None:
    """Clipping, groups, other optimizers and penalties in the loss are no fault, whatever the precision."""
    run = run_cell(f"tests.targets.stepping:{target}", precision=precision, batch=(4, 2), steps=5)
    assert [f for f in run.verdict.failures if f.invariant in MINE] == []


@pytest.mark.parametrize("target", ["momentum", "two_groups"])
def test_every_optimizer_of_torch_is_repeated(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The first four steps of such a training were taken twice."""
    run = run_cell(f"tests.targets.stepping:{target}", steps=5)
    assert [s.departure is None for s in run.record.steps] == [False] * 4 + [True]


def test_looking_changes_no_bit(run_cell: Callable[..., JudgedRun]) -> None:
    """Two trainings of a target with dropout have the same bits, whatever was repeated between."""
    one, other = (run_cell("tests.targets.healthy:dropout", looks=()) for _ in range(2))
    assert one.record.adapter_digest == other.record.adapter_digest
