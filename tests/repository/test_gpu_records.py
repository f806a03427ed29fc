"""Records that were made on GPUs, and brought home: today's invariants judge them as they were judged there."""

from __future__ import annotations

from pathlib import Path

import pytest

from pytest_sftguard.bundles import collect, references
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.verdicts import Outcome, judge

BUNDLES = sorted((Path(__file__).resolve().parents[2] / "docs" / "gpu").glob("*.json"))


def test_there_are_some() -> None:
    """A folder without any would leave nothing to judge."""
    assert BUNDLES


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.stem)
def test_sound_cells_of_a_gpu_pass(bundle: Path) -> None:
    """Each of them trained in the precision that it was asked for, on a CUDA device."""
    records = [record for _, record in collect([bundle])]
    assert {r.precision for r in records} >= {"fp32", "tf32", "bf16-mixed", "fp16-mixed"}
    for record in records:
        assert record.device.device_type == "cuda"
        verdict = judge(record, load_invariants(), references(record, records))
        assert verdict.outcome is Outcome.PASSED, (record.cell, verdict.failures)
