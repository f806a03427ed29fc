"""Cases of what comes after the training: a checkpoint that is loaded, and answers that are generated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import CheckpointRecord, FollowingRecord, LookRecord, Names, RunRecord

_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"


def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802 - a table that needs the cell
    """What a healthy record holds of it."""
    return {
        "checkpoint": CheckpointRecord(optimizer="AdamW", size_bytes=2056, tensors=3 * len(names), values=39),
        "following": FollowingRecord(arithmetic="float32", answers=2, tokens=9),
    }


def _loaded(**changes: Any) -> RunRecord:
    from tests.support.canned import healthy, within

    return within(healthy(), "checkpoint", **changes)


def _unlooked(*looks: LookRecord) -> RunRecord:
    """A record of a run with only these looks, which left nothing."""
    return dataclasses.replace(_loaded(), checkpoint=None, looks=looks)


def _unlooked_answers(*looks: LookRecord) -> RunRecord:
    return dataclasses.replace(_loaded(), following=None, looks=looks)


def _changed(**changes: Any) -> RunRecord:
    worst = {"worst": f"{_B}:exp_avg", "distance": 0.5, "expected": 2.0, "got": 1.0}
    return _loaded(changed=Names.of([f"{_B}:exp_avg"]), **(worst | changes))


def _followed(**changes: Any) -> RunRecord:
    from tests.support.canned import healthy, within

    return within(healthy(), "following", **changes)


_OTHER = {"other": 2, "below": 0.4, "prompt": "1 + 2 =", "place": 1, "token": "7", "best": "3"}
_LARGE = "the optimizer's state has 800 MiB"
FAILURES = {
    "checkpoint_round_trip": {
        "not-loaded": (
            _loaded(tensors=0, lost=Names.of([f"{_B}:exp_avg", f"{_B}:step"])),
            "does not give back 2 states of AdamW that it saved: .*exp_avg",
        ),
        "added": (_loaded(added=Names.of([f"{_B}:ema"])), "gives AdamW 1 state that it did not save: .*ema"),
        "changed": (
            _changed(),
            "changes 1 of 6 state tensors of AdamW, .*exp_avg the most: by 0.5 of its norm, 1 in place of 2",
        ),
        "nan": (_changed(distance=math.nan, got=math.nan), "the most: by nan of its norm, nan in place of 2"),
        "other-shape": (_changed(distance=None, expected=None, got=None), "the most$"),
        "rate": (
            _loaded(other_values=Names.of(["lr of group 0"]), other_expected="0.001", other_got="0.01"),
            "changes lr of group 0: the first is 0.01, and was 0.001",
        ),
    },
    "generation_follows_logits": {
        "other": (
            _followed(**_OTHER),
            "2 of 9 generated tokens had not the best score: '1 . 2 =' is answered with '7' at place 1, where one"
            " forward pass prefers '3' by 0.4 of the largest score",
        ),
        "nan": (_followed(**(_OTHER | {"below": math.nan})), "by nan of the largest"),
        "unknown": (_followed(**(_OTHER | {"below": None})), "had not the best score"),
        "bfloat16": (_followed(**(_OTHER | {"arithmetic": "bfloat16"})), "had not the best score"),
    },
}
NOT_EVALUATED = {
    "checkpoint_round_trip": {
        "nothing": (_loaded(tensors=0, values=0), "nothing of the checkpoint was compared"),
        "nothing-left": (
            _unlooked(LookRecord(name="checkpoints"), LookRecord(name="large_checkpoints")),
            "the look `large_checkpoints` left nothing",
        ),
    },
    "generation_follows_logits": {
        "nothing": (_followed(tokens=0), "no generated token was compared"),
        "unscored": (_followed(unscored=3), "the scores of 3 generated tokens are not finite"),
        "nothing-left": (_unlooked_answers(LookRecord(name="following")), "left nothing to judge by"),
    },
}
MAY_BE_MISSING = {
    "generation_follows_logits-own": (
        "generation_follows_logits",
        _unlooked_answers(LookRecord(name="following", inapplicable="the target answers with a generate of its own")),
    ),
    "checkpoint_round_trip-narrowed": (
        "checkpoint_round_trip",
        _loaded(narrowed=Names.of([f"{_B}:exp_avg"])),
    ),
    "checkpoint_round_trip-unread": ("checkpoint_round_trip", _loaded(unread=Names.of([f"{_B}:exp_avg"]))),
    "checkpoint_round_trip-large": (
        "checkpoint_round_trip",
        _unlooked(LookRecord(name="checkpoints", inapplicable=_LARGE)),
    ),
    "checkpoint_round_trip-broke": (
        "checkpoint_round_trip",
        _unlooked(
            LookRecord(name="checkpoints", error="KeyError: x"),
            LookRecord(name="large_checkpoints", inapplicable="the optimizer's state is small enough"),
        ),
    ),
}
THRESHOLDS = {
    ("generation_follows_logits", "float32_margin"): (_followed(**_OTHER), 0.0, 0.1),
    ("generation_follows_logits", "low_margin"): (_followed(**_OTHER, arithmetic="bfloat16"), 0.0, 0.1),
}
