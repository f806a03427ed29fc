"""Evidence: an invariant that fails is no cause by itself, unless its reason says what happens."""

from __future__ import annotations

import importlib
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard import invariants
from pytest_sftguard.diagnosis import MECHANISMS, Case, certain, diagnose
from pytest_sftguard.diagnosis.case import against, decisive, hint, sign
from pytest_sftguard.diagnosis.naming import is_enough
from pytest_sftguard.diagnosis.stations import _OF_INVARIANTS, Station, station_of
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.verdicts import Finding, General, JudgedRun, Outcome, Verdict
from tests.support.canned import healthy, with_steps

NAMES = [i.name for i in load_invariants()]
REASONS = {n: importlib.import_module(f"{invariants.__name__}.{n}").Reason for n in NAMES}
# the canned rates are larger than any that one trains at, which would be evidence
PLAIN = with_steps(healthy(), learning_rate=1e-3)

CHANGED = ("multiplied", "multiplied_at_times", "shifted", "shifted_at_times", "rounded", "offset")
DECISIVE = {
    # the reason states what the mechanism states; there is nothing else that it could be
    "answers_beat_base.promise_broken": {"learned_something_else"},
    "base_bit_frozen.trainable": {"base_not_frozen"},
    "base_bit_frozen.changed": {"base_changed"},
    "base_finite.nonfinite": {"nan_in_base_weights"},
    "base_finite.not_loaded": {"base_not_loaded"},
    # the divisor was computed from the loss and the labels, to five digits
    "batch_split_equivalence.unshifted_labels": {"loss_divided_by_unshifted_labels"},
    # the mask itself was read
    "context_independence.blind": {"attention_row_fully_masked"},
    # one batch, twice, in evaluation mode
    "decode_batch_invariance.not_repeated": {"evaluation_is_random"},
    "decode_batch_invariance.answers": {"answers_depend_on_their_batch"},
    "decode_batch_invariance.scores": {"answers_depend_on_their_batch"},
    # the same model with its adapter off: what is left is none of the adapter's tensors
    "effect_size.other_base": {"disabled_adapter_leaves_something"},
    # a step that was not skipped, with a rate and gradients in the record
    "effective_steps.unmoved": {"optimizer_leaves_out_steps"},
    # seen between two steps, when no optimizer was at work
    "effective_steps.changed_between": {"weights_changed_from_outside"},
    "effective_steps.stale_gradients": {"gradients_not_cleared"},
    # in float32, where no update rounds away
    "every_factor_moves.partly": {"elements_never_move"},
    "fp32_master.narrow_at_first": {"half_precision_trainables"},
    "fp32_master.narrow_at_last": {"half_precision_trainables"},
    "fp32_master.narrow_states": {"half_precision_trainables"},
    # where other tensors have a gradient in the record
    "gradient_present.missing": {"gradient_does_not_reach_a_part"},
    "gradient_present.zero": {"gradient_does_not_reach_a_part"},
    "gradient_present.never": {"gradient_does_not_reach_a_part"},
    "identity_at_init.zero_a": {"both_factors_zero"},
    "identity_at_init.nonzero_b": {"adapter_perturbs_the_base"},
    # two norms of the same gradients, before and after what lies between backward and the optimizer
    "log_honest.zeroed_gradients": {"gradients_altered"},
    "norm_honest.given": {"gradients_altered"},
    # each loss is compared with the one that it comes from
    **{f"loss_is_the_models.{r}": {"loss_changed_on_the_way"} for r in CHANGED},
    # the loss of the step and those of its micro-batches are compared with the logits of the same pass
    "loss_counts_once.added_up": {"loss_grows_with_micro_batches"},
    "loss_counts_once.divided_twice": {"loss_divided_twice"},
    "loss_counts_once.multiplied": {"loss_changed_on_the_way"},
    # each gradient is compared with itself, and the common factor taken out
    "norm_honest.parted": {"gradients_altered"},
    # an identity of the two gradients, whatever the loss is
    "factor_gradients_agree.apart": {"factor_gradient_altered"},
    # the optimizer was given the right ones
    "norm_honest.logged": {"logged_norm_altered", "norm_is_not_the_gradients"},
    "log_honest.other_loss": {"logged_loss_altered"},
    "log_honest.other_mean": {"logged_loss_altered"},
    # the rate and the schedule were both seen
    "lr_trace.elsewhere": {"rate_set_beside_the_schedule"},
    "lr_trace.off_schedule": {"rate_set_beside_the_schedule"},
    "merge_equivalence.tied": {"merge_rewrites_tied_embedding"},
    "merge_equivalence.logits": {"merging_changes_the_model"},
    # right in memory, wrong from the file
    "merge_equivalence.saved_logits": {"merged_model_not_saved_whole"},
    "optimizer_owns_trainables.lacking": {"adapter_not_in_optimizer"},
    "optimizer_owns_trainables.others": {"adapter_not_in_optimizer"},
    # the loss agrees, or this would be `other_loss`
    "path_equivalence.other_gradient": {"loss_gradient_wrong"},
    "path_equivalence.other_loss": {"training_path_computes_otherwise"},
    "precision_is_real.computed": {"precision_not_applied"},
    "precision_is_real.weights": {"precision_not_applied"},
    "precision_is_real.no_scaler": {"precision_not_applied"},
    "precision_is_real.autocast": {"precision_not_applied"},
    "precision_is_real.tf32": {"precision_not_applied"},
    "replica_equivalence.apart": {"replicas_train_apart"},
    "rerun_bit_equal.rows": {"rows_come_in_another_order"},
    "rerun_bit_equal.bits": {"not_repeatable"},
    "rerun_bit_equal.differs": {"not_repeatable"},
    # the tensors at the save and after the load were compared one by one
    "resume_equivalence.not_restored": {"resume_restores_something_else"},
    # what was saved and what was loaded were both read
    "checkpoint_round_trip.not_loaded": {"resume_loses_state"},
    "checkpoint_round_trip.changed": {"checkpoint_changes_state"},
    "checkpoint_round_trip.added": {"checkpoint_changes_state"},
    "resume_equivalence.rows": {"resume_sees_other_rows"},
    "resume_equivalence.schedule": {"resume_loses_state"},
    "resume_equivalence.scale": {"resume_loses_scale"},
    # the forward passes were watched
    "adapter_reached.unreached": {"adapted_layer_never_called"},
    # the record says that tensors and base are the same
    "round_trip.logits": {"reloaded_model_computes_otherwise"},
    # each row was compared with itself, place by place
    "rows_arrive.ids": {"rows_changed_on_the_way"},
    "rows_arrive.replaced": {"rows_changed_on_the_way"},
    "rows_arrive.mask": {"rows_changed_on_the_way"},
    "rows_arrive.padding": {"rows_changed_on_the_way"},
    "rows_arrive.labels": {"labels_changed_on_the_way"},
    # texts that the guard wrote
    "strict_answers.junk": {"parser_accepts_junk"},
    "strict_answers.misread": {"parser_accepts_junk"},
    "strict_answers.raised": {"parser_raises"},
    # the labels and tokens themselves were read
    "supervision_audit.unsupervised": {"rows_without_labels"},
    "supervision_audit.mismatched": {"labels_are_not_the_rows_tokens"},
    "supervision_audit.padding_supervised": {"padding_supervised"},
    "supervision_audit.hidden_tokens": {"mask_hides_tokens"},
    "supervision_audit.unknown_id": {"token_id_out_of_range"},
    "supervision_audit.unknown_label": {"token_id_out_of_range"},
    "supervision_audit.truncated": {"rows_truncated"},
    "supervision_audit.prompt_supervised": {"prompt_supervised"},
    "supervision_audit.prompt_supervised_unmatched": {"prompt_supervised"},
    "supervision_audit.wrong_answer": {"wrong_labels"},
    "trainable_set_exact.frozen": {"adapter_partly_frozen"},
    "trainable_set_exact.disabled": {"adapter_partly_frozen"},
    "trainable_set_exact.unmatched": {"adapter_not_attached"},
    "trainable_set_exact.incomplete": {"adapter_not_attached"},
    # further than any gradients could make Adam move, or than the replay of the same ones moved
    "update_lower_bound.apart": {"update_is_not_the_optimizers"},
    # the same step of another optimizer of the class
    "update_repeats.other": {"update_is_not_the_optimizers"},
    "update_upper_bound.too_far": {"update_is_not_the_optimizers"},
}
"""Mechanisms that the reason of one finding names in an otherwise sound record, by invariant and reason. Each comment
says why nothing else explains it, and holds for the lines up to the next."""


