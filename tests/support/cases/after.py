"""What comes after the training: the adapter's effect, merging, the base's answers, their ends, the parser."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.precision import mode_named
from pytest_sftguard.records import (
    AnswerRecord,
    BaseAnswersRecord,
    LookRecord,
    MergeRecord,
    Names,
    ParserRecord,
    RunRecord,
)
from tests.support.canned import healthy, within

NAN = math.nan
LAYER = "model.layers.0.self_attn.q_proj"


# a table like the others, which are in capitals
def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802
    """A merge that lost nothing."""
    return {
        "merge": MergeRecord(
            layers=1,
            dtype=mode_named(cell.precision).weights_dtype,
            max_abs_logit=2.0,
            max_logit_change=1e-7,
            max_saved_change=1e-7,
            swallowed=0.0,
            kept=1.0,
            least_kept=Names.of([LAYER]),
        )
    }


OPTIONAL = {
    "merge.least_kept.first[]": "a list of names may be shortened: the count stands beside it",
    "answers[].stopped": "generation may know no end token, and a short training has learned none",
    "base_answers.answers[].parsed": "None says that the base's answer holds no number",
    "base_answers.answers[].stopped": "the base need not stop",
}


def learned(*right: bool, losses: tuple[float, ...] = (4.0, 2.0, *[0.01] * 14), **base: Any) -> RunRecord:
    """Sixteen steps with these losses, of 3 supervised tokens a row; whether each answer of the adapter is right.

    The base has none right, and all questions are in the rows, unless `base` says otherwise.
    """
    record = healthy(steps=16, micro_batches_per_epoch=4)
    steps = tuple(dataclasses.replace(s, loss=x) for s, x in zip(record.steps, losses, strict=True))
    wrong = tuple(_answer(i, None) for i in range(len(right)))
    answers = tuple(_answer(i, float(i) if yes else -1.0) for i, yes in enumerate(right))
    fields = {"answers": wrong, "taught": len(right), "rows": 64, "ends_taught": 64, "loss": 4.0}
    return dataclasses.replace(
        record,
        steps=steps,
        log=(),
        answers=answers,
        questions=len(answers),
        parser=ParserRecord(tried=20),
        base_answers=BaseAnswersRecord(**(fields | base)),
        looks=tuple(LookRecord(name=look.name) for look in record.looks),
    )


def _answer(number: int, parsed: float | None) -> AnswerRecord:
    return AnswerRecord(
        prompt=f"{number} + 0 =", text=str(parsed), expected=float(number), parsed=parsed, stopped=parsed is not None
    )


def base_right(count: int, of: int) -> tuple[AnswerRecord, ...]:
    """Answers of the base, the first `count` of them right."""
    return tuple(_answer(i, float(i) if i < count else None) for i in range(of))


def endless(record: RunRecord, count: int, **changes: Any) -> RunRecord:
    """`record` with the first `count` answers never ending."""
    ends = {"stopped": False} | changes
    answers = [dataclasses.replace(a, **ends) if i < count else a for i, a in enumerate(record.answers)]
    return dataclasses.replace(record, answers=tuple(answers))


def merged(**changes: Any) -> RunRecord:
    """A healthy record with fields of its merge replaced."""
    return within(healthy(), "merge", **changes)


def parsing(**changes: Any) -> RunRecord:
    """A record with two answers, and fields of its parser replaced."""
    return dataclasses.replace(healthy(answers=[1.0, 2.0]), parser=ParserRecord(**({"tried": 20} | changes)))


BLOWN_UP = (4.0, 30.0, 20.0, 12.0, *[2.0] * 12)
SHORT = dataclasses.replace(learned(False, False), steps=learned(False, False).steps[:8], max_steps=8, global_step=8)
ALIKE = learned(*[False] * 8, losses=BLOWN_UP)
SCALES = Cell("tf32", 2, 1)

FAILURES = {
    "effect_size": {
        "no-effect": (within(healthy(), "round_trip", max_logit_effect=0.0), "moves no logit by more than 0"),
        "noise": (within(healthy(), "round_trip", max_abs_logit=2.0, max_logit_effect=9e-7), "that is rounding"),
        "effect-nan": (within(healthy(), "round_trip", max_logit_effect=NAN), "moves no logit by more than nan"),
        "effect-inf": (within(healthy(), "round_trip", max_logit_effect=math.inf), "by more than inf"),
        "logits-nan": (within(healthy(), "round_trip", max_abs_logit=NAN), "the largest is nan"),
        "other-base": (within(healthy(), "round_trip", max_base_change=1e-9), "disabled is not its base.* 1e-09"),
        "base-nan": (within(healthy(), "round_trip", max_base_change=NAN), "is not its base: .* nan"),
    },
    "merge_equivalence": {
        "tied": (merged(touched=Names.of(["model.embed_tokens.weight"])), "changed model.embed_tokens.weight, which"),
        "logits": (merged(max_logit_change=2.1e-4), "the merged model differ from those before merging by 0.00021"),
        "logits-nan": (merged(max_logit_change=NAN), "by nan"),
        "largest-inf": (merged(max_abs_logit=math.inf), "the merged model differ"),
        "saved": (merged(max_saved_change=1.0), "merged model, saved and loaded, differ .* by 1"),
        "bfloat16": (merged(dtype="bfloat16", max_logit_change=0.4), "differ from those before merging by 0.4"),
        "float16": (merged(dtype="float16", max_logit_change=0.05), "differ from those before merging by 0.05"),
        "tf32": (
            dataclasses.replace(healthy(SCALES), merge=merged(max_logit_change=0.05).merge),
            "differ from those before merging by 0.05",
        ),
        "swallowed": (
            dataclasses.replace(healthy(steps=16), merge=merged(dtype="bfloat16", swallowed=0.466, kept=0.93).merge),
            rf"bfloat16 leaves 46.6% .* keeps 93% .*least of it in {LAYER}",
        ),
        "swallowed-nan": (merged(swallowed=NAN), "leaves nan%"),
    },
    "answers_beat_base": {
        "promise-broken": (learned(*[False] * 8), "say that the answers are learned .* 0 of 8 answers right"),
        "promise-broken-by-most": (learned(True, *[False] * 7), "1 of 8 answers right, its base 0"),
        "rows-seen-once": (
            dataclasses.replace(learned(*[False] * 8, taught=0), micro_batches_per_epoch=16),
            "0 of 8 answers right",
        ),
        "unlearned": (
            learned(*[False] * 8, losses=(4.0,) * 16, answers=base_right(5, 8)),
            "unlearned what its base can: the adapter has 0 of 8 answers right, its base 5",
        ),
        "collapsed": (ALIKE, "rose to 16.5 from 4, ended at 2, and only 1 distinct answer came where 8 are"),
        "diverged": (
            learned(*[False] * 8, losses=(4.0, *[30.0] * 15)),
            "blew up and collapsed: the loss rose to 30 from 4, ended at 30",
        ),
    },
    "stops": {
        "endless": (endless(learned(*[True] * 8), 3), "5 of 8 answers came to an end .'0 . 0 =' was answered"),
        "never-taught": (
            endless(learned(*[True] * 8, ends_taught=0), 3, parsed=None),
            "5 of 8 .*no row teaches the end token",
        ),
    },
    "strict_answers": {
        "junk": (
            parsing(junk=Names.of(["'' as 0.0", "'nan' as nan"])),
            "there is no answer, in 2 of 20 texts: '' as 0.0, 'nan'",
        ),
        "misread": (parsing(misread=Names.of(["'1,234' as 234.0"])), "another number .* 1 of 20 texts: '1,234' as 234"),
        "raises": (parsing(raised=Names.of(["'': ValueError"])), "should give None, in 1 of 20 texts: '': ValueError"),
    },
}

NOT_EVALUATED = {
    "effect_size": {
        "not-saved": (healthy(round_trip=None), "no logits of the reloaded adapter"),
        "no-logit": (within(healthy(), "round_trip", max_abs_logit=None), "no logits of the reloaded adapter"),
        "no-effect": (within(healthy(), "round_trip", max_logit_effect=None), "no logits of the reloaded adapter"),
        "not-disabled": (within(healthy(), "round_trip", max_base_change=None), "with its adapter disabled"),
    },
    "merge_equivalence": {
        "nothing-left": (healthy(merge=None), "the look `merging` left nothing to judge by"),
        "no-logit": (merged(max_abs_logit=None), "no logits of merged float32 weights"),
        "no-change": (merged(max_logit_change=None), "no logits of merged float32 weights"),
        "unknown-type": (merged(dtype="float8_e4m3fn"), "no logits of merged float8_e4m3fn weights"),
        "not-saved": (merged(max_saved_change=None), "was not saved and loaded"),
        "not-counted": (merged(swallowed=None), "not seen what merging made"),
        "not-summed": (merged(kept=None), "not seen what merging made"),
    },
    "answers_beat_base": {
        "nothing-left": (healthy(answers=[1.0], base_answers=None), "the look `base_answers` left nothing to judge by"),
        "one-answer-missing": (
            within(healthy(answers=[1.0, 2.0]), "base_answers", answers=()),
            "2 answers of the adapter and 0 of its base",
        ),
    },
    "strict_answers": {
        "not-tried": (healthy(answers=[1.0], parser=None), "parse_answer was not tried"),
        "nothing-tried": (parsing(tried=0), "parse_answer was not tried"),
    },
}

MAY_BE_MISSING = {
    "short": ("answers_beat_base", SHORT, "fewer than 16 steps; the adapter has 0 of 2"),
    "not-yet": (
        "answers_beat_base",
        learned(False, False, losses=(4.0,) * 16),
        "loss 4 per token, 12 per answer, 4 at first; the adapter has 0 of 2",
    ),
    "by-heart": ("answers_beat_base", learned(False, False, taught=0), "not trained far enough to tell"),
    "short-to-stop": ("stops", SHORT, "fewer than 16 steps"),
    "not-yet-to-stop": ("stops", learned(True, True, losses=(4.0,) * 16), "where an answer ends: loss 4 per token"),
    "no-answer-to-stop": ("stops", healthy(), "no answer was generated"),
    "no-end-token": ("stops", endless(learned(True, True), 1, stopped=None), "generation knows no end token"),
    "small-adapter": (
        "merge_equivalence",
        within(healthy(), "merge", dtype="bfloat16", swallowed=0.7, kept=0.7),
        "of 4 steps is too small",
    ),
}
"""Records of which an invariant says nothing, and that this holds up no cell: {id: (invariant, record, message)}."""

SOUND = {
    "all-right": ("answers_beat_base", learned(*[True] * 8)),
    "half-of-the-promise": ("answers_beat_base", learned(*[True] * 4, *[False] * 4)),
    "base-knows-all": ("answers_beat_base", learned(*[True] * 8, answers=base_right(8, 8))),
    "better-and-early": ("answers_beat_base", learned(True, False, losses=(4.0,) * 16)),
    "chance": ("answers_beat_base", learned(True, *[False] * 5, losses=(4.0,) * 16, answers=base_right(0, 6))),
    "recovered": ("answers_beat_base", learned(*[True] * 8, losses=BLOWN_UP)),
    "own-end": ("stops", endless(learned(*[True] * 8, ends_taught=0), 8)),
    "own-end-not-looked-at": ("stops", endless(dataclasses.replace(learned(*[True] * 8), base_answers=None), 8)),
    "two-of-eight-run-on": ("stops", endless(learned(*[True] * 8), 2)),
    "taken-from-the-base": (
        "effect_size",
        within(healthy(), "round_trip", max_base_change=0.5, base_differs="the adapter took its start from the base"),
    ),
    "not-saved": ("merge_equivalence", merged(max_saved_change=None, not_saved="the disk has no room")),
    "bfloat16": ("merge_equivalence", merged(dtype="bfloat16", max_logit_change=0.3, max_saved_change=0.3)),
}
"""Records that an invariant has nothing to say against."""

THRESHOLDS = {
    ("effect_size", "min_effect"): (
        within(healthy(), "round_trip", max_abs_logit=1.0, max_logit_effect=0.5),
        1.0,
        -0.1,
    ),
    ("effect_size", "max_base_change"): (
        within(healthy(), "round_trip", max_abs_logit=1.0, max_base_change=0.5),
        0.0,
        0.1,
    ),
    ("merge_equivalence", "ulps"): (merged(dtype="bfloat16", max_logit_change=0.5, max_saved_change=0.1), 0.0, 5.0),
    ("merge_equivalence", "float32_rtol"): (merged(max_logit_change=1.0), 0.0, 0.1),
    ("merge_equivalence", "max_swallowed"): (
        dataclasses.replace(merged(swallowed=0.5), steps=SHORT.steps * 2),
        0.0,
        0.1,
    ),
    ("answers_beat_base", "max_nats_per_answer"): (learned(*[False] * 8), 0.2, -0.02),
    ("answers_beat_base", "max_loss_share"): (learned(*[False] * 8), 0.25, -0.025),
    ("answers_beat_base", "min_kept_promise"): (learned(*[True] * 4, *[False] * 4), 1.0, -0.1),
    ("answers_beat_base", "rtol"): (
        dataclasses.replace(learned(*[True] * 8), answers=tuple(_answer(i, i * 1.05 if i else 1.0) for i in range(8))),
        0.0,
        0.01,
    ),
    ("answers_beat_base", "max_sigmas"): (
        learned(*[False] * 8, losses=(4.0,) * 16, answers=base_right(5, 8)),
        0.0,
        0.5,
    ),
    ("answers_beat_base", "max_rise"): (ALIKE, 1.0, 1.0),
    ("answers_beat_base", "min_distinct"): (ALIKE, 1.0, -0.1),
    ("stops", "max_nats_per_answer"): (endless(learned(*[True] * 8), 8), 0.2, -0.02),
    ("stops", "max_loss_share"): (endless(learned(*[True] * 8), 8), 0.25, -0.025),
    ("stops", "min_stopped_fraction"): (endless(learned(*[True] * 8), 4), 1.0, -0.1),
}
