"""Predictions of memory: equal to what is really allocated, without allocating it."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_sftguard.engine import runner
from pytest_sftguard.engine.building.targets import TargetError
from pytest_sftguard.engine.memory import prediction as memory
from pytest_sftguard.engine.memory.prediction import Forecast, Meter, PredictionError, predict, rehearsal
from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.matrix import Cell, RunConfig
from tests.targets.tiny import TINY
from tools.benchmarks.memory_table import allocator_peak, measured
from tools.benchmarks.memory_targets import TOKENS

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")

CPU = HardwareProfile(device_type="cpu", name="a CPU")
CUDA = HardwareProfile(device_type="cuda", name="a GPU", capability="8.0")
SMALL = "tools.benchmarks.memory_targets:small"


@pytest.fixture(autouse=True)
def row_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of the enlarged model have 48 tokens."""
    monkeypatch.setenv(TOKENS, "48")


def config(
    precision: str = "fp32", batch: int = 4, accumulation: int = 1, target: str = SMALL, **more: Any
) -> RunConfig:
    """A run of two steps on the CPU."""
    return RunConfig(cell=Cell(precision, batch, accumulation), target=target, device="cpu", **{"steps": 2} | more)


@pytest.mark.parametrize(
    "asked",
    [
        config(),
        config(accumulation=3, batch=2),
        config("bf16-mixed"),
        config("fp16-mixed", batch=2),
        config("bf16-true"),
        config("bf16-mixed", training_arguments={"gradient_checkpointing": True}),
        config(training_arguments={"optim": "sgd"}),
    ],
    ids=["fp32", "accumulated", "bf16-mixed", "fp16-mixed", "bf16-true", "checkpointed", "sgd"],
)
def test_the_prediction_is_what_the_allocator_gives(asked: RunConfig) -> None:
    """It is within one percent of the real training's peak, as torch's CPU allocator reports it."""
    assert predict(asked, CPU).peak_bytes == pytest.approx(measured(asked, "cpu"), rel=0.01)


def test_the_measure_is_exact() -> None:
    """The peak is two megabytes if one of two is freed before a third is allocated."""

    def work() -> None:
        kept = torch.empty(1_000_000, dtype=torch.uint8)
        gone = torch.empty(1_000_000, dtype=torch.uint8)
        del gone
        last = torch.empty(900_000, dtype=torch.uint8)
        del kept, last

    assert allocator_peak(work) == 2_000_000


def test_a_rehearsal_allocates_next_to_nothing() -> None:
    """It predicts gigabytes and uses a few megabytes."""
    with rehearsal(config(), CPU) as ready:
        found = []
        used = allocator_peak(lambda: found.append(ready.predict(1024)))
    assert found[0].peak_bytes > 4 * 2**30
    assert used < 2**24


def test_a_trainer_can_be_rehearsed_again() -> None:
    """Autocast, Adam's moments and gradients of one rehearsal do not affect the next."""
    with rehearsal(config("bf16-mixed"), CPU) as ready:
        several = [ready.predict(*cell).peak_bytes for cell in ((1, 1), (4, 2), (1, 1))]
    assert several[0] == several[2]
    assert several[1] == predict(config("bf16-mixed", 4, 2), CPU).peak_bytes


def test_what_should_cost_more_does() -> None:
    """More rows, accumulated gradients and CUDA's rounding cost memory; checkpointing saves it."""
    plain = predict(config(), CPU).peak_bytes
    assert predict(config(batch=5), CPU).peak_bytes > plain
    assert predict(config(accumulation=2), CPU).peak_bytes > plain
    assert predict(config(), CUDA).peak_bytes > plain
    assert predict(config(training_arguments={"gradient_checkpointing": True}), CPU).peak_bytes < plain


def test_the_longest_rows_are_the_default() -> None:
    """The tiny model's rows differ in length, and its first batch does not have the longest."""
    with rehearsal(config(target=TINY), CPU) as ready:
        longest, first = ready.predict(4), ready.predict(4, longest=False)
    assert longest.tokens == (4, 23)
    assert first.tokens[1] <= 23
    assert first.peak_bytes <= longest.peak_bytes


def test_an_optimizer_of_the_targets_own_is_rehearsed() -> None:
    """Fake weights replace the real ones in its groups."""
    assert predict(config(target="tests.targets.tiny:optimizer_of_the_base"), CPU).peak_bytes > 0


def test_tf32_needs_what_fp32_needs() -> None:
    """tf32 can be predicted without a device that has it, because it takes the same bytes."""
    assert predict(config("tf32", target=TINY), CUDA).peak_bytes == predict(config(target=TINY), CUDA).peak_bytes