def alone(name, reason, **fields):
    """A run whose only failed finding is one of the invariant `name`, for `reason`."""
    fields = {"observed": 3.0, "limit": 0.5, "step": None} | fields
    finding = Finding(invariant=name, outcome=Outcome.FAILED, reason=reason.code, message=reason.value, **fields)
    return JudgedRun(PLAIN, Verdict((finding,)))


def every_reason():
    """Each invariant with each of its reasons, and with the general ones."""
    return [(name, reason) for name in NAMES for reason in itertools.chain(REASONS[name], General)]


@given(
    which=st.sampled_from(every_reason()),
    step=st.sampled_from([None, 1, 2, 3, 4]),
    observed=st.none() | st.floats(0, 100) | st.just(float("nan")),
    # above what a sound record differs by
    limit=st.none() | st.floats(1e-3, 100) | st.text(max_size=4),
)
def test_a_single_failure_names_nothing_but_what_its_reason_says(which, step, observed, limit):
    """A sound record with one failed finding has no cause, unless the reason is one that leaves no other."""
    name, reason = which
    run = alone(name, reason, step=step, observed=observed, limit=limit)
    assert {d.mechanism for d in diagnose(run)} <= DECISIVE.get(f"{name}.{reason.code}", set())


def test_every_decisive_reason_names_its_mechanism():
    """The table holds nothing that does not name what it says, at some step."""
    given_reasons = {f"{n}.{r.code}": (n, r) for n in NAMES for r in REASONS[n]}
    for key, mechanisms in DECISIVE.items():
        runs = [alone(*given_reasons[key], step=step) for step in (None, 1, 3)]
        assert {d.mechanism for run in runs for d in diagnose(run)} & mechanisms, key


