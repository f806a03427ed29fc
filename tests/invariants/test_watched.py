"""What is watched throughout the training: what may be missing, what is sound, and which losses are evidence."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.invariants.adapter_reached import AdapterReached
from pytest_sftguard.invariants.cell_is_real import CellIsReal
from pytest_sftguard.invariants.loss_in_float32 import LossInFloat32
from pytest_sftguard.invariants.randomness_alive import RandomnessAlive
from pytest_sftguard.records import Names, ReachRecord, RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import Invariant, Outcome
from tests.invariants.test_invariants import BUILT_IN
from tests.support.canned import Cell, healthy
from tests.support.cases.watched import MAY_BE_MISSING


@pytest.mark.parametrize(("name", "record", "wording"), MAY_BE_MISSING.values(), ids=MAY_BE_MISSING)
def test_what_need_not_be_known_is_said(name: str, record: RunRecord, wording: str) -> None:
    """What a training need not offer is not evaluated, with the reason, and does not keep the cell from passing."""
    [finding] = BUILT_IN[name].check(record)
    assert (finding.outcome, finding.required) == (Outcome.NOT_EVALUATED, False)
    assert wording in message(finding)


def failed(invariant: Invariant, record: RunRecord) -> bool:
    """Whether the invariant fails."""
    return any(f.outcome is Outcome.FAILED for f in invariant.check(record))


def losing(losses: list[float], tokens: int = 7) -> RunRecord:
    """A record with one loss in each step."""
    record = healthy(Cell("fp32", 2, 1), steps=len(losses))
    steps = zip(record.steps, losses, strict=True)
    made = (dataclasses.replace(s, micro_losses=(x,), supervised_tokens=tokens) for s, x in steps)
    return dataclasses.replace(record, steps=tuple(made))


def in_bfloat16(x: float) -> float:
    """`x`, truncated to bfloat16."""
    [bits] = struct.unpack("<I", struct.pack("<f", x))
    [made] = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))
    return float(made)


@given(losses=st.lists(st.floats(0.0625, 128, width=32), min_size=1, max_size=8), step=st.integers(1, 2**12))
def test_a_loss_off_the_grid_is_evidence_of_float32(losses: list[float], step: int) -> None:
    """One loss that is no number of a half-precision type is enough, whatever the others are."""
    [bits] = struct.unpack("<I", struct.pack("<f", 4.21875))
    [off] = struct.unpack("<f", struct.pack("<I", bits + 2 * step + 1))
    assert not failed(LossInFloat32(), losing([*losses, off], tokens=1))


@given(losses=st.lists(st.integers(0, 16).map(float) | st.sampled_from([0.5, 0.25, 0.75, 1.5]), min_size=3))
def test_simple_numbers_are_no_evidence(losses: list[float]) -> None:
    """Zeros, whole numbers and halves are what a loss in float32 may be too."""
    assert not failed(LossInFloat32(), losing(losses, tokens=1))


@given(
    losses=st.lists(st.floats(0.01, 100), min_size=12, max_size=12, unique_by=lambda x: in_bfloat16(x)),
    tokens=st.integers(1, 4096),
)
def test_a_sum_in_half_precision_is_recognised(losses: list[float], tokens: int) -> None:
    """Whatever number of tokens a sum in bfloat16 is divided by in float32."""
    divided = [struct.unpack("<f", struct.pack("<f", in_bfloat16(x) / tokens))[0] for x in losses]
    # of twelve numbers of eight bits, hardly any three have more than four bits by chance alone
    telling = [x for x in losses if in_bfloat16(x) * 2**10 % 2**6]
    if len(telling) >= 6:
        assert failed(LossInFloat32(), losing(divided, tokens))


def batches(**changes: Any) -> RunRecord:
    """A healthy record of cell 4x1 with other batches."""
    record = healthy(Cell("fp32", 4, 1))
    assert record.batches is not None
    return dataclasses.replace(record, batches=dataclasses.replace(record.batches, **changes))


@pytest.mark.parametrize(
    "record",
    [
        dataclasses.replace(batches(rows=(4, 4, 3, 4, 4, 3)), micro_batches_per_epoch=3),
        batches(rows=(4, 4, 1), loader_rows=16),
        batches(rows=(8, 8), loader_rows=4),
        batches(rows=(1, 1), packed=True),
        batches(rows=()),
        batches(rows=(4, 4, 2), loader_rows=None, dataset_rows=None),
    ],
    ids=["short-last", "buffered", "pairs", "packed", "unknown-inputs", "stream"],
)
def test_a_cell_is_what_it_says(record: RunRecord) -> None:
    """A short batch per epoch, pairs, packs and a loader that fills a buffer are what the cell asked for."""
    assert list(CellIsReal().check(record)) == []


def test_a_fused_kernel_may_read_the_factors_past_their_layer() -> None:
    """A layer that was never called and whose factors have gradients is not dead."""
    record = healthy()
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    record = dataclasses.replace(record, reach=ReachRecord(layers=2, unreached=Names.of([name])))
    assert not failed(AdapterReached(), record)


def test_a_part_in_evaluation_mode_is_sound() -> None:
    """Half of the adapter's dropout layers may be off, and all of the base's own."""
    record = healthy()
    assert record.randomness is not None
    names = Names(1, ("a",))
    seen = dataclasses.replace(record.randomness, adapter_off=names, other_dropouts=1, other_off=names)
    assert not failed(RandomnessAlive(), dataclasses.replace(record, randomness=seen))