def test_a_rehearsal_leaves_no_trace() -> None:
    """Random generators and environment are unchanged, and tensors are real again."""
    torch.manual_seed(1)
    random.seed(2)
    before = (torch.get_rng_state().tolist(), random.getstate(), dict(os.environ))
    predict(config("fp16-mixed", target=TINY), CPU)
    assert before == (torch.get_rng_state().tolist(), random.getstate(), dict(os.environ))
    assert type(torch.ones(1)) is torch.Tensor


def test_what_needs_numbers_cannot_be_predicted() -> None:
    """A loss that goes through numpy has no value in a rehearsal, and the error says so."""
    with pytest.raises(PredictionError, match="the rehearsal on fake tensors ended in"):
        predict(config(target="tests.targets.tiny:loss_through_numpy"), CPU)


def test_a_target_that_breaks_its_contract_is_refused() -> None:
    """The rehearsal refuses it as the training does."""
    with pytest.raises(TargetError, match="not a transformers"):
        predict(config(target="tests.targets.tiny:no_trainer"), CPU)


def test_real_masks_choose_places_of_fake_tensors() -> None:
    """Indexing by a mask has a known shape if the mask is part of the batch."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    mask = torch.tensor([True, False, True])
    with fakes, Meter():
        assert fakes.from_tensor(torch.zeros(3, 5))[mask].shape == (2, 5)


def test_a_storage_is_counted_once_and_until_its_end() -> None:
    """Views share their storage, freed storages do not count, and blocks are rounded."""
    meter = Meter(rounding=512)
    with FakeTensorMode(allow_non_fake_inputs=True), meter:
        large = torch.empty(2**23, dtype=torch.int32)
        view = large[1:].view(-1)
        assert meter.live == 2**25
        del large, view
        assert meter.live == 0
        one = torch.empty(2**24 + 1, dtype=torch.uint8)
        assert meter.live == 2**24 + 512
        del one
    assert (meter.live, meter.peak) == (0, 2**25)


def test_a_cell_that_does_not_fit_is_not_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record has the need and the free memory, and no steps."""
    monkeypatch.setattr(runner, "_forecast", Forecast())
    monkeypatch.setattr(runner, "free_bytes", lambda device_type: 20 * 2**20)
    record = runner.run(config(batch=64, fit_margin=0.1))
    assert record.steps == ()
    assert record.predicted_memory_bytes > 100 * 2**20
    assert record.not_run.endswith("MiB of 20 MiB free, of which 10% is left as a margin")


def test_a_cell_that_fits_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its record has the predicted need."""
    monkeypatch.setattr(runner, "_forecast", Forecast())
    record = runner.run(config(target=TINY, fit_margin=0.1))
    assert len(record.steps) == 2
    assert record.predicted_memory_bytes > 2**18


@pytest.mark.parametrize("margin", ["off", "auto"])
def test_a_cpu_is_not_foreseen_unless_asked(monkeypatch: pytest.MonkeyPatch, margin: str) -> None:
    """The matrix of a CPU does not spend time on predictions."""
    monkeypatch.setattr(memory, "predict", None)
    assert runner.run(config(target=TINY, steps=1, fit_margin=margin)).predicted_memory_bytes is None


def test_a_cell_that_cannot_be_predicted_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown need is no reason to skip a training."""
    monkeypatch.setattr(runner, "_forecast", Forecast())
    record = runner.run(config(target="tests.targets.tiny:loss_through_numpy", fit_margin=0.1))
    assert len(record.steps) == 2
    assert record.not_run is None


def test_what_plainly_fits_is_not_rehearsed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the rows need at most twice the memory; if that is too much, a rehearsal decides."""
    forecast = Forecast()
    need = forecast.need(config(target=TINY), CPU, 0)
    asked: list[RunConfig] = []
    monkeypatch.setattr(memory, "predict", lambda config, device_type: asked.append(config) or _Needs(1))
    twice = dataclasses.replace(config(target=TINY), cell=Cell("fp32", 8, 1))
    assert forecast.need(twice, CPU, 2 * need) is None
    assert asked == []
    assert forecast.need(twice, CPU, 2 * need - 1) == 1
    assert asked == [twice]


@pytest.mark.parametrize(
    "asked", [config(), config("bf16-mixed", 2), config("bf16-true", 2)], ids=lambda c: str(c.cell)
)
def test_a_cell_needs_what_the_guard_needs_too(asked: RunConfig) -> None:
    """The prediction for a complete cell, with round trip and digests, is within a tenth of the real peak."""
    real = allocator_peak(lambda: runner.run(asked))
    assert predict(asked, CPU).cell_bytes == pytest.approx(real, rel=0.1)


def test_this_machine_has_memory() -> None:
    """The free memory of the host can be read."""
    free = memory.free_bytes("cpu")
    assert free is None or 2**20 < free < 2**50


@dataclasses.dataclass
class _Needs:
    cell_bytes: int