@pytest.mark.parametrize("reason", [General.LOOK_BROKE, General.REFERENCE_BROKE, General.BROKEN])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_guard_says_of_itself_is_no_evidence(name, reason):
    """An exception of a look or of a reference names no cause, and is nothing that is certain of the training."""
    run = alone(name, reason)
    assert diagnose(run) == []
    assert certain(run) is None


@pytest.mark.parametrize(
    ("clues", "enough"),
    [
        ([decisive("a")], True),
        ([sign("a"), sign("b")], True),
        ([sign("a")], False),
        ([sign("a"), *[hint("b")] * 9], False),
        ([decisive("a"), against("b")], False),
        ([decisive("a"), sign("b"), against("c")], True),
        ([], False),
    ],
    ids=["decisive", "two-signs", "one-sign", "hints", "doubted", "outweighed", "nothing"],
)
def test_evidence_is_enough(clues, enough):
    """One decisive clue or two signs name a mechanism; hints add nothing, and a doubt takes a sign away."""
    assert is_enough(clues) is enough


def test_what_locates_goes_behind_what_names():
    """A mechanism that only names the station is not named beside one that knows more."""
    names = {m.name for m in MECHANISMS if m.locates}
    both = JudgedRun(
        PLAIN,
        Verdict(
            (
                *alone("round_trip", REASONS["round_trip"].LOGITS).verdict.findings,
                *alone("base_bit_frozen", REASONS["base_bit_frozen"].CHANGED).verdict.findings,
            )
        ),
    )
    assert [d.mechanism for d in diagnose(both)] == ["base_changed"]
    assert "reloaded_model_computes_otherwise" in names


def test_a_mechanism_reads_no_reason_of_the_guard_itself():
    """`Case.failed` gives no finding that says that a look or a reference broke."""
    run = alone("path_equivalence", General.LOOK_BROKE)
    assert Case(run.record, run.verdict, {}).failed("path_equivalence", General.LOOK_BROKE) == []


def test_stations_are_those_of_invariants():
    """The table names no invariant that there is not; what is complete says nothing of a place in the training."""
    assert set(_OF_INVARIANTS) <= set(NAMES) - {"evidence_complete"}
    assert set(_OF_INVARIANTS.values()) == set(Station)


def test_a_gradient_that_differs_is_of_the_backward_pass():
    """An invariant that compares losses and gradients speaks of two stations."""
    differs = REASONS["batch_split_equivalence"].DIFFERS
    seen = {n: alone("batch_split_equivalence", differs, step=1, evidence={"name": n}) for n in ("loss", "grad_norm")}
    stations = {n: station_of(run.verdict.failures[0]) for n, run in seen.items()}
    assert stations == {"loss": Station.FORWARD, "grad_norm": Station.BACKWARD}


def test_certain_is_the_first_that_deviates():
    """By its step, then by its station; the stations before it that passed are ruled out."""
    passed = Finding(invariant="raw_loss_finite", outcome=Outcome.PASSED)
    late = alone("lr_trace", REASONS["lr_trace"].NOT_FINITE, step=3).verdict.failures
    early = alone("gradients_finite", REASONS["gradients_finite"].NONFINITE, step=2).verdict.failures
    known = certain(JudgedRun(PLAIN, Verdict((*late, passed, *early))))
    assert known is not None
    assert (known.first, known.station) == (early[0], Station.BACKWARD)
    assert known.sound == (Station.FORWARD,)
    assert known.unseen == (Station.DATA, Station.START)
