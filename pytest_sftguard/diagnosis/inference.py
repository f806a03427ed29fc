"""Causes in forward and backward passes that are computed differently, and in how answers are made and read."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import (
    answers_beat_base,
    base_finite,
    context_independence,
    decode_batch_invariance,
    effect_size,
    identity_at_init,
    path_equivalence,
    strict_answers,
)
from pytest_sftguard.records import DecodingRecord, PathsRecord
from pytest_sftguard.verdicts import Finding

_Decoding = decode_batch_invariance.Reason
_Path = path_equivalence.Reason


def _batched_answers(case: Case) -> tuple[DecodingRecord | None, list[Finding]]:
    """How a batch changed the answers, and the findings that say so; of a model whose forward passes repeat."""
    seen, found = case.record.decoding, case.failed(_Decoding.ANSWERS, _Decoding.SCORES)
    return (seen, found) if seen is not None and seen.repeated else (None, [])


def _right_padding(case: Case) -> list[Clue]:
    seen, found = _batched_answers(case)
    if seen is None or not found or not seen.right_padded:
        return []
    return [decisive(found[0]), sign(f"{seen.right_padded} of {seen.prompts} prompts have padding behind them")]


def _padding_unmasked(case: Case) -> list[Clue]:
    seen, found = _batched_answers(case)
    if seen is None or not found or not seen.unmasked or seen.right_padded:
        return []
    return [decisive(found[0]), sign(f"{seen.unmasked} tokens of padding are not masked")]


def _answers_in_a_batch(case: Case) -> list[Clue]:
    return [decisive(f) for f in _batched_answers(case)[1][:1]]


def _not_repeated(case: Case) -> list[Clue]:
    """Evaluation mode that is not: noise, dropout, or a state that a forward pass leaves behind."""
    start, first, trip = case.record.initial, case.record.first_step, case.record.round_trip
    clues = shown_by(_Decoding.NOT_REPEATED)(case)
    disturbed = case.failed(identity_at_init.Reason.OTHER_BITS)
    if disturbed and start is not None and not start.nonzero_b and first is not None and first.random == "model":
        clues += [sign(disturbed[0]), hint("the model draws random numbers in training")]
        clues += [sign(f) for f in case.failed(effect_size.Reason.OTHER_BASE)[:1] if trip is not None]
    return clues


def _junk(case: Case) -> list[Clue]:
    if case.record.answers and all(a.parsed is not None and not a.is_number for a in case.record.answers):
        return []
    return shown_by(strict_answers.Reason.JUNK, strict_answers.Reason.MISREAD)(case)


def _nan_number(case: Case) -> list[Clue]:
    nan = [a for a in case.record.answers if a.parsed is not None and not a.is_number]
    sentence = "parse_answer gave {} for {!r}, and every comparison with it is false"
    return [decisive(sentence.format(a.parsed, a.text[:40])) for a in nan[:1]]


def _path_failures(case: Case) -> list[Finding]:
    """What the training's path to loss and gradients does otherwise, where all of it is finite and repeats."""
    seen = case.record.paths
    if seen is None or seen.nonfinite or any(p.nonfinite for p in seen.paths) or _is_enough(_not_repeated(case)):
        return []
    return case.failed("path_equivalence")


def _gradient_wrong(case: Case) -> list[Clue]:
    found = [f for f in _path_failures(case) if f.because(_Path.OTHER_GRADIENT)]
    if not found or case.failed(_Path.OTHER_LOSS):
        return []
    half = case.failed("fp32_master")
    doubts = [against("trainables are half precision, and so are their gradients")] * 3 if half else []
    return [decisive(found[0]), *doubts]


def _checkpointing(case: Case) -> list[Clue]:
    seen, found = case.record.paths, case.failed(_Path.ONE_SIDED)
    if seen is None or not found or "checkpointing" not in seen.switched:
        return []
    return [decisive(found[0]), hint("they are there without gradient checkpointing")]


def _no_graph(case: Case) -> list[Clue]:
    error = case.error
    # torch's own words for a loss without a graph; it raises the same type for everything
    if (
        error is None
        or error.stage != "train"
        or "does not require grad and does not have a grad_fn" not in error.message
    ):
        return []
    return [decisive(f"backward ended in {error.type}: {error.message}")]


def _other_path(case: Case) -> list[Clue]:
    return [decisive(f) for f in _path_failures(case) if f.because(_Path.OTHER_LOSS)][:1]


