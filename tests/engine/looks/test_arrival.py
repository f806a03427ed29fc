"""Rows of the data set against what the model is given, on real trainings."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

LOOKS = ("supervision", "arrival")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("one_token_hidden", "mask"),
        ("end_token_overwritten", "ids"),
        ("label_dropped", "labels"),
        ("batches_mixed_up", "mask"),
        ("classes_changed", "labels"),
    ],
)
def test_what_a_collator_changes_is_seen(run_cell: Callable[..., JudgedRun], target: str, reason: str) -> None:
    """And the rows are named as the place of the fault."""
    run = run_cell(f"tests.targets.arriving:{target}", batch=(4, 1), steps=4, looks=LOOKS)
    assert [f.reason for f in run.verdict.of("rows_arrive")] == [reason]
    assert diagnose(run)[0].mechanism in ("rows_changed_on_the_way", "labels_changed_on_the_way", "mask_hides_tokens")


@pytest.mark.parametrize("target", ["arriving:flattened", "arriving:longest_first", "arriving:classes_numbered_anew"])
def test_other_forms_of_the_same_rows_are_sound(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Rows end to end, in another order and truncated, with classes of other numbers."""
    run = run_cell(f"tests.targets.{target}", batch=(4, 1), steps=4, looks=LOOKS)
    assert [f.outcome for f in run.verdict.of("rows_arrive")] == [Outcome.PASSED]
    assert run.record.arrival is not None
    assert (run.record.arrival.arrived_rows, run.record.arrival.unknown_rows) == (16, 0)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("arriving:tokens_dropped_at_random", "the collator draws random numbers"),
        ("arriving:collated_by_workers", "worker processes collate the rows"),
        ("tasks:masked_language_model", "BertForMaskedLM may be given other tokens"),
        ("tasks:dpo", "the rows of the data set are no token ids"),
    ],
)
def test_what_cannot_be_compared_is_not_evaluated(run_cell: Callable[..., JudgedRun], target: str, why: str) -> None:
    """With the reason, and without a gap in the evidence."""
    run = run_cell(f"tests.targets.{target}", batch=(4, 1), steps=2, looks=("arrival",))
    [finding] = run.verdict.of("rows_arrive")
    assert (finding.outcome, finding.required) == (Outcome.NOT_EVALUATED, False)
    assert why in message(finding)


@pytest.mark.parametrize("target", ["healthy:dropout", "arriving:tokens_dropped_at_random"])
def test_comparing_changes_no_bit(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The collator is called as often as before, and its generators are read alone."""
    one, other = (run_cell(f"tests.targets.{target}", steps=4, looks=asked) for asked in (("arrival",), ()))
    assert one.record.adapter_digest == other.record.adapter_digest
    assert not [look for look in one.record.looks if look.error]


def test_a_later_step_is_looked_at(run_cell: Callable[..., JudgedRun]) -> None:
    """Each eighth one is, beside the first eight."""
    run = run_cell("tests.targets.healthy:continued", batch=(2, 2), steps=17, looks=("arrival",))
    assert run.record.arrival is not None
    assert run.record.arrival.micro_batches == (8 + 1) * 2
