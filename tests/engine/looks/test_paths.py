"""Context, paths, evaluation and decoding: faults are seen where they are, and healthy trainings pass in silence."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.building.targets import TargetError
from pytest_sftguard.engine.faults import fault_named
from pytest_sftguard.engine.faults._injected import injected
from pytest_sftguard.engine.looks import InapplicableError, paths
from pytest_sftguard.records import PathRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import answering as answering_targets
from tests.targets import healthy as healthy_targets

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
LOOKS = ("context", "paths", "evaluation", "decoding")
OURS = ("context_independence", "path_equivalence", "eval_and_decode_finite", "decode_batch_invariance")
SEEN = {
    "sdpa_cpu_hides_nan": ("context_independence", "logits of .* tokens are not finite"),
    "right_padded_generation": ("decode_batch_invariance", "others in a padded batch"),
    "packing_cross_contamination": ("context_independence", "as trained on under sdpa .* see each other"),
    "fully_masked_attention_row": ("context_independence", "let a token see nothing"),
    "nan_logits_decode_as_token_zero": ("eval_and_decode_finite", "came from scores that are not finite"),
    "eval_nan_filtered": ("eval_and_decode_finite", "of .* evaluation batches is not finite"),
    "nan_slips_through_comparison": ("strict_answers", "0 of 8 answers could be read as a number"),
    "rope_low_precision": ("context_independence", "rotary frequencies are kept in half precision"),
    "flash_attention_backward_nan": (
        "path_equivalence",
        "not finite under varlen_kernel, but finite with plain kernels",
    ),
    "fused_loss_wrong_gradient": ("path_equivalence", "is not the one with plain loss"),
}
HEALTHY = (
    "gpt2",
    "gemma2",
    "opt_layerdrop",
    "mixtral_experts",
    "idle_experts",
    "bert_classifier",
    "dynamic_rope",
    "left_padded",
    "stray_keys_kept",
    "streamed",
    "own_loss_normalised",
    "checkpointing_reentrant",
    "pissa",
    "dora",
    "saved_embedding_and_head",
    "two_adapters",
    "evaluated_early_stopping",
    "registered_counter",
    "packed",
    "mask_of_four_dimensions",
    "llama_chat",
)


def run_fault(run_cell: Callable[..., JudgedRun], name: str, target: str = SUMS, **changes: Any) -> JudgedRun:
    """A run of the fault called `name` in the sums, as the fault asks for it, with our looks."""
    fault = fault_named(name)
    config = {"precision": fault.precision, "batch": fault.batch, "steps": fault.steps, "looks": LOOKS}
    config |= {"training_arguments": fault.arguments} | changes
    with injected(name, target) as path:
        return run_cell(path, **config)


@pytest.mark.parametrize("name", SEEN)
def test_a_fault_is_seen_by_its_invariant(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """The invariant that exists for the fault fails, and says what it saw."""
    invariant, pattern = SEEN[name]
    run = run_fault(run_cell, name)
    messages = [message(f) for f in run.verdict.failures if f.invariant == invariant]
    assert any(re.search(pattern, m) for m in messages), run.verdict.failures
    assert invariant in fault_named(name).reported_by


@pytest.mark.parametrize("target", HEALTHY)
def test_a_healthy_variant_stays_silent(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Architectures, adapters, data and Trainers of many types pass, or there is nothing to look at."""
    run = run_cell(f"tests.targets.healthy:{target}", looks=LOOKS)
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_targets_own_generate_is_judged_as_it_is(run_cell: Callable[..., JudgedRun], side: str) -> None:
    """A target's own `generate` passes where a batch is answered as each prompt alone, and fails where it is not."""
    with answering_targets.answered(getattr(answering_targets, f"padded_{side}")) as target:
        run = run_cell(target, looks=("decoding",), steps=100, questions=16)
    outcomes = [f.outcome for f in run.verdict.of("decode_batch_invariance")]
    assert outcomes == [Outcome.PASSED if side == "left" else Outcome.FAILED], run.record.decoding
    assert run.record.decoding is not None
    assert run.record.decoding.own
    right = [a.parsed == a.expected for a in run.record.answers]
    assert all(right) == (side == "left")


def test_a_targets_own_generate_is_broken_by_the_fault(run_cell: Callable[..., JudgedRun]) -> None:
    """The fault that pads on the right reaches a target that pads by hand."""
    with answering_targets.answered(answering_targets.padded_left) as target:
        run = run_fault(run_cell, "right_padded_generation", target, steps=100)
    assert [f.outcome for f in run.verdict.of("decode_batch_invariance")] == [Outcome.FAILED]


