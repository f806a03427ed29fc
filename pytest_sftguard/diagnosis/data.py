"""Causes in the data: labels, prompts, and rows that see what they should not."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import context_independence, prompt_is_prefix, supervision_audit

_Defect = supervision_audit.Reason


def _wrong_labels(case: Case) -> list[Clue]:
    clues = shown_by(_Defect.WRONG_ANSWER, _Defect.ENDLESS)(case)
    if clues and any(a.parsed is not None and not a.is_number for a in case.record.answers):
        clues.append(against("the parser gives NaN for the answers, so that no label could be right"))
    return clues


def _labels_masked(case: Case) -> list[Clue]:
    steps = case.record.steps
    empty = [s.step for s in steps if s.supervised_tokens == 0]
    clues = []
    if empty:
        clues.append(decisive(f"{len(empty)} of {len(steps)} steps hold no label that is not -100 (first: {empty[0]})"))
        clues.append(sign("a loss without labels is 0/0, its gradient is 0, and the Trainer logs both as 0.0"))
        if all(s.grad_norm == 0 for s in steps):
            clues.append(hint("the gradients are exactly 0, not NaN"))
    return clues


def _rows_masked(case: Case) -> list[Clue]:
    whole_batches = any(s.supervised_tokens == 0 for s in case.record.steps)
    return [] if whole_batches else shown_by(_Defect.UNSUPERVISED)(case)


def _prompt_form(case: Case) -> list[Clue]:
    return [] if case.failed(_Defect.DOUBLED_BOS) else shown_by(*prompt_is_prefix.Reason)(case)


def _evaluation(case: Case) -> list[Clue]:
    seen = case.record.evaluation
    if seen is None or not seen.unlabelled:
        return []
    return [
        sign(f"{seen.unlabelled} of {seen.rows} evaluation rows have no supervised token"),
        *([sign(f"{seen.nonfinite} evaluation batches have a loss that is not finite")] if seen.nonfinite else []),
        *([hint("the Trainer drops such batches from eval_loss")] if seen.nonfinite else []),
    ]


def _packed(case: Case) -> list[Clue]:
    seen = case.record.context
    if seen is None or not case.failed("context_independence"):
        return []
    packs = [c for c in seen.comparisons if c.packed and c.max_change > 0]
    worst = max((c.max_change for c in packs), default=0.0)
    if not packs or seen.blind_queries or seen.low_rotary:
        return []
    return [decisive(f"{packs[0].packed} sequences are packed, and their logits are {worst:.2g} off those alone")]


def _blind(case: Case) -> list[Clue]:
    clues = shown_by(context_independence.Reason.BLIND)(case)
    return [*clues, hint("the loss is not finite")] if clues and case.lost else clues


def _nonfinite_batch(case: Case) -> list[Clue]:
    lost = case.lost
    if lost is None or not case.sound_until_lost or lost.supervised_tokens == 0:
        return []
    clues = [sign(f"the raw loss of step {lost.step} is {lost.loss} while every weight was still finite")]
    finite = [x for x in case.record.losses[: lost.step - 1] if math.isfinite(x)]
    if finite and max(finite) > 2 * finite[0]:
        clues += [against("the loss had been rising"), against("the batch before it was lost to the same")]
    elif lost.step > 1:
        clues.append(sign(f"the {lost.step - 1} steps before it were sound: it is this batch, not the model"))
    if "float16" in case.record.compute_dtypes:
        clues.append(against("the arithmetic is float16, in which a sound batch may overflow"))
    else:
        clues.append(sign("the arithmetic has float32's range"))
    return clues


DATA: tuple[Mechanism, ...] = (
    Mechanism(
        "all_labels_masked",
        "whole batches have no supervised token, so that there is nothing to learn from",
        "look at the labels of the first batches: truncation, a template that is not found, or an empty assistant mask",
        _labels_masked,
    ),
    Mechanism(
        "rows_without_labels",
        "a part of the rows has no supervised token, and is lost to the training",
        "look for what those rows have in common: a response template that tokenises otherwise in context, truncation",
        _rows_masked,
    ),
    Mechanism(
        "labels_shifted_twice",
        "the labels are shifted before the model, which shifts them again: it learns the token after next",
        "give labels that equal input_ids where they are not -100; the model's loss shifts them",
        shown_by(_Defect.MISMATCHED),
    ),
    Mechanism(
        "prompt_supervised",
        "the prompt is supervised with the answer, and most of what is learned is prompts",
        "set the labels of the prompt to -100 (assistant_only_loss, completion_only_loss, or by hand)",
        shown_by(_Defect.PROMPT_SUPERVISED, _Defect.PROMPT_SUPERVISED_UNMATCHED),
    ),
    Mechanism(
        "duplicate_bos",
        "the template renders a BOS and the tokenizer adds another",
        "tokenise a rendered template with add_special_tokens=False",
        shown_by(_Defect.DOUBLED_BOS),
    ),
    Mechanism(
        "token_id_out_of_range",
        "a token id or label is larger than the embedding or the vocabulary",
        "resize the embeddings to the tokenizer, and check where the ids come from",
        shown_by(_Defect.UNKNOWN_ID, _Defect.UNKNOWN_LABEL),
    ),
    Mechanism(
        "rows_truncated",
        "rows are truncated at the maximal length, and their answers or ends with them",
        "raise the maximal length, or leave such rows out",
        shown_by(_Defect.TRUNCATED),
    ),
    Mechanism(
        "wrong_labels",
        "what is supervised is not the answer to the question of its row",
        "compare the decoded labels of a row with its answer",
        _wrong_labels,
    ),
    Mechanism(
        "prompt_tokens_differ",
        "the tokens of the prompt at inference are not those that the answer followed in training",
        "tokenise prompt and answer apart and join the ids, with the same template in training and inference",
        _prompt_form,
    ),
    Mechanism(
        "attention_row_fully_masked",
        "a query may attend to nothing: its softmax is 0/0, and the NaN spreads through the next layer",
        "mask with the dtype's minimum instead of -inf, or let every token see itself",
        _blind,
    ),
    Mechanism(
        "packed_rows_see_each_other",
        "sequences that are packed into one row attend to each other",
        "restart position_ids in each sequence and give no attention mask of ones, or use a variable-length kernel",
        _packed,
    ),
    Mechanism(
        "evaluation_rows_all_masked",
        "evaluation rows without a label have the loss NaN, and the Trainer's filter drops them from eval_loss",
        "look at the labels of the evaluation set, and set logging_nan_inf_filter=False",
        _evaluation,
    ),
    Mechanism(
        "nonfinite_batch",
        "the loss of one batch is not finite, and the step that it gives writes NaN into weights and moments",
        "look at the rows of that batch; stop at the first loss that is not finite",
        _nonfinite_batch,
    ),
)
"""Causes in the data; of two that are worth the same, the earlier goes first."""
