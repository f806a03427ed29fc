"""The built-in target: what someone sees who has named no target yet."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_sftguard.verdicts import JudgedRun


@pytest.mark.parametrize("batch", [(2, 4), (8, 1)], ids=["2x4", "8x1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed"])
def test_the_loss_falls_in_every_default_cell(
    run_cell: Callable[..., JudgedRun], precision: str, batch: tuple[int, int]
) -> None:
    """In the default eight steps the loss falls by a fifth and more."""
    losses = run_cell(precision=precision, batch=batch, steps=8).record.losses
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_does_not_rise_in_two_steps(run_cell: Callable[..., JudgedRun], seed: int) -> None:
    """The README's test of two steps sees the loss fall, whatever the order of the rows is."""
    first, second = run_cell(steps=2, seed=seed).record.losses
    assert second < first


@pytest.mark.parametrize("seed", range(5))
def test_no_default_cell_skips_a_step(run_cell: Callable[..., JudgedRun], seed: int) -> None:
    """No gradient overflows under the loss scale that mixed float16 begins with, in either batch."""
    steps = [s for b in ((2, 4), (8, 1)) for s in run_cell(precision="fp16-mixed", batch=b, seed=seed).record.steps]
    assert {s.effect for s in steps} == {"applied"}