def _forward_not_finite(case: Case) -> list[Clue]:
    """A model whose logits are not finite from the first step on, on every path, though its weights are."""
    lost, first, seen = case.lost, case.record.first_step, case.record.paths
    if lost is None or not case.sound_until_lost or lost.supervised_tokens == 0 or _kernel(case) is not None:
        return []
    if case.failed(base_finite.Reason.NONFINITE):
        return []
    text = f"the loss of step {lost.step} is not finite while every weight is"
    logits = first.token_loss if first is not None and lost.step == 1 else None
    if logits is not None and not math.isfinite(logits):
        return [decisive(f"{text}, and the logits are not finite either")]
    everywhere = seen is not None and bool(seen.paths) and not any(math.isfinite(p.loss) for p in seen.paths)
    return [decisive(f"{text}, and so it is on a new model with plain kernels")] if everywhere else []


def _loss_not_finite(case: Case) -> list[Clue]:
    lost, first = case.lost, case.record.first_step
    if lost is None or lost.step != 1 or first is None or first.token_loss is None or not lost.supervised_tokens:
        return []
    if not math.isfinite(first.token_loss):
        return []
    return [decisive(f"the loss of step 1 is {lost.loss}, and its logits give {first.token_loss:.4g}")]


def _kernel(case: Case) -> PathsRecord | None:
    """The comparison of paths, where the training's gives NaN and the plain ones do not."""
    seen = case.record.paths
    if seen is None or not (seen.nonfinite or not math.isfinite(seen.loss)) or not seen.paths:
        return None
    plain = [p for p in seen.paths if not p.nonfinite and math.isfinite(p.loss)]
    return seen if plain and seen.attention in seen.switched else None


def _kernel_forward(case: Case) -> list[Clue]:
    seen = _kernel(case)
    if seen is None or math.isfinite(seen.loss):
        return []
    return [
        decisive(f"the loss is {seen.loss} under {seen.attention}, and {seen.paths[0].loss:.4g} with plain kernels"),
        sign("weights and rows are the same"),
    ]


def _kernel_backward(case: Case) -> list[Clue]:
    seen = _kernel(case)
    if seen is None or not math.isfinite(seen.loss):
        return []
    tensors, kernel = seen.nonfinite, seen.attention
    return [
        decisive(f"the gradients of {tensors} are not finite under {kernel}, and finite with the plain kernels"),
        sign(f"loss, weights and rows are the same ({seen.loss:.4g})"),
    ]


def _rotary(case: Case) -> list[Clue]:
    seen = case.record.context
    if seen is None or not case.failed("context_independence") or not seen.low_rotary:
        return []
    return [decisive(f"{seen.low_rotary} are kept in half precision: positions above 256 are not representable")]


def _context(case: Case) -> list[Clue]:
    """Rows that depend on their neighbours in batches that the guard built, with masks and positions of its own."""
    seen, found = case.record.context, case.failed(context_independence.Reason.DEPENDENT)
    limit = found[0].limit if found else None
    if seen is None or not isinstance(limit, float) or not case.finite or _is_enough(_not_repeated(case)):
        return []
    far = {c.setting for c in seen.comparisons if not c.max_change <= limit}
    if "alone" in far or not far & {"padded left", "padded right"}:
        return []
    return [decisive(found[0]), hint(f"it is so in batches that are {' and '.join(sorted(far))}")]


def _other_kernel(case: Case) -> list[Clue]:
    """Rows alone that say other things under another attention implementation."""
    seen, found = case.record.context, case.failed(context_independence.Reason.DEPENDENT)
    limit = found[0].limit if found else None
    if seen is None or not isinstance(limit, float) or not case.finite or _is_enough(_not_repeated(case)):
        return []
    alone = [c for c in seen.comparisons if c.setting == "alone" and not c.max_change <= limit]
    return [decisive(f"a row alone is {alone[0].max_change:.2g} off under {alone[0].attention}")] if alone else []


def _is_enough(clues: list[Clue]) -> bool:
    return sum(c.weight for c in clues if c.discriminates) >= 8


