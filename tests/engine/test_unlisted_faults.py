"""Faults that no catalogue lists, as a user's code would have them: each must be seen, and where it happens."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

SEEN: dict[str, tuple[str, int | None]] = {
    "nan_in_one_gradient": ("gradients_finite", 4),
    "nan_in_one_gradient_kept": ("gradients_finite", 4),
    "infinite_moment": ("weights_and_moments_finite", 4),
    "factor_frozen_midway": ("every_factor_moves", 4),
    "layer_missing_from_the_optimizer": ("every_factor_moves", 1),
    "update_undone": ("effective_steps", 4),
    "every_update_undone": ("effective_steps", 1),
    "average_written_back": ("effective_steps", 1),
    "one_bit_in_a_base_weight": ("base_bit_frozen", None),
    "one_bit_in_a_buffer": ("base_bit_frozen", None),
    "loss_laundered": ("gradients_finite", 4),
    "returned_loss_laundered": ("raw_loss_finite", 4),
    "log_laundered": ("raw_loss_finite", 4),
    "constant_loss": ("effective_steps", 1),
    "two_steps_in_one": ("evidence_complete", 2),
    "gradients_never_cleared": ("effective_steps", 2),
    "scheduler_steps_twice": ("effective_steps", 4),
    "saved_too_early": ("round_trip", None),
    "half_of_the_file": ("round_trip", None),
    "rounded_file": ("round_trip", None),
    "head_changed_in_the_file": ("round_trip", None),
    "nan_in_the_file": ("weights_and_moments_finite", None),
    "tensors_swapped_in_the_file": ("round_trip", None),
    "another_alpha_in_the_file": ("round_trip", None),
    "layer_left_out": ("gradient_present", 1),
    "fused_layer_left_out": ("gradient_present", 1),
    "kernel_in_half_precision": ("round_trip", None),
    "gradients_enlarged": ("norm_honest", 1),
    "norm_faked": ("norm_honest", 1),
    "optimizer_skips": ("effective_steps", 4),
    "stopped_early": ("evidence_complete", None),
    "adapter_disabled": ("effective_steps", 1),
    "adapter_disabled_midway": ("effective_steps", 4),
    "wrong_adapter_active": ("base_bit_frozen", None),
    "randomised_pissa": ("round_trip", None),
    "bfloat16_norms": ("every_factor_moves", None),
    "steps_without_a_gradient": ("every_factor_moves", 4),
    "labels_of_one_step_masked": ("effective_steps", 4),
    "weights_scaled_at_the_end": ("every_factor_moves", None),
    "nan_at_the_end": ("weights_and_moments_finite", None),
}
"""The invariant that ought to see each fault, and the step that it ought to name."""
CAUSES = {
    "nan_in_one_gradient_kept": "nonfinite_gradient_clipped",
    "infinite_moment": "optimizer_state_poisoned",
    "factor_frozen_midway": "gradient_does_not_reach_a_part",
    "layer_missing_from_the_optimizer": "adapter_not_in_optimizer",
    "update_undone": "weights_changed_from_outside",
    "average_written_back": "weights_changed_from_outside",
    "one_bit_in_a_buffer": "base_changed",
    "constant_loss": "loss_does_not_reach_the_adapter",
    "two_steps_in_one": "optimizer_stepped_beside_the_loop",
    "gradients_never_cleared": "gradients_not_cleared",
    "scheduler_steps_twice": "schedule_too_fast",
    "saved_too_early": "adapter_file_differs",
    "half_of_the_file": "adapter_file_incomplete",
    "rounded_file": "adapter_file_differs",
    "head_changed_in_the_file": "adapter_file_differs",
    "another_alpha_in_the_file": "scaling_wrong",
    "layer_left_out": "gradient_does_not_reach_a_part",
    "kernel_in_half_precision": "kernel_computes_otherwise",
    "gradients_enlarged": "gradients_altered",
    "norm_faked": "logged_norm_altered",
    "optimizer_skips": "optimizer_leaves_out_steps",
    "wrong_adapter_active": "other_adapter_trained",
    "bfloat16_norms": "updates_swallowed_in_bfloat16",
    "nan_at_the_end": "nan_in_adapter",
}
"""The first cause of those that have one."""
IN_PRECISION = {"bfloat16_norms": "bf16-true"}
NO_EVIDENCE = {
    "half_of_the_layers_in_float32": "bf16-mixed",
    "float32_after_the_first_step": "bf16-mixed",
    "products_in_float32": "bf16-mixed",
    "scaler_disabled": "fp16-mixed",
}


@pytest.mark.parametrize("target", SEEN)
def test_an_unlisted_fault_is_seen(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The invariant that exists for the fault fails and names the step, and the first cause is the right one."""
    run = run_cell(f"tests.targets.faulty:{target}", precision=IN_PRECISION.get(target, "fp32"))
    invariant, step = SEEN[target]
    assert run.verdict.outcome is Outcome.FAILED
    assert (invariant, step) in {(f.invariant, f.step) for f in run.verdict.failures}
    if target in CAUSES:
        assert diagnose(run)[0].mechanism == CAUSES[target]


def test_a_kernel_that_gives_other_numbers_is_named(run_cell: Callable[..., JudgedRun]) -> None:
    """And where the same sums come in another order only, nothing fails."""
    faulty = run_cell("tests.targets.faulty:kernel_in_half_precision")
    assert diagnose(faulty)[0].mechanism == "kernel_computes_otherwise"
    healthy = run_cell("tests.targets.healthy:own_kernel").record.round_trip
    assert healthy is not None
    assert healthy.computed_otherwise.count == 14
    assert healthy.max_logit_change


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_a_wrapper_around_the_model_computes_nothing_otherwise(
    run_cell: Callable[..., JudgedRun], precision: str
) -> None:
    """Accelerate leaves one with autocast on the trained model: an ordinary training is held to an ordinary limit."""
    trip = run_cell("tests.targets.healthy:rslora", precision=precision).record.round_trip
    assert trip is not None
    assert not trip.computed_otherwise


@pytest.mark.parametrize("learning_rate", [1e-3, 1e-7])
def test_another_alpha_in_the_file_is_seen_in_the_layers(
    run_cell: Callable[..., JudgedRun], learning_rate: float
) -> None:
    """However small the adapter's effect is: each layer's scaling is compared as well as the logits."""
    run = run_cell(
        "tests.targets.faulty:another_alpha_in_the_file", training_arguments={"learning_rate": learning_rate}
    )
    assert any("changed the scaling of 14 layers" in message(f) for f in run.verdict.failures)
    assert diagnose(run)[0].mechanism == "scaling_wrong"


@pytest.mark.parametrize("target", NO_EVIDENCE)
def test_a_precision_that_is_not_kept_is_no_evidence(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Layers, steps or a scaler that leave the mode make the cell one that was not evaluated."""
    verdict = run_cell(f"tests.targets.faulty:{target}", precision=NO_EVIDENCE[target]).verdict
    assert verdict.outcome is Outcome.NOT_EVALUATED
    assert {f.invariant for f in verdict.not_evaluated if f.required} == {"precision_is_real"}


def test_a_base_that_is_put_back_is_seen(run_cell: Callable[..., JudgedRun]) -> None:
    """A base weight that is wrong in the middle of the run alone, its last step included."""
    run = run_cell("tests.targets.faulty:base_changed_and_restored", looks=("base_during",))
    assert [f.reason for f in run.verdict.of("base_bit_frozen")] == ["changed_during"]
