"""The first micro-batch: wrong gradients, losses and masks are seen, and healthy trainings pass in silence."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

OURS = ("gradient_is_derivative", "loss_footprint", "loss_aim", "no_future")
SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
SEEN = {
    "wrong_silu": ("gradient_is_derivative", r"not the derivative .* first wrong at .*layers\.0\.mlp\.gate_proj"),
    "one_factor_doubled": (
        "gradient_is_derivative",
        r"first wrong at .*layers\.0\.mlp\.up_proj\.lora_A.* none before it",
    ),
    "keys_detached": ("gradient_is_derivative", r"a layer stops gradients .* at .*first_batch\.py:\d+"),
    "backward_of_three_losses": ("gradient_is_derivative", "the gradient is 3 times the derivative"),
    "without_shift": ("loss_footprint", "the prediction 0 places before it, not 1 place"),
    "clamped_to_padding": ("loss_footprint", "predictions of padding"),
    "one_row_counts": ("loss_footprint", "7 rows of the batch"),
    "half_of_the_tokens_count": ("loss_footprint", "8 places of 16 with a label have no gradient"),
    "negated": ("loss_aim", "the loss makes the labels less likely"),
    "labels_of_the_next_row": ("loss_aim", "does not aim at the labels"),
    "without_causality": ("no_future", "tokens see later ones"),
    "one_layer_sees_all": ("no_future", "tokens see later ones"),
    "rows_are_pooled": ("no_future", "rows see each other"),
}
HEALTHY = (
    *(f"tests.targets.first_batch:{n}" for n in ("self_distillation", "with_loss_mask", "smoothed")),
    *(f"tests.targets.healthy:{n}" for n in ("dora", "opt", "mixtral_experts", "bert_classifier", "heavy_dropout")),
    *(f"tests.targets.healthy:{n}" for n in ("checkpointing_reentrant", "packed", "one_row", "own_loss_normalised")),
)


def looked(run_cell: Callable[..., JudgedRun], target: str, **config: object) -> JudgedRun:
    """A run of one step of `target` with our look."""
    return run_cell(target, **{"looks": ("first_batch",), "steps": 1, "questions": 0} | config)


def wrong(run: JudgedRun) -> list[str]:
    """What our invariants fail for."""
    return [message(f) for name in OURS for f in run.verdict.of(name) if f.outcome is Outcome.FAILED]


@pytest.mark.parametrize("name", SEEN)
def test_a_fault_is_seen_and_named(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """The invariant that exists for the fault fails first, and says where."""
    invariant, pattern = SEEN[name]
    run = looked(run_cell, f"tests.targets.first_batch:{name}")
    messages = [message(f) for f in run.verdict.of(invariant) if f.outcome is Outcome.FAILED]
    assert any(re.search(pattern, m) for m in messages), (messages, run.record.derivative)


@pytest.mark.parametrize("target", HEALTHY)
def test_a_healthy_training_stays_silent(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Nothing fails, and no look ends in an exception."""
    run = looked(run_cell, target)
    assert wrong(run) == []
    seen = (run.record.derivative, run.record.footprint, run.record.aim, run.record.future)
    assert [s.error for s in seen if s is not None] == [""] * 4


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("gradients_doubled_by_hooks", r"of 30 tensors .*lambda> at .*first_batch\.py:\d+; it multiplies it by 2$"),
        ("gradients_halved_in_place", r"of 30 tensors .*halved at .*first_batch\.py:\d+; it multiplies it by 0\.5$"),
    ],
)
def test_a_hook_that_changes_gradients_is_named(run_cell: Callable[..., JudgedRun], name: str, pattern: str) -> None:
    """With the place in the user's code."""
    assert re.search(pattern, wrong(looked(run_cell, f"tests.targets.first_batch:{name}"))[0])


@pytest.mark.parametrize("name", ["clipped_by_value", "clipped_by_norm", "masked"])
def test_a_hook_that_clips_or_masks_is_meant(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """Clipping and freezing by hooks are recipes."""
    assert wrong(looked(run_cell, f"tests.targets.first_batch:gradients_{name}", steps=3)) == []


@pytest.mark.parametrize("steps", [5, 6])
@pytest.mark.parametrize("name", ["wrong_from_the_third_step", "wrong_at_even_steps"])
def test_a_gradient_that_goes_wrong_late_is_seen(run_cell: Callable[..., JudgedRun], name: str, steps: int) -> None:
    """The last two steps are looked at, at the weights that were trained."""
    run = looked(run_cell, f"tests.targets.first_batch:{name}", steps=steps)
    [finding] = [f for f in run.verdict.of("gradient_is_derivative") if f.outcome is Outcome.FAILED]
    assert finding.step in (steps - 1, steps)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"])
def test_a_cell_in_half_precision_is_looked_at_in_float32(run_cell: Callable[..., JudgedRun], precision: str) -> None:
    """Differences of its own loss would be rounding."""
    run = looked(run_cell, SUMS, precision=precision)
    assert wrong(run) == []
    assert run.record.derivative is not None
    assert run.record.derivative.arithmetic == "float32"
    assert run.record.derivative.directions


def test_the_look_changes_nothing(run_cell: Callable[..., JudgedRun]) -> None:
    """The trained adapter is the same bits with and without the look."""
    plain, seen = (looked(run_cell, SUMS, looks=looks, steps=3).record for looks in ((), ("first_batch",)))
    assert plain.adapter_digest == seen.adapter_digest
    assert plain.losses == seen.losses


def test_a_teacher_without_gradient_is_held(run_cell: Callable[..., JudgedRun]) -> None:
    """The gradient is off as long as the teacher moves along, and right once it is held."""
    seen = looked(run_cell, "tests.targets.first_batch:self_distillation").record.derivative
    assert seen is not None
    held = [d for d in seen.directions if d.held_error is not None]
    assert held
    assert all(d.held_error < 0.01 < d.error for d in held)
