"""Judging: what the series of a log show."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.logs.judging import Statement, Weight, cannot_show, explain
from pytest_sftguard.logs.reading import parse
from pytest_sftguard.logs.series import Entry, Log
from tests.logs.shapes import BROKEN, OPEN, SHAPES, course, skipping, state

NUMBERS = st.one_of(st.sampled_from([0.0, math.nan, math.inf, -math.inf, 1e-30, 2.5]), st.floats())
NAMES = ("loss", "grad_norm", "learning_rate", "epoch", "eval_loss", "train_loss", "eval_f1", "reward", "num_tokens")


@st.composite
def logs(draw: st.DrawFn) -> Log:
    """Any log: any numbers under any names, with steps or without."""
    numbered = draw(st.booleans())
    drawn = draw(st.lists(st.dictionaries(st.sampled_from(NAMES), NUMBERS), max_size=25))
    steps = st.integers(0, 100)
    entries = [Entry(place=i, step=draw(steps) if numbered else None, values=v) for i, v in enumerate(drawn, 1)]
    return Log(source="a.json", form="a form", entries=tuple(entries))


def shown(data: dict[str, Any]) -> tuple[Statement, ...]:
    """What a `trainer_state.json` with this in it shows."""
    return explain(parse(json.dumps(data), "trainer_state.json"))


@pytest.mark.parametrize("name", SHAPES)
def test_a_training_without_a_failure_does_not_alarm(name: str) -> None:
    """Nor does it raise a doubt: the public shapes of logs, and what is ordinary in them."""
    assert [(s.code, s.text) for s in shown(SHAPES[name]) if s.weight is not Weight.NOTE] == []


@pytest.mark.parametrize("name", BROKEN)
def test_a_failure_alarms(name: str) -> None:
    """By its own rule, before everything that weighs less."""
    history, code = BROKEN[name]
    found = shown(state(history))
    assert found[0].weight is Weight.ALARM
    assert code in [s.code for s in found if s.weight is Weight.ALARM]


@pytest.mark.parametrize("name", OPEN)
def test_what_has_two_readings_does_not_alarm(name: str) -> None:
    """It is stated all the same."""
    data, code = OPEN[name]
    found = shown(data)
    assert Weight.ALARM not in [s.weight for s in found]
    assert code in [s.code for s in found]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [("dies at step 15", 15, 30), ("laundered", 2, 20), ("a plateau at ln(49152)", 12, 30)],
)
def test_a_failure_is_placed(name: str, first: int, last: int) -> None:
    """At the steps where it shows."""
    statement = shown(state(BROKEN[name][0]))[0]
    assert (statement.first_step, statement.last_step) == (first, last)


@pytest.mark.parametrize("before", [True, False], ids=["rate-before-the-step", "rate-after-it"])
def test_a_schedule_that_stands_still_is_evidence_of_a_skip(before: bool) -> None:
    """Whichever rate a version of transformers logs."""
    [note] = shown(state(skipping([2, 3, 17], before=before)))
    assert "the learning rate stood still in them: they were skipped" in note.text
    assert note.where == "steps 2, 3, 17"


def test_a_constant_rate_is_no_evidence_of_a_skip() -> None:
    """The statement leaves it open."""
    history = course(20, norm=lambda i: math.nan if i < 3 else 1.0 + i, rate=lambda i: 1e-4)
    [note] = shown(state(history))
    assert "does not show whether the learning rate stood still" in note.text


def test_a_line_that_every_process_prints_is_no_frozen_loss() -> None:
    """Eight processes print one loss eight times, at one epoch."""
    history = [entry for entry in course(5) for _ in range(8)]
    assert shown(state([{k: v for k, v in e.items() if k != "step"} for e in history])) == ()


def test_trainings_in_one_log_are_judged_apart() -> None:
    """A second training that begins at a higher loss has not diverged."""
    history = course(20, lambda i: 1.5 - 0.05 * i) + course(20, lambda i: 10.0 + 0.01 * i)
    assert shown(state(history)) == ()


def test_what_shows_again_and_again_is_stated_once() -> None:
    """With the number of times, so that a long log has a short explanation."""
    [statement] = shown(state(course(400, norm=lambda i: 0.0 if i % 4 == 0 else 1.0 + 0.001 * i)))
    assert "The same shows 99 times more, the last at step 400." in statement.text
    assert (statement.first_step, statement.last_step) == (4, 400)


def test_the_page_has_every_statement() -> None:
    """Each code with its weights stands in a row of docs/explain.md, and nothing else does."""
    root = Path(__file__).resolve().parents[2]
    source = (root / "pytest_sftguard" / "logs" / "judging.py").read_text(encoding="utf-8")
    calls = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    given = [ast.unparse(c.args[0]) for c in calls if ast.unparse(c.func) == "_statement"]
    given += [
        ast.unparse(k.value) for c in calls if ast.unparse(c.func) == "Statement" for k in c.keywords if k.arg == "code"
    ]
    codes = set(re.findall(r"'(\w+)'", " ".join(given)))
    page = (root / "docs" / "explain.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == codes


@given(log=logs())
def test_no_series_makes_it_raise(log: Log) -> None:
    """Whatever the numbers, there are statements with texts, the worst first, and no verdict in any."""
    found = explain(log)
    assert [s.weight for s in found] == sorted(s.weight for s in found)
    for text in (*(f"{s.where} {s.text} {s.next}" for s in found), *cannot_show(log)):
        assert text.strip()
        assert not {"passed", "sound", "healthy", "ok"} & set(text.lower().replace(".", " ").replace(",", " ").split())


@given(log=logs())
def test_what_is_not_finite_is_always_reported(log: Log) -> None:
    """Under whichever name it was logged."""
    if any(not math.isfinite(v) for e in log.entries for v in e.values.values()):
        assert any("nan" in s.text or "inf" in s.text for s in explain(log))


@given(
    history=st.sampled_from([SHAPES[name]["log_history"] for name in SHAPES]),
    where=st.floats(0, 1),
    number=st.sampled_from([math.nan, math.inf, -math.inf]),
)
def test_a_loss_that_is_not_finite_alarms_anywhere(history: list[dict[str, Any]], where: float, number: float) -> None:
    """In any log, at any step."""
    at = int(where * (len(history) - 1))
    changed = [{**e, "loss": number} if i == at else e for i, e in enumerate(history)]
    assert shown(state(changed))[0].weight is Weight.ALARM


@given(begin=st.integers(2, 35), steps=st.integers(38, 60))
def test_an_adapter_that_dies_anywhere_alarms_at_that_step(begin: int, steps: int) -> None:
    """Not at step 15 alone."""
    found = shown(state(course(steps, norm=lambda i: 1.0 + 0.01 * i if i < begin else 0.0)))
    assert [(s.code, s.first_step) for s in found if s.weight is Weight.ALARM] == [("dead_adapter", begin)]


@given(skipped=st.sets(st.integers(1, 12), max_size=6))
def test_a_search_for_the_loss_scale_never_alarms(skipped: set[int]) -> None:
    """Whichever of the first steps it skips."""
    assert Weight.ALARM not in [s.weight for s in shown(state(skipping(sorted(skipped), 60)))]
