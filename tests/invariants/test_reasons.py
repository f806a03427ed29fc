"""Reasons: every finding has one, its sentence fits its evidence, and nothing but the renderer reads the sentence."""

from __future__ import annotations

import ast
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_sftguard import invariants, verdicts
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.invariants._comparing import Both
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Finding, General
from tests.invariants import test_invariants as tables
from tests.invariants.test_across import INVARIANTS, OPEN
from tests.support.cases import gathered

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "pytest_sftguard" / "invariants").glob("*.py"))
BUILT_IN = {i.name: i for i in load_invariants()}


def reasons_of(name: str) -> type[verdicts.Reason]:
    """The enum in the file of the invariant `name`."""
    return importlib.import_module(f"{invariants.__name__}.{name}").Reason


def cases(name: str) -> Iterator[tuple[Any, ...]]:
    """The records of the tables for the invariant `name`, with a reference where there is one."""
    for table in (tables.FAILURES, tables.NOT_EVALUATED):
        yield from ((record, *reference) for record, _, *reference in table.get(name, {}).values())
    missing = (*tables.MAY_BE_MISSING.values(), *gathered("MAY_BE_MISSING").values())
    yield from ((record,) for invariant, record, *_ in missing if invariant == name)
    yield from (
        (record, reference) for compared, record, reference, _ in OPEN.values() if INVARIANTS[compared].name == name
    )


def findings(name: str) -> list[Finding]:
    """What the invariant says of all those records."""
    return [f for case in cases(name) for f in BUILT_IN[name].check(*case)]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_a_finding_is_made_with_a_reason(path: Path) -> None:
    """The first argument of `failed` and `not_evaluated` is a member of an enum, or a variable that holds one."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("failed", "not_evaluated", "forbid"):
            first = ast.unparse(node.args[0]) if node.args else ""
            options = [o.partition(" if ")[0] for o in first.split(" else ")]
            held = ("reason", "excuse", "self.differs")
            members = ("Reason.", "General.", "Both.")
            assert all(o in held or o.startswith(members) for o in options), f"{path.name}: {first}"


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_finding_has_its_reason(name: str) -> None:
    """Whatever an invariant says of the cases here is for a reason of its own, or a general one."""
    assert all(f.because(*reasons_of(name), *General, *Both) for f in findings(name))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_sentence_fits_its_evidence(name: str) -> None:
    """No finding of the cases here leaves a field or a bracket in its sentence, in another process neither."""
    for f in findings(name):
        told, again = message(f), message(Finding.from_dict(json.loads(json.dumps(f.to_dict()))))
        assert "{" not in told
        assert "[[" not in told
        assert told == again


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_reason_is_given_by_a_case(name: str) -> None:
    """For each reason there is a case, so that its sentence is tried."""
    given = {f.reason for f in findings(name)}
    assert {r.code for r in reasons_of(name)} <= given


def test_no_two_reasons_are_one() -> None:
    """No two reasons share a code and a sentence, and none is an alias of another: `because` tells them apart."""
    members = [member for enum in (General, Both, *map(reasons_of, BUILT_IN)) for member in enum.__members__.items()]
    assert len({(name, reason.value) for name, reason in members}) == len(members)
    assert all(name == reason.name for name, reason in members)


ELSEWHERE = {
    ("hardware.py", "self"): "a FailedQuery",
    ("run.py", "self"): "an ErrorRecord",
    ("simulate.py", "failure"): "a FailedQuery",
    ("round_trip.py", "w"): "a warning",
    ("generated.py", "failure"): "the report's function",
    ("pages.py", "seen"): "an Attempt, whose message was rendered",
    ("tables.py", "a"): "an Attempt, whose message was rendered",
    ("terminal.py", "failure"): "the function of a report",
    ("test_founding_bug.py", "failure"): "the function of a report",
    ("test_reports.py", "failure"): "the function of a report",
    ("verdicts.py", "self"): "a Finding, which compares it with a reason's and says nothing of it",
    ("test_simulate.py", "f"): "a FailedQuery",
    ("test_simulate.py", "failure"): "a FailedQuery",
    ("test_selectors_under_simulation.py", "f"): "a FailedQuery",
    ("test_on_cuda.py", "w"): "a warning",
}
"""Whose attribute `message` is read, by file and name, where it is no finding's; `error` is an ErrorRecord anywhere."""
TREE = sorted(p for tree in ("pytest_sftguard", "homework", "tools", "tests") for p in (ROOT / tree).rglob("*.py"))


def test_nothing_but_the_renderer_reads_a_message() -> None:
    """Whoever wants to know why a finding says what it says asks for its reason and its evidence."""
    read = {
        (path.name, ast.unparse(node.value).rpartition(".")[2])
        for path in TREE
        if path.name != "rendering.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and node.attr == "message" and isinstance(node.ctx, ast.Load)
    }
    assert {(name, whose) for name, whose in read if whose != "error"} == set(ELSEWHERE)


@pytest.mark.parametrize("folder", ["invariants", "diagnosis"])
def test_nothing_that_judges_renders(folder: str) -> None:
    """Neither invariants nor diagnoses know the sentences that findings become."""
    files = (ROOT / "pytest_sftguard" / folder).glob("*.py")
    assert [p.name for p in files if "rendering import" in p.read_text(encoding="utf-8")] == []
