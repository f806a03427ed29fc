"""Cases of a gradient that is no derivative, and of a loss or a token that looks where it should not."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import (
    AimRecord,
    DerivativeRecord,
    DirectionRecord,
    FootprintRecord,
    FutureRecord,
    LookRecord,
    Names,
    RunRecord,
)
from tests.support.canned import A, B, healthy, within

NAN = math.nan


def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802 - one of the tables
    """What the look would have seen of a healthy run."""
    directions = tuple(DirectionRecord(tensors=f"{A} to {B}", error=1e-4, ratio=1.0, step=0.01) for _ in range(2))
    return {
        "derivative": DerivativeRecord(
            arithmetic="float32", loss=4.0, tensors=len(names), asked=2, directions=directions
        ),
        "later_derivatives": (
            DerivativeRecord(
                at_step=4, arithmetic="float32", loss=2.0, tensors=len(names), asked=1, directions=directions[:1]
            ),
        ),
        "footprint": FootprintRecord(places=10, shift=1, outside=0.0, padding=0.0),
        "aim": AimRecord(at="logits", places=10, cosine=1.0, joint_cosine=1.0),
        "future": FutureRecord(tokens=40, rows=4, change=0.0, other_rows=0.0, reached=3.0),
    }


def derived(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the derivative."""
    return within(healthy(), "derivative", **changes)


def off(error: float, held: float | None, ratio: float | None = 1.5, **changes: Any) -> RunRecord:
    """A record whose first direction is `error` off, and `held` with stop-gradients held."""
    first, *others = healthy().derivative.directions
    wrong = dataclasses.replace(first, error=error, held_error=held, ratio=ratio)
    return derived(directions=(wrong, *others), **changes)


