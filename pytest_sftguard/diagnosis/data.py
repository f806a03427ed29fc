"""Causes in the data: labels, prompts, and rows that see what they should not."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import context_independence, prompt_is_prefix, supervision_audit
from pytest_sftguard.records import ContextRecord

_Defect = supervision_audit.Reason


def _wrong_labels(case: Case) -> list[Clue]:
    clues = shown_by(_Defect.WRONG_ANSWER)(case)
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
    clues = [] if whole_batches else shown_by(_Defect.UNSUPERVISED)(case)
    if clues and case.failed(_Defect.MISMATCHED):
        clues.append(against("labels that other rows have are not their own tokens either"))
    return clues


def _shifted(case: Case) -> list[Clue]:
    """Labels that are their rows' tokens, one place early."""
    return shown_by(_Defect.MISMATCHED)(case) if _offset(case) == 1 else []


def _misplaced(case: Case) -> list[Clue]:
    offset = _offset(case)
    clues = shown_by(_Defect.MISMATCHED)(case) if offset not in (None, 1) else []
    return [*clues, hint(f"every label is the token {offset:+d} places from its own")] if clues else []


def _offset(case: Case) -> int | None:
    """The shift that explains all mismatched labels; None where none does."""
    seen = case.record.supervision
    defects = (*seen.trained_defects, *seen.dataset_defects) if seen is not None else ()
    return next((d.offset for d in defects if d.name == "mismatched"), None)


def _other_labels(case: Case) -> list[Clue]:
    return shown_by(_Defect.MISMATCHED)(case) if _offset(case) is None else []


def _prompt_form(case: Case) -> list[Clue]:
    return [] if case.failed(_Defect.DOUBLED_BOS) else shown_by(*prompt_is_prefix.Reason)(case)


def _evaluation(case: Case) -> list[Clue]:
    seen = case.record.evaluation
    if seen is None or not seen.unlabelled:
        return []
    return [
        decisive(f"{seen.unlabelled} of {seen.rows} evaluation rows have no supervised token"),
        *([hint(f"{seen.nonfinite} evaluation batches have a loss that is not finite")] if seen.nonfinite else []),
        *([hint("the Trainer drops such batches from eval_loss")] if seen.nonfinite else []),
    ]


def _as_batched(case: Case) -> ContextRecord | None:
    """The comparison of rows in context, where they differ as they were batched in training, and in no other setting.

    So the model is sound, and what differs is what the training's collator gives it.
    """
    seen, found = case.record.context, case.failed(context_independence.Reason.DEPENDENT)
    limit = found[0].limit if found else None
    if seen is None or not isinstance(limit, float) or seen.blind_queries or seen.low_rotary or not case.repeats:
        return None
    far = {c.setting for c in seen.comparisons if not c.max_change <= limit}
    return seen if far == {"as trained on"} else None


def _packs(case: Case) -> list[Clue]:
    """Evidence that sequences in one row see each other; none where rows are not packed."""
    seen = _as_batched(case)
    packs = [c for c in seen.comparisons if c.packed and c.setting == "as trained on"] if seen is not None else []
    if not packs:
        return []
    worst = max(c.max_change for c in packs)
    return [decisive(f"{packs[0].packed} sequences are packed, and their logits are {worst:.2g} off those alone")]


def _packed(case: Case) -> list[Clue]:
    return [] if _state_runs_on(case) else _packs(case)


def _state_runs_on(case: Case) -> list[Clue]:
    clues, seen = _packs(case), case.record.context
    # a mask of ones would already mix what attends
    if not clues or seen is None or not seen.recurrent or "position_ids" not in seen.inputs:
        return []
    if "attention_mask" in seen.inputs:
        return []
    return [*clues, sign(f"position_ids tell the sequences apart, and layers of {seen.recurrent} do not read them")]


