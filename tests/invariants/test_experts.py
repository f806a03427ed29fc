"""An expert that is chosen for nothing that the loss depends on may stay as it is, and nothing else may."""

from __future__ import annotations

import dataclasses

import pytest

from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.records import Names, RunRecord, TensorRecord
from pytest_sftguard.verdicts import judge
from tests.support.canned import healthy, with_steps

LIST = "model.layers.1.mlp.experts"
SILENT = {"gradient_present", "every_factor_moves", "round_trip"}
"""Invariants that a silent tensor fails."""


def routed(*silent: int, chosen_from: str = LIST) -> RunRecord:
    """A run of two experts, of which those of `silent` have gradients of zero alone, and an adapter of zeros."""
    record = healthy()
    names = {i: [f"{LIST}.{i}.lora_{f}.default.weight" for f in "AB"] for i in (0, 1)}
    still = [n for i in silent for n in names[i]]
    by_name = dict(zip("AB", record.adapter, strict=True))
    tensors: list[TensorRecord] = []
    for factor, name in ((n.partition(".lora_")[2][0], n) for i in names for n in names[i]):
        tensor = dataclasses.replace(by_name[factor], name=name, chosen_from=chosen_from)
        tensors.append(dataclasses.replace(tensor, delta_norm=0.0, changed_fraction=0.0) if name in still else tensor)
    record = with_steps(record, zero_gradients=Names.of(still), unchanged=Names.of(still))
    assert record.round_trip is not None
    zero = Names.of(f"{LIST}.{i}.lora_B" for i in silent)
    trip = dataclasses.replace(record.round_trip, zero=zero)
    return dataclasses.replace(record, adapter=tuple(tensors), round_trip=trip)


def failed(record: RunRecord) -> set[str]:
    """Those of `SILENT` that failed."""
    return {f.invariant for f in judge(record, load_invariants()).failures} & SILENT


@pytest.mark.parametrize("silent", [(), (0,), (1,)])
def test_an_expert_may_be_silent(silent: tuple[int, ...]) -> None:
    """Where the router gave another expert something to learn."""
    assert failed(routed(*silent)) == set()


@pytest.mark.parametrize(
    "record", [routed(0, 1), routed(1, chosen_from="")], ids=["all-of-a-list", "none-that-is-chosen"]
)
def test_any_other_layer_must_not(record: RunRecord) -> None:
    """Neither all experts of a list, nor a layer that every token passes through."""
    assert failed(record) == SILENT
