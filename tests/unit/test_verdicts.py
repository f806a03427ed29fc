"""Judging: NaN never passes, nothing that is missing passes, and a broken invariant breaks nothing but itself."""

from __future__ import annotations

import copy
import dataclasses
import math
import re

import pytest
from hypothesis import assume, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from pytest_sftguard import verdicts
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.records import Names, RecordError, RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Finding, JudgedRun, Outcome, Verdict, judge
from tests.strategies import cells, float_paths, gaps, healthy_records, non_finite, put, remove, spelled
from tests.support import canned
from tests.support.canned import healthy, with_step, with_steps
from tests.support.cases import gathered

ALL = load_invariants()

OPTIONAL = {
    "device.total_memory_bytes": "describes the machine; nothing is judged by it",
    "device.capability": "describes the machine; whether it can train in the mode was decided before",
    "device.threads": "describes the machine, and a GPU has none",
    "optimizer.eps": "SGD has none; read for the diagnosis alone",
    "optimizer.weight_decay": "not every optimizer has one; nothing is judged by it",
    "optimizer.state_dtypes[]": "SGD keeps no state; read for the diagnosis alone",
    "max_grad_norm": "None means no clipping",
    "tf32": "there is none on a CPU, and it concerns float32 products alone",
    "steps[].supervised_tokens": "None where the batches hold no labels",
    "steps[].micro_losses[]": "the last step of an epoch has fewer micro-batches than the others",
    "steps[].unchanged.first[]": "a list of names may be shortened: the count stands beside it",
    "steps[].zero_gradients.first[]": "a list of names may be shortened: the count stands beside it",
    "steps[].nonfinite_gradients.first[]": "a list of names may be shortened: the count stands beside it",
    "log[]": "the Trainer's log is what the user was shown: it may have any interval, and nothing is decided by it",
    "log[].loss": "as for the whole line",
    "log[].grad_norm": "as for the whole line",
    "log[].learning_rate": "as for the whole line",
    "looks[]": "a look that was not asked for holds up no cell",
    "answers[].parsed": "None says that the answer holds no number, which a part of them may",
}
"""What a healthy record may lack, and why that is no gap in the evidence."""
OPTIONAL |= gathered("OPTIONAL")


def outcome(record):
    return judge(record, ALL).outcome


@given(record=healthy_records())
def test_healthy_record_passes(record):
    """A record that is sound in every way has the verdict PASSED."""
    assert outcome(record) is Outcome.PASSED


@examples(max_examples=300)
@given(record=healthy_records(), value=non_finite(), data=st.data())
def test_non_finite_number_never_passes(record, value, data):
    """NaN or infinity at any place of a healthy record never yields a passing verdict."""
    path = data.draw(st.sampled_from(float_paths(record)))
    assume(not _of_a_skipped_step(record, path))
    # never clip
    assume((path, value) != (("max_grad_norm",), math.inf))
    plain = record.to_dict()
    put(plain, path, value)

    assert outcome(RunRecord.from_dict(plain)) is not Outcome.PASSED


def _of_a_skipped_step(record, path):
    """Whether `path` is a gradient of a step that the loss scaler skipped, or the log's copy of it: healthy (law 3)."""
    if path[-1] not in ("grad_norm", "max_abs_gradient", "received_grad_norm"):
        return False
    held = getattr(record, path[0])[path[1]]
    return any(s.step == held.step and s.effect == "skipped_by_scaler" for s in record.steps)


@given(record=healthy_records(), value=non_finite(), data=st.data())
def test_non_finite_micro_loss_fails(record, value, data):
    """A micro-batch whose loss is not finite fails the cell, at a skipped step too."""
    step = data.draw(st.sampled_from(record.steps))
    losses = list(step.micro_losses)
    losses[data.draw(st.integers(0, len(losses) - 1))] = value

    assert outcome(with_step(record, step.step, micro_losses=tuple(losses))) is Outcome.FAILED


@examples(max_examples=300)
@given(record=healthy_records(), data=st.data())
def test_missing_value_never_passes(record, data):
    """A healthy record without any one of its values or elements is refused or does not pass, but for the optional."""
    plain = record.to_dict()
    # the loss scaler does not call the optimizer at a step that it skips, so that nothing is received there
    unreceived = {("steps", i, "received_grad_norm") for i, s in enumerate(record.steps) if s.skipped}
    path = data.draw(st.sampled_from([p for p in gaps(plain) if spelled(p) not in OPTIONAL and p not in unreceived]))
    remove(plain, path)
    try:
        incomplete = RunRecord.from_dict(plain)
    except RecordError:
        return
    assert outcome(incomplete) is not Outcome.PASSED