def later(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of a later derivative."""
    record = healthy()
    return dataclasses.replace(record, later_derivatives=(dataclasses.replace(record.later_derivatives[0], **changes),))


def later_off(error: float, **changes: Any) -> RunRecord:
    """A record whose direction at a later step is `error` off."""
    [direction] = healthy().later_derivatives[0].directions
    return later(directions=(dataclasses.replace(direction, error=error, held_error=error, ratio=1.5),), **changes)


HOOK = {"changed": Names.of([A, B]), "hook": "doubled at mine.py:7", "hook_distance": 1.0}


def scaled(error: float, ratio: float, other: float) -> RunRecord:
    """A record of two directions that are `error` off, with these ratios."""
    first, _ = healthy().derivative.directions
    wrong = [dataclasses.replace(first, error=error, held_error=error, ratio=r) for r in (ratio, other)]
    return derived(directions=tuple(wrong))


def placed(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the footprint."""
    return within(healthy(), "footprint", **changes)


def aimed(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of the aim."""
    return within(healthy(), "aim", **changes)


def foreseen(**changes: Any) -> RunRecord:
    """A healthy record with `changes` in what was seen of later tokens."""
    return within(healthy(), "future", **changes)


def looked(name: str, **changes: Any) -> RunRecord:
    """A record without the field `name`, whose look ended so."""
    record = healthy(**{name: None})
    looks = tuple(LookRecord(name=k.name, **changes) if k.name == "first_batch" else k for k in record.looks)
    return dataclasses.replace(record, looks=looks)


OTHER = "labels are no token labels"
BROKE = {"error": "KeyError: x"}
FAILURES = {
    "gradient_is_derivative": {
        "wrong": (off(0.3, 0.3), f"not the derivative of the loss: along {A} to {B} it is 0.3 off$"),
        "located": (off(0.3, 0.3, tensor=B, upstream=True), f"first wrong at {B}, and at tensors before it"),
        "alone": (off(0.3, 0.3, tensor=B, upstream=False), f"first wrong at {B}, and at none before it"),
        "nan": (off(NAN, NAN), "it is nan off"),
        "no-ratio": (off(1.0, 1.0, ratio=None), "it is 1 off"),
        "scaled": (scaled(0.6, 3.0, 3.0), "the gradient is 3 times the derivative"),
        "two-ratios": (scaled(0.6, 3.0, 2.0), "not the derivative"),
        "late": (later_off(0.3), f"not the derivative of the loss: along {A} to {B} it is 0.3 off$"),
        "late-nan": (later_off(NAN), "it is nan off"),
        "hook": (derived(**HOOK), "changes the gradient of 2 tensors .*mine.py:7; it moves it by 1 of its norm"),
        "factor": (derived(**HOOK, hook_factor=2.0), "mine.py:7; it multiplies it by 2$"),
        "late-hook": (later(**HOOK), "a hook of the training changes the gradient of 2 tensors"),
        "detached": (off(0.3, 1e-4, detached=Names.of(["mine.py:7"])), "stops gradients .* at mine.py:7: .* 0.3 off"),
    },
    "loss_footprint": {
        "no-shift": (placed(other_shift=0), "the prediction 0 places before it, not 1 place before it"),
        "shifted": (placed(shift=0, other_shift=1), "the prediction 1 place before it, though labels are not"),
        "silent": (placed(silent=4, first_silent="row 1, place 3"), "4 places of 10 .* have no gradient .first: row 1"),
        "one": (placed(silent=1), "1 place of 10 with a label has no gradient"),
        "rows": (placed(silent=8, silent_rows=3), "; 3 rows of the batch"),
        "nothing": (placed(silent=10, outside=None, padding=None), "10 places of 10"),
        "outside": (
            placed(outside=0.9, first_outside="row 0, place 2"),
            "without a label, 0.9 times .* .row 0, place 2",
        ),
        "outside-nan": (placed(outside=NAN), "without a label, nan times"),
        "padding": (placed(outside=0.9, padding=0.9), "predictions of padding, 0.9 times"),
        "padding-nan": (placed(padding=NAN), "predictions of padding, nan times"),
    },
    "loss_aim": {
        "negated": (
            aimed(cosine=-1.0, joint_cosine=-1.0, against=10),
            "less likely: .* logits .* .cosine -1; 10 of 10 ",
        ),
        "elsewhere": (
            aimed(cosine=0.1, joint_cosine=0.0, against=4),
            "does not aim at the labels: .* is 0.1 .4 of 10 ",
        ),
        "nan": (aimed(cosine=NAN), "is nan"),
        "joint-nan": (aimed(joint_cosine=NAN), "is nan"),
    },
    "no_future": {
        "future": (foreseen(change=0.4, where="row 1, token 3"), "an earlier one differs by 0.4 .* .row 1, token 3"),
        "nan": (foreseen(change=NAN), "an earlier one differs by nan"),
        "rows": (foreseen(other_rows=0.2, other_row="row 2"), "rows see each other: .* row 2 differs by 0.2"),
        "rows-nan": (foreseen(other_rows=NAN), "rows see each other"),
    },
}

NOT_EVALUATED = {
    "gradient_is_derivative": {
        "one-less": (derived(asked=3), "2 of 3 directions"),
        "no-step": (derived(directions=(dataclasses.replace(healthy().derivative.directions[0], step=NAN),)), "0 of 2"),
        "nothing-left": (looked("derivative"), "left nothing to judge by"),
    },
    "loss_footprint": {
        "not-compared": (placed(outside=None), "gradients of the places were not compared"),
        "nothing-left": (looked("footprint"), "left nothing to judge by"),
    },
    "loss_aim": {
        "not-compared": (aimed(cosine=None), "at no place"),
        "no-place": (aimed(places=0), "at no place"),
        "nothing-left": (looked("aim"), "left nothing to judge by"),
    },
    "no_future": {
        "no-token": (foreseen(tokens=0), "no token before a changed one"),
        "not-reached": (foreseen(reached=0.0), "no token before a changed one"),
        "not-compared": (foreseen(change=None), "no token before a changed one"),
        "nothing-left": (looked("future"), "left nothing to judge by"),
    },
}

MAY_BE_MISSING = {
    "gradient_is_derivative-broke": ("gradient_is_derivative", derived(**BROKE)),
    "loss_footprint-broke": ("loss_footprint", placed(**BROKE)),
    "loss_aim-broke": ("loss_aim", aimed(**BROKE)),
    "no_future-broke": ("no_future", foreseen(**BROKE)),
    "gradient_is_derivative-inapplicable": ("gradient_is_derivative", derived(left_out=OTHER)),
    "gradient_is_derivative-unsettled": ("gradient_is_derivative", derived(directions=(), unsettled=2)),
    "gradient_is_derivative-stops": ("gradient_is_derivative", off(0.3, None)),
    "loss_footprint-inapplicable": ("loss_footprint", placed(left_out=OTHER)),
    "loss_aim-inapplicable": ("loss_aim", aimed(left_out=OTHER)),
    "no_future-inapplicable": ("no_future", foreseen(left_out=OTHER)),
}

THRESHOLDS = {
    ("gradient_is_derivative", "limit"): (off(0.5, 0.5), 0.0, 0.1),
    ("loss_footprint", "max_silent"): (placed(silent=5), 0.0, 0.1),
    ("loss_footprint", "max_outside"): (placed(outside=0.5), 0.0, 0.1),
    ("loss_footprint", "max_padding"): (placed(padding=0.5), 0.0, 0.1),
    ("loss_aim", "min_cosine"): (aimed(cosine=0.5, joint_cosine=0.5), 1.0, -0.1),
    ("no_future", "limit"): (foreseen(change=0.5), 0.0, 0.1),
}

OPTIONAL = {
    "derivative.directions[].ratio": "for the message alone",
    "later_derivatives[]": "a training may end before its last steps",
    "later_derivatives[].directions[].ratio": "for the message alone",
    "future.other_rows": "a batch of one row has no other",
}
