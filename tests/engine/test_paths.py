"""Context, paths, evaluation and decoding: faults are seen where they are, and healthy trainings stay silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pytest_sftguard import registry
from pytest_sftguard.engine import faults
from pytest_sftguard.engine.faults import _injected
from pytest_sftguard.verdicts import JudgedRun, Outcome

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
LOOKS = ("context", "paths", "evaluation", "decoding")
OURS = ("context_independence", "path_equivalence", "eval_and_decode_finite", "decode_batch_invariance")
SEEN = {
    "sdpa_cpu_hides_nan": ("context_independence", "logits of .* tokens are not finite"),
    "right_padded_generation": ("decode_batch_invariance", "others in a padded batch"),
    "packing_cross_contamination": ("context_independence", "as trained on under sdpa .* see each other"),
    "fully_masked_attention_row": ("context_independence", "let a token see nothing"),
    "nan_logits_decode_as_token_zero": ("eval_and_decode_finite", "decoded from scores that are not finite"),
    "eval_nan_filtered": ("eval_and_decode_finite", "of .* evaluation batches is not finite"),
    "nan_slips_through_comparison": ("strict_answers", "0 of 8 answers hold a number"),
    "rope_low_precision": ("context_independence", "rotary frequencies are kept in half precision"),
    "flash_attention_backward_nan": ("path_equivalence", "not finite under varlen_kernel, and are with plain kernels"),
    "fused_loss_wrong_gradient": ("path_equivalence", "is not the one with plain loss"),
}
CONTROLS = ("nan_best_metric", "autocast_cache_kills_gradients")
HEALTHY = (
    "gpt2", "gemma2", "opt_layerdrop", "mixtral_experts", "idle_experts", "bert_classifier", "dynamic_rope",
    "left_padded", "stray_keys_kept", "streamed", "own_loss_normalised", "checkpointing_reentrant", "pissa", "dora",
    "saved_embedding_and_head", "two_adapters", "evaluated_early_stopping", "registered_counter",
)  # fmt: skip


def run_fault(run_cell: Callable[..., JudgedRun], name: str, target: str = SUMS, **changes: Any) -> JudgedRun:
    """A run of the fault called `name` in the sums, as the fault asks for it, with our looks."""
    fault = registry.load(name, faults.__name__)
    config = {"precision": fault.precision, "batch": fault.batch, "steps": fault.steps, "looks": LOOKS}
    config |= {"training_arguments": fault.arguments} | changes
    with _injected.injected(name, target) as path:
        return run_cell(path, **config)


@pytest.mark.parametrize("name", SEEN)
def test_a_fault_is_seen_by_its_invariant(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """The invariant that exists for the fault fails, and says what it saw."""
    import re

    invariant, pattern = SEEN[name]
    run = run_fault(run_cell, name)
    messages = [f.message for f in run.verdict.failures if f.invariant == invariant]
    assert any(re.search(pattern, m) for m in messages), run.verdict.failures
    assert invariant in registry.load(name, faults.__name__).reported_by


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_is_green(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """What these versions are healthy in raises no alarm."""
    run = run_fault(run_cell, name, questions=0)
    assert run.verdict.passed, run.verdict.failures


@pytest.mark.parametrize("target", HEALTHY)
def test_a_healthy_variant_stays_silent(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Architectures, adapters, data and Trainers of many kinds pass, or there is nothing to look at."""
    run = run_cell(f"tests.healthy_targets:{target}", looks=LOOKS)
    assert run.verdict.passed, run.verdict.failures


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"])
def test_low_precision_stays_silent(run_cell: Callable[..., JudgedRun], precision: str) -> None:
    """Rounding is no fault: the sums pass in every mode, by all that these looks are for."""
    run = run_cell(SUMS, precision=precision, looks=LOOKS, steps=100, questions=16)
    assert [f for name in OURS for f in run.verdict.of(name) if f.outcome is not Outcome.PASSED] == []


def test_looks_change_nothing(run_cell: Callable[..., JudgedRun]) -> None:
    """The trained adapter and its answers are the same bits with and without the looks."""
    plain, looked = (run_cell(SUMS, looks=looks, steps=4).record for looks in ((), LOOKS))
    assert plain.adapter_digest == looked.adapter_digest
    assert plain.answers == looked.answers
    assert plain.losses == looked.losses