def _padding_attended(case: Case) -> list[Clue]:
    seen = _as_batched(case)
    if seen is None or _packs(case) or not seen.padding_seen:
        return []
    found = case.failed(context_independence.Reason.DEPENDENT)
    given = "a mask that lets it through" if "attention_mask" in seen.inputs else "no attention_mask"
    return [decisive(found[0]), sign(f"{seen.padding_seen} tokens of padding stand in front of rows, with {given}")]


def _padding_counted(case: Case) -> list[Clue]:
    seen = _as_batched(case)
    if seen is None or _packs(case) or seen.padding_seen or "attention_mask" not in seen.inputs:
        return []
    if "position_ids" in seen.inputs or seen.rotary or seen.masks:
        return []
    found = case.failed(context_independence.Reason.DEPENDENT)
    return [
        decisive(found[0]),
        hint("the mask hides the padding, no position_ids are given, and positions are not rotary but absolute"),
    ]


def _batched_otherwise(case: Case) -> list[Clue]:
    if _as_batched(case) is None or _packs(case):
        return []
    return [decisive(f) for f in case.failed(context_independence.Reason.DEPENDENT)[:1]]


def _blind(case: Case) -> list[Clue]:
    clues = shown_by(context_independence.Reason.BLIND)(case)
    return [*clues, hint("the loss is not finite")] if clues and case.lost else clues


def _nonfinite_batch(case: Case) -> list[Clue]:
    """One step whose loss is not finite, between others whose loss is, with sound weights and without float16."""
    lost, steps = case.lost, case.record.steps
    if lost is None or not case.sound_until_lost or lost.supervised_tokens == 0:
        return []
    if "float16" in case.record.compute_dtypes:
        return []
    clues = [sign(f"the raw loss of step {lost.step} is {lost.loss} while every weight was still finite")]
    finite = [x for x in case.record.losses[: lost.step - 1] if math.isfinite(x)]
    if finite and max(finite) > 2 * abs(finite[0]):
        clues += [against("the loss had been rising"), against("the batch before it was lost to the same")]
    elif lost.step > 1 or len(steps) == 1:
        clues.append(sign(f"the {lost.step - 1} steps before it were sound: it is this batch, not the model"))
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
        _shifted,
    ),
    Mechanism(
        "labels_misplaced",
        "the labels are their rows' tokens at other places, so that the model learns another token than the next",
        "give labels that equal input_ids where they are not -100, and look at what rolls or pads them",
        _misplaced,
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
        "end_token_not_supervised",
        "no end token is among the labels of an answer, so that the model does not learn to stop",
        "append the end token to each answer, and do not mask it, as happens where it is the pad token too",
        shown_by(_Defect.ENDLESS),
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
        "state_runs_on_across_packs",
        "layers with a state carry it from one packed sequence into the next, which position_ids do not prevent",
        "pad instead of packing, or use kernels that are told where sequences begin (seq_idx, cu_seqlens)",
        _state_runs_on,
    ),
    Mechanism(
        "padding_attended",
        "tokens attend to padding in front of their row, so that what is said of a row depends on its batch",
        "give an attention_mask that is 0 on padding",
        _padding_attended,
    ),
    Mechanism(
        "positions_count_padding",
        "rows are padded on the left and their positions count the padding, which a mask does not take back",
        "give position_ids that begin at each row's first token (attention_mask.cumsum(-1) - 1), or pad on the right",
        _padding_counted,
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
    Mechanism(
        "labels_are_not_the_rows_tokens",
        "labels that count are not the tokens of their own row: they come from other rows, or were rewritten",
        "compare input_ids and labels of one row behind the collator; where the target means it so, waive"
        " supervision_audit",
        _other_labels,
        locates=True,
    ),
    Mechanism(
        "batch_built_otherwise",
        "rows say other things as the training batches them than alone, and the same when they are batched anew",
        "look at the collator: attention_mask, position_ids, and the order of both against the tokens",
        _batched_otherwise,
        locates=True,
    ),
)
"""Causes in the data; of two that are worth the same, the earlier goes first."""
