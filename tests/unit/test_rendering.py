"""Rendering: evidence becomes a sentence, and whatever does not fit is still told."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.records import Names
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Finding, General, Outcome


def wording(sentence: str, **evidence: Any) -> str:
    """What is printed of a finding with `sentence` and `evidence`, seen at step 3."""
    finding = Finding(
        invariant="any", outcome=Outcome.FAILED, reason="any", message=sentence, evidence=evidence, step=3, observed=0.5
    )
    return message(finding)


@pytest.mark.parametrize(
    ("sentence", "evidence", "expected"),
    [
        ("{loss:.3g} at step {step}", {"loss": 1.23456}, "1.23 at step 3"),
        ("it is {observed:.1%}", {}, "it is 50.0%"),
        ("{n:# tensor} did not move", {"n": 1}, "1 tensor did not move"),
        ("{n:# tensor} did not move", {"n": 2}, "2 tensors did not move"),
        ("{n:# micro-batch}, {m:# query}", {"n": 0, "m": 2}, "0 micro-batches, 2 queries"),
        ("{names} moved", {"names": Names.of(["a", "b", "c"])}, "a and 2 more moved"),
        ("{names} moved", {"names": ["a", "b"]}, "a, b moved"),
        ("seen[[ in {where}]]", {"where": "x"}, "seen in x"),
        ("seen[[ in {where}]]", {"where": ""}, "seen"),
        ("seen[[ in {where}]]", {"where": None}, "seen"),
        ("seen[[ in {where}]]", {}, "seen"),
        ("seen[[ {n} times]]", {"n": 0}, "seen 0 times"),
        ("{loss:.3g}", {"loss": "nan"}, "nan"),
        ("{loss:.3g}", {"loss": math.nan}, "nan"),
        ("{kept:.0%} kept", {"kept": "nan"}, "nan% kept"),
        ("{kept:.0%} kept", {"kept": None}, "None kept"),
        ("{absent} is not there", {}, "{absent} is not there"),
    ],
)
def test_evidence_becomes_a_sentence(sentence: str, evidence: dict[str, Any], expected: str) -> None:
    """Each field is filled in as its spec says."""
    assert wording(sentence, **evidence) == expected


@given(text=st.text())
def test_a_message_without_a_reason_is_printed_as_it_is(text: str) -> None:
    """An invariant of a user's own may write braces and brackets."""
    assert message(Finding(invariant="own", outcome=Outcome.FAILED, message=text)) == text


@given(sentence=st.text(alphabet="{}[]:# an.3g%!"), evidence=st.dictionaries(st.sampled_from("an"), st.floats()))
def test_rendering_never_raises(sentence: str, evidence: dict[str, float]) -> None:
    """Whatever a sentence looks like, something is printed."""
    assert isinstance(wording(sentence, **evidence), str)


def test_a_count_says_the_same_in_another_process() -> None:
    """A count stays a whole number on its way through JSON."""
    reason = {"reason": "any", "message": "{observed:# tensor} moved"}
    finding = Finding(invariant="any", outcome=Outcome.FAILED, observed=1, **reason)
    assert message(Finding.from_dict(finding.to_dict())) == "1 tensor moved"


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.builds(Names.of, st.lists(st.text()))


@given(evidence=st.dictionaries(st.sampled_from(["name", "why", "error"]), VALUES), observed=st.none() | st.floats())
def test_a_finding_says_the_same_in_another_process(evidence: dict[str, Any], observed: float | None) -> None:
    """What `to_dict` made plain, `from_dict` reads back to the same words."""
    finding = Finding(
        invariant="any",
        outcome=Outcome.FAILED,
        reason="look_broke",
        message=General.LOOK_BROKE.value,
        evidence=evidence,
        observed=observed,
    )
    again = Finding.from_dict(finding.to_dict())
    assert message(again) == message(finding)
    assert again.because(General.LOOK_BROKE)
