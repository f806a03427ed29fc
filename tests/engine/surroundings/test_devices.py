"""A process that has lost its CUDA device: what is still told of the run, and what comes after it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pytest_sftguard import detection
from pytest_sftguard.engine import runner
from pytest_sftguard.engine.recording.watching import Watch
from pytest_sftguard.engine.surroundings import devices
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.verdicts import Outcome, judge
from tests.targets.tiny import TINY

ASSERT = "CUDA error: device-side assert triggered"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA device that raises at every call."""

    def fail(*_: object) -> None:
        raise RuntimeError(f"{ASSERT}\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", fail)
    monkeypatch.setattr(devices, "_lost", None)


def test_a_device_that_computes_is_not_lost() -> None:
    """Nor is one that nobody uses, or a CPU."""
    assert devices.answers("cpu")
    assert devices.answers("cuda")
    assert devices.lost() is None


@pytest.mark.usefixtures("broken")
def test_a_device_that_raises_is_lost_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the first line of what it said."""
    assert not devices.answers("cuda")
    assert devices.lost() == ASSERT
    monkeypatch.undo()
    monkeypatch.setattr(devices, "_lost", ASSERT)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not devices.answers("cuda")
    assert devices.answers("cpu")


@pytest.mark.usefixtures("broken")
def test_what_isolates_a_run_does_not_raise_for_a_lost_device() -> None:
    """The exception of the run itself comes out, and the host's generators are put back."""
    before = torch.get_rng_state()

    def fail() -> None:
        raise ZeroDivisionError(torch.rand(3))

    with pytest.raises(ZeroDivisionError), isolated():
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_that_cannot_be_put_back_on_a_sound_device_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """That is a defect, and nothing to pass over."""

    def fail(_: object) -> None:
        raise RuntimeError("no such generator")

    monkeypatch.setattr(torch.cuda, "set_rng_state_all", fail)
    with pytest.raises(RuntimeError, match="no such generator"), isolated():
        pass


def test_a_run_without_a_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what the device was lost to. A skip would be green where the test that lost it expects an error."""
    monkeypatch.setattr(runner.devices, "answers", lambda device_type: False)
    monkeypatch.setattr(devices, "_lost", ASSERT)
    record = runner.run(RunConfig(cell=Cell("fp32", 2, 1), target=TINY, device="cpu", steps=2))
    assert record.error is not None
    assert ASSERT in record.error.message
    assert judge(record, load_invariants()).outcome is Outcome.FAILED


def test_a_run_that_loses_its_device_keeps_what_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its steps and its error; of the weights there is nothing to tell, and no look at them ends the session."""
    calls: list[str] = []

    def answers(device_type: str) -> bool:
        calls.append(device_type)
        return len(calls) == 1  # before the run, and not after its training

    monkeypatch.setattr(runner.devices, "answers", answers)
    record = runner.run(
        RunConfig(cell=Cell("fp32", 2, 1), target="tests.targets.tiny:raises_in_training", device="cpu", steps=4)
    )
    assert record.steps
    assert record.error is not None
    assert record.error.stage == "train"
    assert record.adapter == ()
    assert record.base is None


def test_a_run_that_loses_its_device_to_an_answer_tells_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the training was stays in the record, and looks that go by its batches have them on the host."""
    asked: list[str] = []

    def answers(device_type: str) -> bool:
        asked.append(device_type)
        return len(asked) < 3  # before the run, and after its training

    def fail(*_: object) -> None:
        raise RuntimeError(ASSERT)

    monkeypatch.setattr(runner.devices, "answers", answers)
    monkeypatch.setattr(runner.generation, "ask", fail)
    given_up = []
    original = Watch.give_up_device
    monkeypatch.setattr(Watch, "give_up_device", lambda watch: (original(watch), given_up.append(watch)))
    record = runner.run(RunConfig(cell=Cell("fp32", 2, 1), target=TINY, device="cpu", steps=2, looks=("supervision",)))
    assert record.error is not None
    assert (record.error.stage, record.error.message) == ("answers", ASSERT)
    assert record.adapter
    assert record.supervision is not None
    [watch] = given_up
    assert all(isinstance(batch["input_ids"], torch.Tensor) for batch in watch.batches)


def test_copies_of_what_is_on_the_host_are_the_tensors_themselves() -> None:
    """Nothing is copied where nothing can be lost; what is rescued is equal, and memory of its own."""
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "step": 1}
    copies = devices.copied(batch)
    assert copies["input_ids"] is batch["input_ids"]
    [rescued] = devices.rescued([copies])
    assert torch.equal(rescued["input_ids"], batch["input_ids"])
    assert rescued["input_ids"].data_ptr() != batch["input_ids"].data_ptr()
    assert rescued["step"] == 1


def attempt(name: str, folder: str) -> detection.Attempt:
    """One that loses the device of its process, if it is the first there."""
    torch.cuda.is_initialized, devices._lost = (lambda: True), "gone"
    Path(folder, name).touch(exist_ok=False)  # once for each attempt
    return detection.Attempt(fault=name, precision="fp32")


@pytest.mark.slow
def test_attempts_after_a_lost_device_are_made_in_new_processes(tmp_path: Path) -> None:
    """Each once, and all in the order that they were asked for."""
    told: list[str] = []
    tasks = [(attempt, (name, str(tmp_path))) for name in ("one", "two", "three")]
    found = detection.run_all(tasks, 2, lambda a: told.append(a.fault))
    assert [a.fault for a in found] == ["one", "two", "three"]
    assert sorted(told) == ["one", "three", "two"]
