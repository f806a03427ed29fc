"""Causes in forward and backward passes that are computed differently, and in how answers are made and read."""

from __future__ import annotations

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants.strict_answers import Reason


def _right_padding(case: Case) -> list[Clue]:
    seen = case.record.decoding
    found = case.failed("decode_batch_invariance")
    if seen is None or not found:
        return []
    padded = [hint(f"{seen.padded} prompts are shorter than the longest, and padded")] if seen.padded else []
    return [decisive(found[0]), *padded]


def _junk(case: Case) -> list[Clue]:
    if case.record.answers and all(a.parsed is not None and not a.is_number for a in case.record.answers):
        return []
    found = [f for f in case.failed("strict_answers") if f.because(Reason.JUNK, Reason.MISREAD, Reason.RAISED)]
    return [decisive(f) for f in found[:1]]


def _nan_number(case: Case) -> list[Clue]:
    nan = [a for a in case.record.answers if a.parsed is not None and not a.is_number]
    sentence = "parse_answer gave {} for {!r}, and every comparison with it is false"
    return [decisive(sentence.format(a.parsed, a.text[:40])) for a in nan[:1]]


def _gradient_wrong(case: Case) -> list[Clue]:
    seen = case.record.paths
    found = case.failed("path_equivalence")
    if seen is None or not found or seen.nonfinite or any(p.nonfinite for p in seen.paths):
        return []
    half = case.failed("fp32_master")
    doubts = [against("trainables are half precision, and so are their gradients")] * 3 if half else []
    return [decisive(found[0]), *doubts]


def _kernel_nan(case: Case) -> list[Clue]:
    seen = case.record.paths
    if seen is None or not seen.nonfinite or not seen.paths:
        return []
    if all(p.nonfinite for p in seen.paths):
        return []
    tensors, kernel = seen.nonfinite, seen.attention
    return [decisive(f"the gradients of {tensors} are not finite under {kernel}, and finite with the plain kernels")]


def _rotary(case: Case) -> list[Clue]:
    seen = case.record.context
    if seen is None or not case.failed("context_independence") or not seen.low_rotary:
        return []
    return [decisive(f"{seen.low_rotary} are kept in half precision: positions above 256 are not representable")]


def _context(case: Case) -> list[Clue]:
    """What depends on its neighbours for no reason that is known."""
    return shown_by("context_independence", clue=sign)(case) if case.poisoned is None else []


INFERENCE: tuple[Mechanism, ...] = (
    Mechanism(
        "attention_kernel_backward_not_finite",
        "the attention kernel's backward pass gives NaN where the plain one does not",
        "use attn_implementation='eager' or 'sdpa', or another version of the kernel",
        _kernel_nan,
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
        "rows_depend_on_their_batch",
        "what the model says of a row depends on what else is in the batch",
        "look at attention masks, position_ids, and layers that mix rows",
        _context,
    ),
    Mechanism(
        "learned_something_else",
        "the loss says that the answers are learned, and the answers say otherwise",
        "compare a training row, decoded, with the prompt and the expected answer at inference, token by token",
        shown_by("answers_beat_base", clue=hint),
    ),
)
"""Causes in the passes and in inference; of two that are worth the same, the earlier goes first."""
