"""Stations: where in a training each invariant looks, and what is certain of a failed run without a known cause."""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pytest_sftguard.invariants import batch_split_equivalence, path_equivalence, precision_agreement
from pytest_sftguard.verdicts import Finding, General, JudgedRun, Outcome


class Station(enum.Enum):
    """The stations of a training, in the order in which a number passes them."""

    DATA = "rows and labels"
    START = "the model before its first step"
    FORWARD = "the forward pass and its loss"
    BACKWARD = "the backward pass"
    CLIPPING = "what happens to gradients before the optimizer"
    SCHEDULE = "the learning rate"
    STEP = "the optimizer's step"
    BETWEEN = "what happens between two steps"
    FILE = "saving and reloading"
    MERGING = "merging"
    ANSWERS = "generating and reading answers"


_OF_INVARIANTS: Mapping[str, Station] = {
    "supervision_audit": Station.DATA,
    "rows_arrive": Station.DATA,
    "prompt_is_prefix": Station.DATA,
    "base_finite": Station.START,
    "identity_at_init": Station.START,
    "trainable_set_exact": Station.START,
    "targets_reached": Station.START,
    "optimizer_owns_trainables": Station.START,
    "precision_is_real": Station.START,
    "fp32_master": Station.START,
    "raw_loss_finite": Station.FORWARD,
    "loss_is_the_models": Station.FORWARD,
    "loss_counts_once": Station.FORWARD,
    "context_independence": Station.FORWARD,
    "batch_split_equivalence": Station.FORWARD,
    "precision_agreement": Station.FORWARD,
    "path_equivalence": Station.FORWARD,
    "replica_equivalence": Station.FORWARD,
    "rerun_bit_equal": Station.FORWARD,
    "gradients_finite": Station.BACKWARD,
    "gradient_present": Station.BACKWARD,
    "factor_gradients_agree": Station.BACKWARD,
    "norm_honest": Station.CLIPPING,
    "log_honest": Station.CLIPPING,
    "lr_trace": Station.SCHEDULE,
    "update_lower_bound": Station.STEP,
    "update_repeats": Station.STEP,
    "update_upper_bound": Station.STEP,
    "every_factor_moves": Station.STEP,
    "weights_and_moments_finite": Station.STEP,
    "effective_steps": Station.STEP,
    "one_batch_overfit": Station.STEP,
    "base_bit_frozen": Station.BETWEEN,
    "resume_equivalence": Station.BETWEEN,
    "round_trip": Station.FILE,
    "checkpoint_round_trip": Station.FILE,
    "effect_size": Station.FILE,
    "probe_shape": Station.FILE,
    "kept_checkpoint_is_best": Station.FILE,
    "merge_equivalence": Station.MERGING,
    "eval_and_decode_finite": Station.ANSWERS,
    "decode_batch_invariance": Station.ANSWERS,
    "generation_follows_logits": Station.ANSWERS,
    "strict_answers": Station.ANSWERS,
    "answers_beat_base": Station.ANSWERS,
    "stops": Station.ANSWERS,
    "answers_from_adapter": Station.ANSWERS,
    "evaluation_is_still": Station.ANSWERS,
}
"""The station that each invariant looks at; one that is not here, such as a user's own, says nothing of a place."""

NEVER_MEANT = frozenset(
    {
        "raw_loss_finite",
        "gradients_finite",
        "weights_and_moments_finite",
        "evidence_complete",
        "eval_and_decode_finite",
        "probe_shape",
    }
)
"""Invariants that nobody violates on purpose: something is not finite, or was not there."""

_GRADIENTS = (
    batch_split_equivalence.Reason.DIFFERS,
    precision_agreement.Reason.DIFFERS,
    path_equivalence.Reason.OTHER_GRADIENT,
    path_equivalence.Reason.ONE_SIDED,
)
"""Reasons of invariants of the forward pass that may speak of the gradient alone."""


def station_of(finding: Finding) -> Station | None:
    """The station at which a finding was made; None where that is not known."""
    if finding.because(*_GRADIENTS) and finding.evidence.get("name", "grad_norm") == "grad_norm":
        return Station.BACKWARD
    return _OF_INVARIANTS.get(finding.invariant)


@dataclass(frozen=True)
class Certain:
    """What is certain of a failed run, whatever its cause."""

    first: Finding
    """The finding that comes first: by its step, and within a step by its station."""
    station: Station | None
    """Where it was made; None where that is not known."""
    sound: tuple[Station, ...]
    """Stations before it that were looked at, and where nothing failed."""
    unseen: tuple[Station, ...]
    """Stations before it that nothing looked at."""
    failed: tuple[Station, ...]
    """Stations before it where something failed at a later step."""


def certain(run: JudgedRun) -> Certain | None:
    """What is certain of `run`; None where nothing failed, or only the guard itself did."""
    ours = (General.LOOK_BROKE, General.REFERENCE_BROKE, General.BROKEN, General.UNUSABLE)
    failures = [f for f in run.verdict.failures if not f.because(*ours)]
    if not failures:
        return None
    # what is seen of the trained model follows from NaN in its weights
    finite = all(math.isfinite(s.loss or math.nan) and s.effect != "poisoned" for s in run.record.steps)
    first = min(failures, key=lambda f: _order(f, finite))
    station = station_of(first)
    before = [s for s in Station if station is not None and _place(s) < _place(station)]
    failed = {station_of(f) for f in failures}
    looked = set(_passed(run))
    return Certain(
        first=first,
        station=station,
        sound=tuple(s for s in before if s in looked and s not in failed),
        unseen=tuple(s for s in before if s not in looked and s not in failed),
        failed=tuple(s for s in before if s in failed),
    )


def _passed(run: JudgedRun) -> Iterator[Station]:
    for finding in run.verdict.findings:
        station = _OF_INVARIANTS.get(finding.invariant)
        if finding.outcome is Outcome.PASSED and station is not None:
            yield station


def _order(finding: Finding, finite: bool) -> tuple[float, int]:
    """Findings without a step speak of the start, or of what comes after the last step."""
    station = station_of(finding)
    place = len(Station) if station is None else _place(station)
    if finding.step is not None:
        return float(finding.step), place
    of_a_new_model = finding.invariant == "path_equivalence"
    early = station in (Station.DATA, Station.START) or (station is Station.FORWARD and (finite or of_a_new_model))
    return (0.0 if early else math.inf), place


def _place(station: Station) -> int:
    return list(Station).index(station)