@pytest.mark.parametrize("place", OPTIONAL)
def test_what_is_optional_may_be_missing(place):
    """Each of the optional places can be empty in a run that passes, so that the list of them holds nothing idle."""
    record = healthy(canned.Cell("fp16-mixed", 2, 2), steps=4, skipped={1}, answers=[1.0, 2.0], device=canned.H100)
    record = dataclasses.replace(record, device=dataclasses.replace(record.device, threads=8))
    plain = record.to_dict()
    (path, *_) = [p for p in reversed(gaps(plain)) if spelled(p) == place]
    remove(plain, path)

    assert outcome(RunRecord.from_dict(plain)) is Outcome.PASSED


@given(record=healthy_records(), data=st.data())
def test_record_cut_short_never_passes(record, data):
    """A run of which only the first steps are there does not pass."""
    kept = data.draw(st.integers(0, len(record.steps) - 1))
    assert outcome(dataclasses.replace(record, steps=record.steps[:kept])) is not Outcome.PASSED


@given(cell=cells(), steps=st.integers(0, 8))
def test_run_in_which_nothing_was_seen_never_passes(cell, steps):
    """A record that holds nothing but what was asked for does not pass, whatever was asked for."""
    asked = {f.name: getattr(healthy(cell, steps=1), f.name) for f in dataclasses.fields(RunRecord) if _needed(f)}
    assert outcome(RunRecord(**(asked | {"max_steps": steps, "global_step": steps}))) is not Outcome.PASSED


