"""Causes in the data: labels, prompts, and rows that see what they should not."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, against, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import (
    base_finite,
    context_independence,
    loss_footprint,
    prompt_is_prefix,
    rows_arrive,
    supervision_audit,
)
from pytest_sftguard.records import ContextRecord
from pytest_sftguard.verdicts import Finding

_Defect = supervision_audit.Reason
_Arrival = rows_arrive.Reason
_FEW = 3
"""Fewest rows that a limit on the length truncates: in one or two something else may have taken the end."""


def _wrong_labels(case: Case) -> list[Clue]:
    clues = shown_by(_Defect.WRONG_ANSWER)(case)
    if clues and any(a.parsed is not None and not a.is_number for a in case.record.answers):
        clues.append(against("the parser gives NaN for the answers, so that no label could be right"))
    return [*clues, *_of_strange_rows(case)] if clues else []


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
    return [*clues, *_of_strange_rows(case)] if clues else []


def _of_strange_rows(case: Case) -> list[Clue]:
    """Doubts in what the labels say where tokens were changed, or hidden by the mask, on the way to the model."""
    seen = case.record.supervision
    if seen is None or not seen.strange_inputs:
        return []
    return [against(f"{seen.strange_inputs} of {seen.trained_rows} rows have other tokens than the data set's")]


def _share(finding: Finding) -> float:
    """Share of the rows that a finding of the audit counts."""
    total = finding.evidence.get("total")
    return (finding.observed or 0.0) / total if isinstance(total, int) and total else 0.0


def _doubled_bos(case: Case) -> list[Clue]:
    """What a template does to one row, it does to all."""
    found = [f for f in case.failed(_Defect.DOUBLED_BOS) if _share(f) > 0.9]
    if not found or case.failed(_Defect.MISMATCHED):
        return []
    return [decisive(found[0]), sign("every row has it, and its labels are its own tokens")]


def _truncated(case: Case) -> list[Clue]:
    found = [f for f in case.failed(_Defect.TRUNCATED) if (f.observed or 0.0) >= _FEW]
    if not found or case.failed(_Defect.MISMATCHED):
        return []
    # epochs count a row again
    seen = case.record.supervision
    in_data = [d.rows for d in seen.dataset_defects if d.name == "truncated"] if seen is not None else []
    if in_data and in_data[0] < _FEW:
        return []
    lacking = max((f.observed or 0.0 for f in case.failed(_Defect.ENDLESS, _Defect.WRONG_ANSWER)), default=0.0)
    # what is truncated lacks its end first, and then a part of its answer
    if lacking > max(f.observed or 0.0 for f in found):
        return [sign(found[0]), against("shorter rows lack their answers or ends as well")]
    return [decisive(found[0])]


def _endless(case: Case) -> list[Clue]:
    found = [f for f in case.failed(_Defect.ENDLESS) if _share(f) >= 0.5]
    return [decisive(found[0]), *_of_strange_rows(case)] if found and not case.failed(_Defect.MISMATCHED) else []


def _defective_rows(case: Case) -> list[Clue]:
    """Defects that the data set has, in a part of its rows; what is everywhere is the form of the rows."""
    seen = case.record.supervision
    if seen is None or seen.strange_inputs or seen.strange_labels or not seen.dataset_rows:
        return []
    mine = {d.name for d in seen.dataset_defects if d.rows < seen.dataset_rows}
    found = [f for f in case.failed("supervision_audit") if f.evidence.get("defect") in mine]
    return [decisive(found[0]), hint("the rows have it in the data set, too")] if found else []


def _rows_changed(case: Case) -> list[Clue]:
    # the row was compared with itself, place by place
    if arrived := case.failed(_Arrival.IDS, _Arrival.REPLACED, _Arrival.MASK, _Arrival.PADDING):
        return [decisive(f) for f in arrived]
    seen = case.record.supervision
    invariants = ("supervision_audit", "prompt_is_prefix", "context_independence")
    found = [*case.failed(*invariants), *case.failed(base_finite.Reason.ZERO_EMBEDDINGS)]
    if seen is None or not seen.strange_inputs or not found:
        return []
    strange = (
        f"{seen.strange_inputs} of {seen.trained_rows} rows as trained on have the tokens of no row of the data set"
    )
    return [decisive(strange), hint(found[0])]


def _labels_changed(case: Case) -> list[Clue]:
    if (arrived := case.failed(_Arrival.LABELS)) and not case.failed(_Arrival.IDS, _Arrival.REPLACED):
        return [decisive(f) for f in arrived]
    seen, found = case.record.supervision, case.failed("supervision_audit", "prompt_is_prefix")
    if seen is None or seen.strange_inputs or not seen.strange_labels or not found:
        return []
    strange = f"{seen.strange_labels} of {seen.trained_rows} rows as trained on have other labels than in the data set"
    return [decisive(strange), hint(found[0])]


def _shifted(case: Case) -> list[Clue]:
    """Labels that are their rows' tokens, one place early."""
    return [*shown_by(_Defect.MISMATCHED)(case), *_of_strange_rows(case)] if _offset(case) == 1 else []


