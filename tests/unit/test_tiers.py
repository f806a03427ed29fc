"""Tiers and references: which runs a cell is compared with, and what is trained for the purpose."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard import registry
from pytest_sftguard.bundles import references
from pytest_sftguard.matrix import Cell, RunConfig, expand, parse_batch
from pytest_sftguard.tiers import LOOKS, REFERENCES, TIERS, NoReferenceError, reference_config
from tests.strategies import cells
from tests.support.canned import healthy

MATRIX = expand(["fp32", "bf16-mixed"], [parse_batch(b) for b in (2, 4, 8)])
SESSION = [RunConfig(cell=cell, target="some:target") for cell in MATRIX]


def config(cell: Cell, **changes: object) -> RunConfig:
    """What a cell of the session asks for."""
    return dataclasses.replace(RunConfig(cell=cell, target="some:target"), **changes)  # type: ignore[arg-type]


def test_every_look_is_a_file() -> None:
    """The looks of the tiers are the files of engine/looks, so that none is forgotten."""
    assert sorted(LOOKS) == registry.names("pytest_sftguard.engine.looks")


def test_tiers_grow() -> None:
    """Each tier holds all of the one before it."""
    tiers = list(TIERS.values())
    for smaller, larger in itertools.pairwise(tiers):
        assert set(smaller.looks) <= set(larger.looks)
        assert set(smaller.references) <= set(larger.references)


@pytest.mark.parametrize(
    ("cell", "relation", "reference"),
    [
        (Cell("bf16-mixed", 2, 4), "fp32", Cell("fp32", 2, 4)),
        (Cell("bf16-mixed", 2, 4), "batch_split", Cell("bf16-mixed", 8, 1)),
        (Cell("bf16-mixed", 8, 1), "batch_split", Cell("bf16-mixed", 4, 2)),
    ],
)
def test_sibling_of_the_session_is_taken(cell: Cell, relation: str, reference: Cell) -> None:
    """A cell of the session that will do is the reference, so that nothing is trained twice."""
    found = reference_config(config(cell), relation, SESSION)
    assert found in SESSION
    assert found.cell == reference


def test_cell_of_another_run_is_no_sibling() -> None:
    """A cell with another seed is no reference: one is trained for the purpose."""
    others = [dataclasses.replace(c, seed=1) for c in SESSION]
    assert reference_config(config(MATRIX[3]), "fp32", others).variant == "fp32"


@given(cell=cells(), relation=st.sampled_from(REFERENCES), steps=st.integers(1, 9))
def test_reference_is_like_its_cell(cell: Cell, relation: str, steps: int) -> None:
    """A reference has the cell's effective batch (in all processes), target and seed, and nothing to be asked."""
    asked = config(cell, steps=steps, looks=LOOKS, questions=8)
    try:
        made = reference_config(asked, relation)
    except NoReferenceError:
        return
    processes = 2 if relation == "replicas" else 1
    assert made.cell.effective_batch * processes == cell.effective_batch
    assert made.cell.precision == ("fp32" if relation == "fp32" else cell.precision)
    assert (made.variant, made.looks, made.questions, made.target) == (relation, (), 0, "some:target")
    assert made != asked


@pytest.mark.parametrize(
    ("cell", "relation", "steps"),
    [
        (Cell("fp32", 8, 1), "fp32", 8),
        (Cell("fp32", 1, 1), "batch_split", 8),
        (Cell("fp32", 8, 1), "resumed", 1),
        (Cell("fp32", 3, 1), "replicas", 8),
    ],
)
def test_cell_without_a_reference(cell: Cell, relation: str, steps: int) -> None:
    """Where there can be no such run, the reason is given."""
    with pytest.raises(NoReferenceError, match=r"\w+ \w+"):
        reference_config(config(cell, steps=steps), relation)


def test_records_of_a_bundle_are_references_for_each_other() -> None:
    """Siblings are found among records from elsewhere, too."""
    plain, half, split = (
        healthy(Cell("fp32", 8, 1)),
        healthy(Cell("bf16-mixed", 8, 1)),
        healthy(Cell("bf16-mixed", 2, 4)),
    )
    other = dataclasses.replace(plain, seed=1)
    assert references(half, [other, plain, half, split]) == {"fp32": plain, "batch_split": split}
    assert references(plain, [other, plain, half, split]) == {}