INFERENCE: tuple[Mechanism, ...] = (
    Mechanism(
        "attention_kernel_backward_not_finite",
        "the attention kernel's backward pass gives NaN where the plain one does not",
        "use attn_implementation='eager' or 'sdpa', or another version of the kernel",
        _kernel_backward,
    ),
    Mechanism(
        "attention_kernel_forward_not_finite",
        "the attention kernel's forward pass gives NaN where the plain one does not",
        "use attn_implementation='eager' or 'sdpa', or another version of the kernel or of its device's driver",
        _kernel_forward,
    ),
    Mechanism(
        "checkpointing_drops_gradients",
        "gradient checkpointing gives a part of the adapter no gradient, as re-entrant checkpointing of frozen inputs",
        "set gradient_checkpointing_kwargs={'use_reentrant': False}, or call model.enable_input_require_grads()",
        _checkpointing,
    ),
    Mechanism(
        "loss_has_no_graph",
        "no operation that led to the loss was recorded, so that there is nothing to differentiate",
        "look for no_grad, detach and frozen adapters; re-entrant checkpointing needs inputs that require gradients"
        " (use_reentrant=False, or model.enable_input_require_grads())",
        _no_graph,
    ),
    Mechanism(
        "evaluation_is_random",
        "forward passes in evaluation mode do not repeat: noise or dropout stays on",
        "look for noise that ignores module.training, functional dropout without training=self.training, and hooks",
        _not_repeated,
    ),
    Mechanism(
        "loss_gradient_wrong",
        "the loss is right and its gradient is not: a fused kernel, checkpointing or compilation computes another one",
        "train without the fused loss, compilation or checkpointing, one at a time, and compare",
        _gradient_wrong,
    ),
    Mechanism(
        "rotary_frequencies_in_half_precision",
        "the frequencies of rotary positions were cast with the weights, and tell far positions apart no more",
        "load with from_pretrained(dtype=...), which leaves them in float32, instead of model.to(torch.bfloat16)",
        _rotary,
    ),
    Mechanism(
        "padded_on_the_right",
        "prompts are padded on the right in a batch, so that the answer follows padding",
        "set tokenizer.padding_side = 'left' for generation, and pass attention_mask and position_ids",
        _right_padding,
    ),
    Mechanism(
        "prompts_padded_without_mask",
        "prompts of a batch attend to the padding of their batch, because no mask hides it",
        "pass the tokenizer's attention_mask to generate",
        _padding_unmasked,
    ),
    Mechanism(
        "nan_taken_for_a_number",
        "the parser reads NaN or infinity as a number, which no comparison finds wrong",
        "read a strict grammar, and give None for all else",
        _nan_number,
    ),
    Mechanism(
        "parser_accepts_junk",
        "the parser finds a number where there is no answer",
        "match the whole answer against a strict grammar, and give None for all else",
        _junk,
    ),
    Mechanism(
        "parser_raises",
        "the parser raises on texts that a model may well generate",
        "match the whole answer against a strict grammar, and give None for all else",
        shown_by(strict_answers.Reason.RAISED),
    ),
    Mechanism(
        "rows_depend_on_their_batch",
        "what the model says of a row depends on what else is in the batch, whatever the masks and positions",
        "look for layers that mix rows or ignore the attention mask: statistics over the batch, hooks, own kernels",
        _context,
    ),
    Mechanism(
        "forward_not_finite",
        "the forward pass makes NaN or infinity of finite weights",
        "look at the first module whose output is not finite, with forward hooks: norms, divisions, casts, own kernels",
        _forward_not_finite,
        locates=True,
    ),
    Mechanism(
        "loss_not_finite",
        "the loss is not finite though the logits are",
        "look at compute_loss: what it divides by, weighs with, and takes the logarithm of",
        _loss_not_finite,
        locates=True,
    ),
    Mechanism(
        "attention_kernels_disagree",
        "a row alone says other things under another attention implementation",
        "compare the attention kernel with the eager one on one row: its mask, scale, dropout, window",
        _other_kernel,
        locates=True,
    ),
    Mechanism(
        "training_path_computes_otherwise",
        "the training's own path gives another loss than plain kernels give for the same weights and rows",
        "train without the fused loss, compilation or checkpointing, one at a time, and compare",
        _other_path,
        locates=True,
    ),
    Mechanism(
        "answers_depend_on_their_batch",
        "prompts are answered otherwise in a batch than alone",
        "look at the padding, attention_mask and position_ids that reach the model in generate",
        _answers_in_a_batch,
        locates=True,
    ),
    Mechanism(
        "learned_something_else",
        "the loss says that the answers are learned, and the answers say otherwise",
        "compare a training row, decoded, with the prompt and the expected answer at inference, token by token",
        shown_by(answers_beat_base.Reason.PROMISE_BROKEN),
        locates=True,
    ),
)
"""Causes in the passes and in inference; of two that are worth the same, the earlier goes first."""