def _needed(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@given(record=healthy_records(), reason=st.text(max_size=5))
def test_cell_that_did_not_run_is_not_evaluated(record, reason):
    """A cell that was not trained is not evaluated, whatever else stands in its record."""
    assert outcome(dataclasses.replace(record, not_run=reason)) is Outcome.NOT_EVALUATED


@given(record=healthy_records())
def test_no_invariant_means_not_evaluated(record):
    """A healthy record that nothing was held against does not pass."""
    assert judge(record, []).outcome is Outcome.NOT_EVALUATED


FINDINGS = st.builds(
    Finding, invariant=st.just("some"), outcome=st.sampled_from(Outcome), required=st.booleans(), message=st.text()
)


@given(findings=st.lists(FINDINGS, max_size=4).map(tuple))
def test_any_failure_fails(findings):
    """A verdict with a failed finding is FAILED, whatever stands beside it."""
    assert (Verdict(findings).outcome is Outcome.FAILED) == any(f.outcome is Outcome.FAILED for f in findings)


@given(findings=st.lists(FINDINGS, max_size=4).map(tuple))
def test_only_evidence_passes(findings):
    """A verdict passes only where something passed, and nothing that is required was not evaluated."""
    evidence = any(f.outcome is Outcome.PASSED for f in findings)
    open_question = any(f.outcome is Outcome.NOT_EVALUATED and f.required for f in findings)
    assert not Verdict(findings).passed or (evidence and not open_question)


@given(findings=st.lists(FINDINGS, max_size=4).map(tuple), more=FINDINGS)
def test_another_finding_never_mends_a_failure(findings, more):
    """Adding a finding never turns a verdict that failed into another."""
    before, after = Verdict(findings).outcome, Verdict((*findings, more)).outcome
    assert before is not Outcome.FAILED or after is Outcome.FAILED


class LossFalls:
    """A user's own invariant, which derives from nothing of ours."""

    def check(self, record, reference=None):
        if not record.losses[-1] < record.losses[0]:
            yield Finding(invariant="loss_falls", outcome=Outcome.FAILED, message="the loss did not fall")


def yields(*findings):
    """An invariant called `outsider` that yields `findings`."""

    class Outsider:
        def check(self, record, reference=None):
            return iter(findings)

    return Outsider()


def test_outsider_is_judged():
    """An invariant that is not ours, with a `check` and nothing more, decides like any other."""
    falling = with_step(healthy(), 4, loss=0.1)
    assert [judge(r, [LossFalls()]).outcome for r in (falling, with_step(falling, 4, loss=9.0))] == [
        Outcome.PASSED,
        Outcome.FAILED,
    ]


class Raises:
    def check(self, record, reference=None):
        yield from ()
        raise KeyError("absent")


class Skips:
    def check(self, record, reference=None):
        pytest.skip("not today")


class ReturnsNothing:
    def check(self, record, reference=None):
        return None


class Misspelled:
    def chekc(self, record, reference=None):
        yield from ()


class TakesNothing:
    def check(self):
        yield from ()


def finding(**changes):
    return Finding(**({"invariant": "outsider", "outcome": Outcome.FAILED} | changes))


BROKEN = {
    "raises": (Raises(), "KeyError: 'absent'"),
    "skips": (Skips(), "Skipped: not today"),
    "returns-none": (ReturnsNothing(), "TypeError: 'NoneType' object is not iterable"),
    "has-no-check": (Misspelled(), "AttributeError: 'Misspelled' object has no attribute 'check'"),
    "takes-no-record": (TakesNothing(), "TypeError: .*positional argument"),
    "yields-text": (yields("wrong"), "TypeError: it yielded 'wrong', which is no Finding"),
    "yields-none": (yields(None), "TypeError: it yielded None, which is no Finding"),
    "outcome-is-text": (yields(finding(outcome="failed")), "a Finding with outcome='failed'"),
    "outcome-is-none": (yields(finding(outcome=None)), "a Finding with outcome=None"),
    "observed-is-text": (yields(finding(observed="much")), "a Finding with observed='much'"),
    "limit-is-a-list": (yields(finding(limit=[1])), r"a Finding with limit=\[1\]"),
    "step-is-text": (yields(finding(step="2")), "a Finding with step='2'"),
    "message-is-none": (yields(finding(message=None)), "a Finding with message=None"),
    "name-is-none": (yields(finding(invariant=None)), "a Finding with invariant=None"),
}


@pytest.mark.parametrize(("invariant", "wording"), BROKEN.values(), ids=BROKEN)
def test_broken_invariant_is_not_evaluated(invariant, wording):
    """An invariant that is broken says nothing of the training, and keeps the cell from passing, with the reason."""
    (broken,) = judge(healthy(), [invariant]).findings
    assert (broken.outcome, broken.required) == (Outcome.NOT_EVALUATED, True)
    assert re.search(f"the invariant itself is broken: .*{wording}", message(broken)), message(broken)


@pytest.mark.parametrize("invariant", [b[0] for b in BROKEN.values()], ids=BROKEN)
def test_the_rest_is_judged_beside_a_broken_one(invariant):
    """The invariants after a broken one are judged all the same."""
    assert judge(healthy(), [invariant, *ALL]).findings[1:] == judge(healthy(), ALL).findings


def test_findings_before_the_break_are_kept():
    """What an invariant found before it broke is part of the verdict."""
    found = finding(message="found in time")
    assert judge(healthy(), [yields(found, "nonsense")]).findings[0] == found


def test_keyboard_interrupt_is_no_finding():
    """Ctrl-C while judging stops the session."""

    class Interrupted:
        def check(self, record, reference=None):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        judge(healthy(), [Interrupted()])


@given(record=healthy_records())
def test_judging_changes_nothing(record):
    """Judging a record twice gives the same verdict, and leaves the record as it was."""
    before = copy.deepcopy(record.to_dict())
    assert judge(record, ALL) == judge(record, ALL)
    assert record.to_dict() == before


@pytest.mark.parametrize(
    ("names", "wording"), [([], []), (["a"], ["1 stray: a"]), (["a", "b"], ["2 strays: a and 1 more"])]
)
def test_what_is_forbidden_is_counted_and_named(names, wording):
    """`forbid` is silent where nothing is there, and else a failure with the count and the names."""

    class Reason(verdicts.Reason):
        STRAY = "{observed:# stray}: {names}"

    found = list(verdicts.Invariant().forbid(Reason.STRAY, Names.of(names)))
    assert [(message(f), f.outcome, f.limit) for f in found] == [(s, Outcome.FAILED, 0) for s in wording]


def test_findings_of_one_invariant():
    """`of` gives the findings that carry the invariant's name."""
    verdict = judge(with_steps(healthy(), micro_losses=(math.nan,)), ALL)
    assert [f.outcome for f in verdict.of("raw_loss_finite")] == [Outcome.FAILED]


@pytest.mark.parametrize("values", ["losses", "grad_norms"])
def test_judged_run_shows_the_trajectory(values):
    """What a test gets has the trajectories of its record."""
    run = JudgedRun(healthy(), judge(healthy(), ALL))
    assert getattr(run, values) == getattr(run.record, values)
