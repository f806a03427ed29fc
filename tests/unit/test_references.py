"""References of a session: cells that are there are taken, none is trained twice, a tier's own are trained for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.records import RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.session import Runs
from pytest_sftguard.verdicts import Finding, Invariant
from tests.support import canned, stub

CELLS = [Cell("fp32", 8, 1), Cell("fp32", 4, 2), Cell("bf16-mixed", 8, 1), Cell("bf16-mixed", 4, 2)]
SESSION = [RunConfig(cell=cell, target="some:target", steps=4) for cell in CELLS]
PLAIN, SPLIT, HALF, HALF_SPLIT = SESSION


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> stub.Engine:
    """An engine that trains nothing, and remembers what it was asked for."""

    def put(thing: object, name: str, value: object) -> None:
        monkeypatch.setattr(thing, name, value, raising=False)

    return stub.install(make=_named, put=put)


def _named(config: RunConfig) -> RunRecord:
    return canned.of(config, variant=config.variant)


def relations(run: object) -> dict[str, tuple[str, str]]:
    """What the run was compared with: cell and variant of each kind."""
    return {relation: (r.cell, r.variant) for relation, r in run.references.items()}  # type: ignore[attr-defined]


def test_siblings_of_the_session_are_references(engine: stub.Engine) -> None:
    """Cells that the session trains anyway are compared with, whatever the tier asks for."""
    run = Runs().compared(HALF, [], session=SESSION)
    assert relations(run) == {"fp32": ("fp32-b8x1", ""), "batch_split": ("bf16-mixed-b4x2", "")}


def test_no_cell_is_trained_twice(engine: stub.Engine) -> None:
    """A session of four cells trains four, though each is a reference for others."""
    runs = Runs()
    for config in SESSION:
        runs.compared(config, [], ("fp32", "batch_split"), session=SESSION)
    assert sorted(engine.ran) == sorted(map(str, CELLS))


def test_nothing_is_trained_that_was_not_asked_for(engine: stub.Engine) -> None:
    """A cell without siblings, in a test that asks for no reference, is trained alone."""
    run = Runs().compared(HALF, [], session=[HALF])
    assert (relations(run), engine.ran) == ({}, ["bf16-mixed-b8x1"])


def test_a_tiers_references_are_trained(engine: stub.Engine) -> None:
    """What is asked for and no cell of the session is, is trained for the purpose."""
    run = Runs().compared(HALF, [], ("fp32", "rerun", "replicas"), session=[HALF])
    assert relations(run) == {
        "fp32": ("fp32-b8x1", "fp32"),
        "rerun": ("bf16-mixed-b8x1", "rerun"),
        "replicas": ("bf16-mixed-b4x1", "replicas"),
    }


def test_a_reference_is_shared(engine: stub.Engine) -> None:
    """Two tests of one cell share its references, too."""
    runs = Runs()
    for _ in range(2):
        runs.compared(HALF, [], ("rerun",), session=[HALF])
    assert engine.ran == ["bf16-mixed-b8x1"] * 2


@pytest.mark.parametrize(
    ("config", "relation"),
    [
        (PLAIN, "fp32"),
        (dataclasses.replace(PLAIN, cell=Cell("fp32", 1, 1)), "batch_split"),
        (dataclasses.replace(PLAIN, steps=1), "resumed"),
    ],
)
def test_a_reference_that_there_cannot_be_is_left_out(engine: stub.Engine, config: RunConfig, relation: str) -> None:
    """Where a cell can have no such reference, it is judged without."""
    assert relations(Runs().compared(config, [], (relation,), session=[config])) == {}


def test_a_cell_that_was_not_run_needs_no_reference(engine: stub.Engine) -> None:
    """Nothing is trained to compare with a cell that the device cannot train."""
    engine.make = canned.not_run
    runs = Runs()
    run = runs.compared(HALF, [], ("rerun", "fp32"), session=SESSION)
    assert (relations(run), engine.ran) == ({}, ["bf16-mixed-b8x1"])


class _Compares(Invariant):
    """Reports which reference it was given."""

    reference = "rerun"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> list[Finding]:  # type: ignore[override]
        return [self.failed("nothing" if reference is None else reference.variant)]


@pytest.mark.parametrize(("references", "given"), [(("rerun", "fp32"), "rerun"), (("fp32",), "nothing")])
def test_an_invariant_gets_its_reference(engine: stub.Engine, references: tuple[str, ...], given: str) -> None:
    """An invariant is given the run of the kind that it names, and None where there is none."""
    run = Runs().compared(HALF, [_Compares()], references, session=[HALF])
    assert [message(f) for f in run.verdict.findings] == [given]


def test_progress_names_the_reference(engine: stub.Engine) -> None:
    """What a test shows of its cell goes from the imports to the looks, and then on to the references by name."""
    told: list[str] = []
    make: Callable[[str], None] = told.append
    Runs().compared(HALF, [], ("rerun",), (), make, [HALF])
    own = ["importing torch", "building", "step 1/4", "step 2/4", "step 3/4", "looking at what was trained"]
    assert told == [*own, *(f"rerun reference, {doing}" for doing in own)]
