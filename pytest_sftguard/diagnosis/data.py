"""Causes in the data: labels, prompts, and rows that see what they should not."""

from __future__ import annotations

import math
from collections.abc import Callable

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.records import DefectRecord
from pytest_sftguard.rendering import message


def _defects(case: Case, *kinds: str) -> list[DefectRecord]:
    """What the audit of the labels found of these kinds, where the invariant counts it as a failure."""
    audit = case.record.supervision
    if audit is None or not case.failed("supervision_audit"):
        return []
    return [d for d in (*audit.trained_defects, *audit.dataset_defects) if d.name in kinds]


def _of_kinds(*kinds: str) -> Callable[[Case], list[Clue]]:
    """A look for defects of `kinds` alone."""

    def look(case: Case) -> list[Clue]:
        found = _defects(case, *kinds)
        clues = [decisive(f"{d.rows} rows: {d.name.replace('_', ' ')} ({d.example})") for d in found[:1]]
        if (
            clues
            and "wrong_answer" in kinds
            and any(a.parsed is not None and not a.is_number for a in case.record.answers)
        ):
            clues.append(against("the parser gives NaN for the answers, so that no label could be right"))
        return clues

    return look


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
    found = _defects(case, "unsupervised")
    if not found or any(s.supervised_tokens == 0 for s in case.record.steps):
        return []
    rows = max(d.rows for d in found)
    return [decisive(f"{rows} rows have no label that counts, and others have: {found[0].example}")]


def _prompt_form(case: Case) -> list[Clue]:
    seen = case.record.prompts
    found = case.failed("prompt_is_prefix")
    if seen is None or not found or _defects(case, "doubled_bos"):
        return []
    return [decisive(message(found[0]))]


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
    seen = case.record.context
    if seen is None or not seen.blind_queries:
        return []
    return [
        decisive(f"{seen.blind_queries} rows of the attention masks let a token see nothing, itself included"),
        *([hint("the loss is not finite")] if case.lost else []),
    ]


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
        _of_kinds("shifted", "mismatched"),
    ),
    Mechanism(
        "prompt_supervised",
        "the prompt is supervised with the answer, and most of what is learned is prompts",
        "set the labels of the prompt to -100 (assistant_only_loss, completion_only_loss, or by hand)",
        _of_kinds("prompt_supervised", "prompt_supervised_unmatched"),
    ),
    Mechanism(
        "duplicate_bos",
        "the template renders a BOS and the tokenizer adds another",
        "tokenise a rendered template with add_special_tokens=False",
        _of_kinds("doubled_bos"),
    ),
    Mechanism(
        "token_id_out_of_range",
        "a token id or label is larger than the embedding or the vocabulary",
        "resize the embeddings to the tokenizer, and check where the ids come from",
        _of_kinds("unknown_id", "unknown_label"),
    ),
    Mechanism(
        "rows_truncated",
        "rows are truncated at the maximal length, and their answers or ends with them",
        "raise the maximal length, or leave such rows out",
        _of_kinds("truncated"),
    ),
    Mechanism(
        "wrong_labels",
        "what is supervised is not the answer to the question of its row",
        "compare the decoded labels of a row with its answer",
        _of_kinds("wrong_answer", "endless"),
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