def _misplaced(case: Case) -> list[Clue]:
    offset = _offset(case)
    clues = shown_by(_Defect.MISMATCHED)(case) if offset not in (None, 1) else []
    clues += _of_strange_rows(case) if clues else []
    return [*clues, hint(f"every label is the token {offset:+d} places from its own")] if clues else []


def _offset(case: Case) -> int | None:
    """The shift that explains all mismatched labels; None where none does."""
    seen = case.record.supervision
    defects = (*seen.trained_defects, *seen.dataset_defects) if seen is not None else ()
    return next((d.offset for d in defects if d.name == "mismatched"), None)


def _other_labels(case: Case) -> list[Clue]:
    return [*shown_by(_Defect.MISMATCHED)(case), *_of_strange_rows(case)] if _offset(case) is None else []


def _prompt_form(case: Case) -> list[Clue]:
    seen, found = case.record.prompts, case.failed(*prompt_is_prefix.Reason)
    if seen is None or not found or _doubled_bos(case):
        return []
    # what a template or a tokenizer does to one row, it does to all
    whole = max(seen.deviating, seen.short) > 0.9 * seen.matched if seen.matched else bool(seen.strange_forms)
    return [decisive(found[0])] if whole else [sign(found[0])]


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
    if seen is None:
        return []
    packs = [c for c in seen.comparisons if c.packed and c.setting == "as trained on"]
    # a stray BOS in some rows does not make packs of them
    if not packs or not ("position_ids" in seen.inputs or all(c.packed == c.rows for c in packs)):
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
    text = f"{seen.padding_seen} tokens of padding stand in front of rows, with {given}"
    # tokens that were shifted away leave padding behind, too
    return [decisive(found[0]), hint(text), *_of_strange_rows(case)]


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


def _padding_supervised(case: Case) -> list[Clue]:
    """Labels on padding that are not there because labels, tokens or mask of a row came to another one."""
    seen = case.record.supervision
    strange = seen is not None and (seen.strange_inputs or seen.strange_labels)
    if strange or case.failed(_Defect.MISMATCHED, "rows_arrive"):
        return []
    counted = case.failed(loss_footprint.Reason.PADDING)
    return [*map(decisive, case.failed(_Defect.PADDING_SUPERVISED)[:1]), *map(sign, counted[:1])]


DATA: tuple[Mechanism, ...] = (
    Mechanism(
        "padding_supervised",
        "labels lie on padding, so that the model learns to predict it",
        "set labels to -100 wherever the attention mask is 0, as in labels.masked_fill(attention_mask == 0, -100)",
        _padding_supervised,
    ),
    Mechanism(
        "mask_hides_tokens",
        "the attention mask hides tokens of the rows, which the others then do not see",
        "look at what builds the mask: it is 1 at each token of a row and 0 at the padding alone",
        shown_by(_Defect.HIDDEN_TOKENS),
    ),
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
        _doubled_bos,
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
        _truncated,
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
        _endless,
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
        "the loss of one step is not finite while every weight is, and that step writes NaN into weights and moments",
        "look at the rows of that batch, then at what forward pass and loss make of them; stop at the first such loss",
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
        "rows_changed_on_the_way",
        "rows reach the model with other tokens than the data set has: the collator changes them, or a mask hides",
        "compare a row of the data set with the same row behind the collator: input_ids, attention_mask, padding",
        _rows_changed,
        locates=True,
    ),
    Mechanism(
        "labels_changed_on_the_way",
        "rows reach the model with other labels than the data set has",
        "compare a row of the data set with the same row behind the collator",
        _labels_changed,
        locates=True,
    ),
    Mechanism(
        "defective_rows_in_the_data_set",
        "a part of the data set's own rows is defective",
        "look at the rows that the finding shows, and at what made them: tokenisation, templates, truncation",
        _defective_rows,
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