def test_a_targets_own_generate_must_answer_every_prompt(run_cell: Callable[..., JudgedRun]) -> None:
    """One text for several prompts breaks the contract."""
    with answering_targets.answered(answering_targets.too_few) as target, pytest.raises(TargetError, match="8 texts"):
        run_cell(target, steps=1)


def test_scores_of_generated_tokens_are_seen_without_a_look(run_cell: Callable[..., JudgedRun]) -> None:
    """The quick tier counts the scores that answers are decoded from: one for each prompt and token."""
    seen = run_cell(SUMS, steps=2).record.generation
    assert seen is not None
    assert (seen.prompts, seen.nonfinite, seen.scores) == (8, 0, 8 * seen.forwards)
    assert seen.forwards >= 1


class Kinked(nn.Module):
    """Sixteen units behind a ReLU, the first of them `start` away from its kink."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 16, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            self.layer.weight.fill_(1.0)[0] = start

    def gradients(self) -> tuple[float, dict[str, Tensor | None]]:
        """A loss, and the gradient of each weight."""
        loss = self.layer(torch.ones(1, 1, dtype=torch.bfloat16)).relu().float().sum()
        self.layer.weight.grad = None
        loss.backward()
        assert self.layer.weight.grad is not None
        return loss.item(), {"first": self.layer.weight.grad[0].float(), "second": self.layer.weight.grad[1].float()}


@pytest.mark.parametrize(("start", "follows"), [(1e-5, True), (0.5, False)], ids=["at-the-kink", "away-from-it"])
def test_a_gradient_that_follows_the_rounding_is_no_evidence(start: float, follows: bool) -> None:
    """Where a unit flips with the rounding of its own result; a wrong kernel is reported anywhere else."""
    model = Kinked(start)
    step = object.__new__(paths._FirstStep)
    step.arithmetic, step.model, step.plain = "bfloat16", model, model
    step._own = lambda held: held.gradients()  # type: ignore[method-assign]
    loss, gradients = model.gradients()
    found = [PathRecord(name="plain kernels", loss=loss, max_change=1.0, tensor="first")]
    with pytest.raises(InapplicableError, match="follow the rounding") if follows else contextlib.nullcontext():
        step._require_repeatable(loss, gradients, found)


def test_checkpointing_is_seen(run_cell: Callable[..., JudgedRun]) -> None:
    """The record says that the training checkpoints."""
    seen = run_cell("tests.targets.healthy:checkpointing", looks=("paths",), questions=0, steps=2).record.paths
    assert seen is not None
    assert "checkpointing" in seen.switched


def test_checkpointing_is_asked_for_by_no_deprecated_name(tmp_path: Path) -> None:
    """It is seen, and switched off for the plain path, also in a project that makes warnings errors."""
    given = {"model": None, "dtype": "float32", "output_dir": str(tmp_path), "use_cpu": True}
    model: Any = healthy_targets.sdpa(**given).model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forwards.checkpointing(model) == []
        for layer in model.get_base_model().model.layers:
            layer.gradient_checkpointing = True
        assert forwards.checkpointing(model) == list(model.get_base_model().model.layers)
        with paths._plainly(model):
            assert forwards.checkpointing(model) == []


def test_every_row_of_a_pack_is_compared(run_cell: Callable[..., JudgedRun]) -> None:
    """Positions that start again tell of packs; turns of a conversation are none."""
    packed, chat = (
        run_cell(f"tests.targets.healthy:{name}", looks=("context",)).record.context
        for name in ("packed", "llama_chat")
    )
    assert packed is not None
    assert chat is not None
    assert {c.packed == c.rows for c in packed.comparisons} == {True}
    assert {c.packed for c in chat.comparisons} == {0}


def test_the_written_loss_is_compared_where_it_is_the_trainers(run_cell: Callable[..., JudgedRun]) -> None:
    """Plain cross-entropy is checked against itself written out, a loss of one's own against itself alone."""
    for target, names in (("own_loss", ["plain kernels", "plain loss"]), ("own_loss_normalised", ["plain kernels"])):
        for precision in ("fp32", "bf16-true"):
            seen = run_cell(f"tests.targets.healthy:{target}", precision=precision, looks=("paths",)).record.paths
            assert seen is not None
            assert [p.name for p in seen.paths] == names


def test_a_gradient_that_is_nothing_but_rounding_is_not_compared(run_cell: Callable[..., JudgedRun]) -> None:
    """A number that is added to the score of every place changes no probability."""
    target = "tests.targets.tasks:question_answering"
    run = run_cell(target, precision="bf16-true", batch=(4, 1), steps=1, looks=("paths",), questions=0)
    assert [f.outcome for f in run.verdict.of("path_equivalence")] == [Outcome.PASSED]
