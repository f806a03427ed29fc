"""What stands before the first step: wiring, start, base, labels, prompts; and the shape of the guard's own probe."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import (
    DefectRecord,
    ErrorRecord,
    FamilyRecord,
    FinitenessRecord,
    FoundationRecord,
    InitialRecord,
    LookRecord,
    Names,
    PromptsRecord,
    RunRecord,
    SupervisionRecord,
    WiringRecord,
)

_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
_B = _A.replace("lora_A", "lora_B")
_NAMES = Names.of([_B])
_UNLIKE: dict[str, Any] = {
    "matched": 0,
    "pairs": 40,
    "shared_pairs": 0.0,
    "offset": 1,
    "offset_pairs": 0.1,
    "rows_reread": 0.3,
    "questions_reread": 0.98,
}
"""Prompts that share no pair of tokens with the rows of another tokenizer."""


def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802 - a table that needs the cell
    """What a healthy record holds of it."""
    return {
        "wiring": WiringRecord(
            trainable=len(names),
            modules=1,
            families=(
                FamilyRecord(name="q_proj (Linear)", weights=2, adapted=2, elements=128, adapted_elements=128),
                FamilyRecord(name="lm_head (Linear)", weights=1, adapted=0, elements=256, adapted_elements=0),
            ),
        ),
        "initial": InitialRecord(
            factors=1,
            init="True",
            identical=True,
            neutral=True,
            loaded=False,
            logits=2048,
            changed_logits=0,
            max_logit_change=0.0,
            max_abs_logit=2.5,
        ),
        "foundation": FoundationRecord(tensors=12),
        "supervision": SupervisionRecord(
            trained_rows=16, dataset_rows=64, micro_batches=8, asks=True, answered_rows=16
        ),
        "prompts": PromptsRecord(questions=8, rows=64, matched=16),
    }


def _healthy(**changes: Any) -> RunRecord:
    from tests.support.canned import healthy

    return healthy(**changes)


def _with(part: str, **changes: Any) -> RunRecord:
    record = _healthy()
    return dataclasses.replace(record, **{part: dataclasses.replace(getattr(record, part), **changes)})


def _unlooked(part: str, look: str, **wording: str) -> RunRecord:
    record = _healthy()
    looks = tuple(x if x.name != look else LookRecord(name=look, **wording) for x in record.looks)
    return dataclasses.replace(record, looks=looks, **{part: None})


def _tensor(**changes: Any) -> RunRecord:
    from tests.support.canned import B, healthy, with_tensor

    return with_tensor(healthy(), B, **changes)


def _defect(name: str, rows: int, step: int | None = 3) -> DefectRecord:
    return DefectRecord(name=name, rows=rows, step=step, example="ids [1, 2]")


def _probe(**changes: Any) -> RunRecord:
    record = _healthy()
    assert record.round_trip is not None
    assert isinstance(record.round_trip.finiteness, FinitenessRecord)
    seen = dataclasses.replace(record.round_trip.finiteness, **changes)
    return dataclasses.replace(record, round_trip=dataclasses.replace(record.round_trip, finiteness=seen))


def _trip(**changes: Any) -> RunRecord:
    return _with("round_trip", **changes)


FAILURES: dict[str, dict[str, Any]] = {
    "targets_reached": {
        "fused": (_with("wiring", fused=_NAMES), "names 1 weight of experts in one tensor, .* name them in target_par"),
        "left-out": (_with("wiring", left_out=_NAMES), "1 layer with the name of a target had no adapter"),
        "one-digit": (_with("wiring", beyond_one_digit=_NAMES), "ends at layer 9, .* it misses 1 layer, first"),
    },
    "trainable_set_exact": {
        "none": (_with("wiring", trainable=0), "no trainable tensor"),
        "no-module": (_with("wiring", modules=0), "attached to no module"),
        "frozen": (_with("wiring", frozen=_NAMES), "1 tensor of the active adapter must .*: .*lora_B"),
        "strays": (
            _with("wiring", strays=Names.of(["lm_head.weight"])),
            "1 tensor outside the active adapter had .*: lm_head",
        ),
        "unmatched": (_with("wiring", unmatched=Names.of(["q_projj"])), "1 target .* matched no module: q_projj"),
        "incomplete": (_with("wiring", incomplete=Names.of(["model.q_proj"])), "1 module .* no factors: model.q_proj"),
        "disabled": (_with("wiring", disabled=True), "the adapter is disabled"),
    },
    "optimizer_owns_trainables": {
        "lacking": (_with("optimizer", lacking=_NAMES, owns_trainables=False), "lacks 1 trainable tensor.*lora_B"),
        "foreign": (_with("optimizer", foreign=_NAMES), "began to take a gradient"),
        "twice": (_with("optimizer", twice=_NAMES), "more than once"),
        "unexplained": (_with("optimizer", owns_trainables=False), "are not the trainable ones"),
        "nothing": (_healthy(adapter=()), "no trainable tensor"),
    },
    "fp32_master": {
        "begin": (
            _tensor(initial_dtype="float16", dtype="float16"),
            "1 of 2 .* had the type float16 before the first step",
        ),
        "end": (_tensor(dtype="bfloat16"), "1 of 2 .* had the type bfloat16 only after the last step: .*lora_B"),
        "float8": (_tensor(initial_dtype="float8_e4m3fn"), "float8_e4m3fn before"),
        "states": (_with("optimizer", state_dtypes=("bfloat16", "float32")), "AdamW keeps states in bfloat16"),
    },
    "identity_at_init": {
        "random-b": (_with("initial", nonzero_b=_NAMES), "1 factor did not start at zero.*lora_B"),
        "zero-a": (_with("initial", zero_a=Names.of([_A])), "nothing passes: .*lora_A"),
        "zero-scaling": (_with("initial", zero_scaling=Names.of(["q"])), "adapter of 1 module is multiplied by .* = 0"),
        "scaling": (_with("initial", wrong_scaling=Names.of(["q (4, not 2)"])), "scaling of 1 module: q .4, not 2."),
        "logits": (
            _with("initial", changed_logits=7, max_logit_change=0.5),
            "7 of 2048 logits differed from the base's",
        ),
        "dora": (_with("initial", identical=False, changed_logits=7, max_logit_change=0.5), "differ .* by 0.5"),
    },
    "base_finite": {
        "nan": (_with("foundation", nonfinite=Names.of(["w"])), "1 tensor of the base held NaN or infinity .*: w"),
        "absent": (_with("foundation", not_loaded=Names.of(["head"])), "the checkpoint lacks 1 tensor .*: head"),
        "magnitude": (_with("foundation", zero_magnitudes=Names.of(["m"])), "the direction is 0/0: m"),
        "embedding": (_with("foundation", zero_embeddings=Names.of(["5"])), "zero throughout: 5"),
    },
    "supervision_audit": {
        "third-of-the-rows": (
            _with("supervision", trained_defects=(_defect("unsupervised", 5),)),
            "5 of 16 rows as trained on had no label",
        ),
        "dataset": (
            _with("supervision", dataset_defects=(_defect("unsupervised", 20, None),)),
            "20 of 64 rows of the data set",
        ),
        "barren": (
            _with("supervision", trained_defects=(_defect("barren", 1),)),
            "1 of 8 micro-batches as trained on had no label",
        ),
        "no-reason": (
            _with("supervision", trained_defects=(_defect("strange", 1),)),
            "1 of 16 rows .* had the defect strange",
        ),
        **{
            defect: (_with("supervision", trained_defects=(_defect(defect, 1),)), wording)
            for defect, wording in {
                "mismatched": "not their own tokens",
                "unknown_id": "embedding does not have",
                "unknown_label": "vocabulary does not have",
                "doubled_bos": "two BOS",
                "prompt_supervised": "supervised the prompt",
                "wrong_answer": "did not supervise its answer",
                "endless": "an end token",
            }.items()
        },
        "truncated": (_with("supervision", trained_defects=(_defect("truncated", 2),)), "greatest length"),
        "plain": (
            _with("supervision", trained_defects=(_defect("prompt_supervised_unmatched", 16),)),
            "from their first",
        ),
    },
    "prompt_is_prefix": {
        "shifted": (
            _with("prompts", **_UNLIKE | {"offset_pairs": 0.9}),
            "are those of the questions .1: they share 90%",
        ),
        "shifted-words": (
            _with("prompts", **_UNLIKE | {"offset": -2, "offset_pairs": 0.8, "shared_pairs": 0.3}),
            "of the questions -2: they share 80% of 40 pairs .* and 30% as they are",
        ),
        "other-tokenizer": (
            _with("prompts", **_UNLIKE),
            "none of 40 pairs .* and 30% of their ids come back .* .98% of",
        ),
        "reread-nan": (_with("prompts", **_UNLIKE | {"rows_reread": math.nan}), "and nan% of their ids come back"),
        "deviating": (_with("prompts", deviating=2, example="x"), "2 of 16 rows did not begin .*: x"),
        "short": (_with("prompts", short=2), "2 of 16 rows had more before"),
        "forms": (_with("prompts", matched=0, forms=2, strange_forms=1), "1 of 2 prompt ends differed"),
    },
    "probe_shape": {
        "short": (_probe(tokens=15), "given 15 tokens"),
        "nan": (_probe(nonfinite=3), "3 of 2048 logits"),
    },
    "round_trip": {
        "drawn": (_trip(drawn=Names.of(["embed (row 65)"])), "under another seed.* embed .row 65."),
    },
}

_CRASHED = {"error": ErrorRecord(stage="train", type="IndexError", message="index out of range")}
NOT_EVALUATED: dict[str, dict[str, Any]] = {
    "trainable_set_exact": {"lost": (_unlooked("wiring", "wiring"), "left nothing to judge by")},
    "targets_reached": {"lost": (_unlooked("wiring", "wiring"), "left nothing to judge by")},
    "optimizer_owns_trainables": {
        "no-optimizer": (_healthy(optimizer=None), "no optimizer was seen"),
        "not-seen": (_with("optimizer", owns_trainables=None), "no optimizer was seen"),
    },
    "fp32_master": {
        "no-adapter": (_healthy(adapter=()), "were not seen"),
        "not-seen": (_tensor(initial_dtype=None), "were not seen"),
        "no-optimizer": (_healthy(optimizer=None), "no optimizer was seen"),
    },
    "identity_at_init": {
        "lost": (_unlooked("initial", "wiring"), "left nothing to judge by"),
        "no-factor": (_with("initial", factors=0), "no pair of factors was seen"),
        "not-tried": (_with("initial", nonzero_b=_NAMES, loaded=None), "whether a file was loaded was not seen"),
        "no-logits": (_with("initial", logits=None), "no logits were compared"),
        "zero-logits": (_with("initial", logits=0), "no logits were compared"),
        "no-count": (_with("initial", changed_logits=None), "no logits were compared"),
        "no-change": (_with("initial", max_logit_change=None), "no logits were compared"),
        "no-scale": (_with("initial", identical=False, max_abs_logit=None), "the base's logits were not seen"),
    },
    "base_finite": {
        "lost": (_unlooked("foundation", "wiring"), "left nothing to judge by"),
        "no-tensor": (_with("foundation", tensors=0), "no tensor of the base was seen"),
    },
    "supervision_audit": {
        "lost": (_unlooked("supervision", "supervision"), "left nothing to judge by"),
        "no-row": (_with("supervision", trained_rows=0, dataset_rows=0), "no row with labels"),
    },
    "prompt_is_prefix": {"lost": (_unlooked("prompts", "prompts"), "left nothing to judge by")},
    "probe_shape": {
        "not-asked": (_trip(finiteness=None), "not asked for logits"),
        "not-saved": (_healthy(round_trip=None), "not asked for logits"),
        "no-row": (_probe(rows=0), "not asked for logits"),
        "no-logit": (_probe(logits=0), "not asked for logits"),
        "unpadded": (_probe(padded_rows=0), "no row of the batch had padding"),
        "fused": (_probe(attention="sdpa"), "attention was sdpa, not eager"),
    },
}

THRESHOLDS: dict[tuple[str, str], Any] = {
    ("prompt_is_prefix", "min_shifted"): (
        _with("prompts", **_UNLIKE | {"offset_pairs": 0.5, "rows_reread": 1.0}),
        0.4,
        0.05,
    ),
    ("prompt_is_prefix", "min_reread"): (_with("prompts", **_UNLIKE), 0.9, -0.09),
    ("identity_at_init", "rounded_rtol"): (
        _with("initial", identical=False, changed_logits=9, max_logit_change=0.5, max_abs_logit=1.0),
        0.0,
        0.1,
    ),
    ("supervision_audit", "max_lost_fraction"): (
        _with("supervision", trained_defects=(_defect("unsupervised", 8),)),
        0.0,
        0.1,
    ),
    ("probe_shape", "min_tokens"): (_probe(tokens=20), 25, -1),
}
OPTIONAL = {
    "initial.loaded": "matters only where both factors of a pair start away from zero",
    "initial.max_abs_logit": "matters only where the start is neutral but for rounding",
    "round_trip.other_seed": "None where a toy base is drawn from the seed as a whole",
    "round_trip.finiteness.tokens": "None where the rows are not of tokens alone",
    "wiring.families[]": "printed for the reader; nothing is judged by it",
}
