"""Cases of rows in company, of one batch on two ways, of evaluation, and of decoding."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import (
    AnsweringRecord,
    ComparisonRecord,
    ContextRecord,
    DecodingRecord,
    DifferenceRecord,
    EvaluationRecord,
    GenerationRecord,
    KeptRecord,
    LookRecord,
    Names,
    PathRecord,
    PathsRecord,
    RunRecord,
)
from tests.support.canned import A, B, healthy, within

NAN = math.nan
NO_ROWS = "the model is given something else than rows of input_ids"


def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802 - one of the tables
    """What the looks would have seen of a healthy run."""
    mode = mode_named(cell.precision)
    return {
        "context": ContextRecord(
            arithmetic="float32",
            asked=2,
            comparisons=(
                ComparisonRecord(setting="as trained on", attention="sdpa", rows=4, max_change=1e-7),
                ComparisonRecord(setting="padded left", attention="eager", rows=4, max_change=1e-7),
            ),
            rotary=2,
            rotary_error=1e-7,
        ),
        "paths": PathsRecord(
            arithmetic=mode.compute_dtype,
            attention="sdpa",
            switched=("sdpa",),
            tensors=len(names),
            loss=4.0,
            asked=2,
            paths=(
                PathRecord(name="plain kernels", loss=4.0, max_change=1e-7, tensor=A),
                PathRecord(name="plain loss", loss=4.0, max_change=1e-7, tensor=A),
            ),
        ),
        "evaluation": EvaluationRecord(batches=2, rows=8, repeat_change=0.0),
        "kept": KeptRecord(
            metric="eval_loss",
            greater_is_better=False,
            loads=True,
            steps=(1, 2, 3),
            values=(4.0, 2.0, 3.0),
            losses=(4.0, 2.0, 3.0),
            best_metric=2.0,
            kept_step=2,
            compared=len(names),
        ),
        "decoding": DecodingRecord(arithmetic="float32", prompts=4, padded=3, max_change=1e-7, repeated=True),
        "answering": AnsweringRecord(prompts=4, forwards=8, compared=4, max_change=1e-7, left_change=0.0),
    }


def DERIVED(record: RunRecord) -> dict[str, Any]:  # noqa: N802 - one of the tables
    """Scores of the answers, where there are any."""
    count = len(record.answers)
    return {"generation": GenerationRecord(prompts=count, forwards=4, scores=4 * count)} if count else {}


def context(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of rows in company."""
    return within(healthy(), "context", **changes)


def compared(**changes: Any) -> RunRecord:
    """The same, with `changes` in the first comparison."""
    first, *others = healthy().context.comparisons
    return context(comparisons=(dataclasses.replace(first, **changes), *others))


def paths(cell: Cell | None = None, **changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the ways."""
    return within(healthy(cell) if cell else healthy(), "paths", **changes)


def path(**changes: Any) -> RunRecord:
    """The same, with `changes` in the first plain path."""
    first, *others = healthy().paths.paths
    return paths(paths=(dataclasses.replace(first, **changes), *others))


def of_type(dtype: str, change: float) -> RunRecord:
    """A record whose first comparison was made in `dtype`, and is off by `change`."""
    return within(compared(max_change=change), "context", arithmetic=dtype)


def paths_of_type(dtype: str, change: float, **changes: Any) -> RunRecord:
    """A record whose ways were computed in `dtype`, and part by `change`."""
    return within(path(max_change=change), "paths", arithmetic=dtype, **changes)


def evaluated(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the evaluation."""
    return within(healthy(), "evaluation", **changes)


def generated(**changes: Any) -> RunRecord:
    """A healthy record with two answers, and `changes` in what was seen of their scores."""
    return within(healthy(answers=[1.0, 2.0]), "generation", **changes)


def decoded(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of decoding."""
    return within(healthy(), "decoding", **changes)


def answering(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the target's own `generate`."""
    return within(healthy(), "answering", **changes)


def kept(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the checkpoint that is kept."""
    return within(healthy(), "kept", **changes)


def named(metric: str, *, greater: bool, values: tuple[float, ...] = (9.0, 5.0, 4.0, 3.0, 2.0)) -> RunRecord:
    """A record of five evaluations whose losses fall and whose first or last checkpoint is kept by `metric`."""
    best = max(values) if greater else min(values)
    return kept(
        metric=metric,
        greater_is_better=greater,
        steps=(1, 2, 3, 4, 5),
        values=values,
        losses=(5.0, 4.0, 3.0, 2.0, 1.0),
        best_metric=best,
        kept_step=values.index(best) + 1,
    )


def parted(margin: float | None) -> tuple[DifferenceRecord, ...]:
    """One prompt that is answered otherwise in a batch, at a place with this margin."""
    return (DifferenceRecord(prompt="1 + 1 =", position=0, margin=margin, alone="2", batched="3"),)


def looked(name: str, **changes: Any) -> RunRecord:
    """A record of a run whose look `name` ended so, and left nothing."""
    record = healthy(**{name: None})
    looks = tuple(LookRecord(name=name, **changes) if k.name == name else k for k in record.looks)
    return dataclasses.replace(record, looks=looks)


FAILURES = {
    "kept_checkpoint_is_best": {
        "loss-maximised": (named("eval_loss", greater=True), "greater_is_better is True, and eval_loss is better the"),
        "own-loss-maximised": (named("eval_ner_loss", greater=True), "keeps the worst of its 5 evaluations"),
        "perplexity-by-default": (named("eval_perplexity", greater=True), "eval_perplexity is better the other way"),
        "accuracy-minimised": (named("eval_accuracy", greater=False), "greater_is_better is False"),
        "unknown-follows-the-loss": (
            named("eval_distance", greater=True),
            "follows the evaluation loss .rank correlation 1.00.: the checkpoint of step 1",
        ),
        "unknown-against-the-loss": (
            named("eval_agreement", greater=False, values=(1.0, 2.0, 3.0, 4.0, 5.0)),
            "rank correlation -1.00.: the checkpoint of step 1 has the highest",
        ),
        "other-value": (kept(best_metric=1.0), "holds 1 for the best eval_loss, and its evaluations gave 2"),
        "no-value": (kept(best_metric=None), "for the best eval_loss, and its evaluations gave 2"),
        "value-nan": (kept(best_metric=NAN), "holds nan for the best"),
        "other-step": (kept(kept_step=3), "was that of step 2, and the checkpoint that is kept is of step 3"),
        "none-kept": (kept(kept_step=None, compared=0), "the checkpoint that is kept is of no step"),
        "gone": (kept(gone=True, compared=0), "no longer exists at the end"),
        "not-loaded": (kept(differing=Names.of([A])), "are not those of the best checkpoint"),
    },
    "evaluation_is_still": {
        "dropout": (evaluated(dropouts=Names.of(["layers.0"])), "dropout was active in evaluations: layers.0"),
        "not-repeated": (evaluated(repeat_change=0.1), "has two losses"),
        "repeat-nan": (evaluated(repeat_change=NAN), "has two losses"),
    },
    "answers_from_adapter": {
        "base": (answering(max_change=0.3, as_base=3), "answers with the base: the first scores of 3 of 4 prompts"),
        "little-of-the-base": (answering(max_change=1e-3, as_base=4), "of 4 of 4 prompts are those"),
        "other-scores": (answering(max_change=0.5), "are not the adapter's own for the same tokens"),
        "scores-nan": (answering(max_change=NAN), "are not the adapter's own"),
        "truncated": (answering(truncated=2, truncated_example="3 of 9 tokens"), "part of 2 of 4 prompts .3 of 9 tok"),
        "dropout": (answering(dropouts=Names.of(["layers.0.dropout"])), "was active in .*: layers.0.dropout; it must"),
        "left-training": (answering(left_training=True), "left the model in training mode"),
        "left-changed": (answering(left_change=0.5, compared=0, max_change=None), "left another model than it was"),
        "left-nan": (answering(left_change=NAN, compared=0, max_change=None), "left another model than it was"),
        "sampled": (answering(resampled=3), "samples: 3 of 4 answers changed with the random seed"),
    },
    "context_independence": {
        "packs": (compared(max_change=1.1, packed=4), "as trained on under sdpa .* see each other"),
        "padded": (
            compared(setting="padded right", max_change=0.1),
            "padded right under sdpa are not those of the same",
        ),
        "change-nan": (compared(max_change=NAN), "are not those of the same tokens alone"),
        "other-arithmetic": (context(arithmetic="float8"), "are not those of the same tokens alone"),
        "nan-logits": (compared(nonfinite=3), "logits of 3 tokens are not finite, as trained on under sdpa"),
        "overflow": (context(overflowed=2), "logits of 2 tokens are not finite, given as trained on"),
        "blind": (context(masks=1, blind_queries=5), "5 rows .* let a token see nothing"),
        "rotary": (context(low_rotary=Names.of(["inv_freq"])), "kept in half precision.*: inv_freq"),
        "rotary-rounded": (context(rotary_error=4e-3), "are not those that the architecture computes"),
        "rotary-nan": (context(rotary_error=NAN), "are not those that the architecture computes"),
        "rotary-where-nothing-compares": (
            context(asked=0, comparisons=(), left_out=NO_ROWS, rotary_error=4e-3),
            "are not those that the architecture computes",
        ),
    },
    "path_equivalence": {
        "other-gradient": (path(max_change=0.3), f"the gradient of {A} is not the one with plain kernels"),
        "change-nan": (path(max_change=NAN), "is not the one with plain kernels"),
        "other-arithmetic": (paths(arithmetic="float8"), "is not the one with plain kernels"),
        "nan-here": (
            paths(nonfinite=Names.of([B])),
            f"first micro-batch are not finite under sdpa, but finite with plain kernels: {B}",
        ),
        "nan-here-alone": (paths(nonfinite=Names.of([B]), asked=0, paths=()), "are not finite under sdpa: "),
        "nan-there": (path(nonfinite=Names.of([B])), f"gradients with plain kernels are not finite: {B}"),
        "one-sided": (
            path(one_sided=Names.of([B])),
            f"1 tensor had a gradient in the training or with plain kernels, and not in both: {B}",
        ),
        "other-loss": (path(loss=4.1), "the loss is 4, and 4.1 with plain kernels"),
        "loss-nan": (paths(loss=NAN), "the loss is nan"),
        "plain-loss-inf": (path(loss=math.inf), "and inf with plain kernels"),
    },
    "eval_and_decode_finite": {
        "eval": (evaluated(nonfinite=1, first_nonfinite="batch 2"), "the loss of 1 of 2 evaluation batches"),
        "eval-in-training": (evaluated(batches_in_training=6, nonfinite=1), "1 of 8 evaluation batches"),
        "eval-logged": (evaluated(nonfinite_losses=Names.of(["eval_loss"])), "not finite: eval_loss"),
        "never-finite": (evaluated(never_finite=Names.of(["eval_auc"])), "were never finite: eval_auc"),
        "best": (evaluated(best_metric_finite=False), "the best metric, .* is not finite"),
        "unlabelled": (evaluated(unlabelled=4), "no supervised token in 4 of 8 evaluation rows"),
        "scores": (generated(nonfinite=3, first_nonfinite=2), "3 of 8 generated tokens .* forward pass 2"),
        "zeros": (generated(zero_ids=2, scores=0), "each of 2 answers is the token id 0"),
    },
    "decode_batch_invariance": {
        "other-answer": (decoded(differences=parted(0.2)), "1 of 4 prompts .*'2' alone, '3' in the batch"),
        "margin-not-known": (decoded(differences=parted(None)), "1 of 4 prompts"),
        "margin-nan": (decoded(differences=parted(NAN)), "1 of 4 prompts"),
        "scores": (decoded(max_change=0.5), "others in a padded batch than alone"),
        "scores-nan": (decoded(max_change=NAN), "others in a padded batch than alone"),
        "not-repeated": (decoded(repeated=False), "do not give the same bits"),
        "own": (decoded(own=True, max_change=None, differences=parted(0.2)), "1 of 4 prompts"),
    },
}

NOT_EVALUATED = {
    "context_independence": {
        "no-comparison": (context(asked=0, comparisons=()), "0 of 0 comparisons"),
        "one-less": (context(asked=3), "2 of 3 comparisons"),
        "nothing-left": (looked("context"), "left nothing to judge by"),
    },
    "path_equivalence": {
        "no-path": (paths(asked=0, paths=()), "0 of 0 plain paths"),
        "one-less": (paths(asked=3), "2 of 3 plain paths"),
        "no-gradient": (paths(tensors=0), "and 0 gradients"),
        "nothing-left": (looked("paths"), "left nothing to judge by"),
    },
    "eval_and_decode_finite": {
        "no-scores": (healthy(answers=[1.0], generation=None), "were not looked at"),
        "no-score": (generated(scores=0), "no scores of generated tokens were seen"),
        "no-batch": (evaluated(batches=0), "gave no batch"),
        "nothing-left": (looked("evaluation"), "left nothing to judge by"),
    },
    "decode_batch_invariance": {
        "one-prompt": (decoded(prompts=1), "1 prompt cannot make a batch"),
        "no-scores": (decoded(max_change=None), "scores of the answers were not compared"),
        "nothing-left": (looked("decoding"), "left nothing to judge by"),
    },
}

THRESHOLDS = {
    ("evaluation_is_still", "limit"): (evaluated(repeat_change=0.1), 0.0, 0.01),
    ("kept_checkpoint_is_best", "min_correlation"): (
        named("eval_distance", greater=True, values=(9.0, 4.0, 5.0, 3.0, 2.0)),
        0.0,
        0.2,
    ),
    ("kept_checkpoint_is_best", "min_evaluations"): (named("eval_distance", greater=True), 0, 1),
    ("answers_from_adapter", "limit"): (answering(max_change=0.1), 0.0, 0.01),
    ("context_independence", "float32_limit"): (of_type("float32", 0.5), 0.0, 0.1),
    ("context_independence", "tf32_limit"): (of_type("tf32", 0.5), 0.0, 0.1),
    ("context_independence", "float16_limit"): (of_type("float16", 0.5), 0.0, 0.1),
    ("context_independence", "bfloat16_limit"): (of_type("bfloat16", 0.5), 0.0, 0.1),
    ("context_independence", "rotary_rtol"): (context(rotary_error=0.5), 0.0, 0.1),
    ("path_equivalence", "float32_limit"): (paths_of_type("float32", 0.5), 0.0, 0.1),
    ("path_equivalence", "tf32_limit"): (paths_of_type("tf32", 0.5), 0.0, 0.1),
    ("path_equivalence", "float16_limit"): (paths_of_type("float16", 0.5), 0.0, 0.1),
    ("path_equivalence", "bfloat16_limit"): (paths_of_type("bfloat16", 0.5), 0.0, 0.1),
    ("path_equivalence", "routed_factor"): (paths_of_type("bfloat16", 1.0, routed=True), 1.0, 0.5),
    ("path_equivalence", "loss_share"): (path(loss=4.002), 0.0, 0.1),
    ("eval_and_decode_finite", "max_unlabelled_fraction"): (evaluated(unlabelled=4), 0.0, 0.1),
    ("decode_batch_invariance", "float32_margin"): (decoded(differences=parted(0.5)), 0.0, 0.1),
    ("decode_batch_invariance", "low_margin"): (decoded(arithmetic="bfloat16", differences=parted(0.5)), 0.0, 0.1),
    ("decode_batch_invariance", "float32_limit"): (decoded(max_change=0.5), 0.0, 0.1),
    ("decode_batch_invariance", "low_limit"): (decoded(arithmetic="bfloat16", max_change=0.5), 0.0, 0.1),
}

OPTIONAL = {
    "paths.switched[]": "names what the training uses, for the message alone",
    "evaluation.repeat_change": "None where no batch has a finite loss, which is another invariant's affair",
    "kept.losses[]": "matters only where the name of the metric does not say which direction is better",
}
