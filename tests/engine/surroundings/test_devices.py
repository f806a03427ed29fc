"""A process that has lost its CUDA device: what the record keeps, and what happens to later runs."""

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
    """Neither is an unused device or a CPU."""
    assert devices.answers("cpu")
    assert devices.answers("cuda")
    assert devices.lost() is None


@pytest.mark.usefixtures("broken")
def test_a_device_that_raises_is_lost_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line of its error is kept."""
    assert not devices.answers("cuda")
    assert devices.lost() == ASSERT
    monkeypatch.undo()
    monkeypatch.setattr(devices, "_lost", ASSERT)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert not devices.answers("cuda")
    assert devices.answers("cpu")


@pytest.mark.usefixtures("broken")
def test_what_isolates_a_run_does_not_raise_for_a_lost_device() -> None:
    """The exception of the run itself is raised, and the host's generators are restored."""
    before = torch.get_rng_state()

    def fail() -> None:
        raise ZeroDivisionError(torch.rand(3))

    with pytest.raises(ZeroDivisionError), isolated():
        fail()
    assert torch.equal(torch.get_rng_state(), before)


def test_generators_that_cannot_be_put_back_on_a_sound_device_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a failure is a defect, and is not ignored."""

    def fail(_: object) -> None:
        raise RuntimeError("no such generator")

    monkeypatch.setattr(torch.cuda, "set_rng_state_all", fail)
    with pytest.raises(RuntimeError, match="no such generator"), isolated():
        pass


def test_a_run_without_a_device_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """It quotes the error that lost the device. A skip would be green if the test that lost it expects an error."""
    monkeypatch.setattr(runner.devices, "answers", lambda device_type: False)
    monkeypatch.setattr(devices, "_lost", ASSERT)
    record = runner.run(RunConfig(cell=Cell("fp32", 2, 1), target=TINY, device="cpu", steps=2))
    assert record.error is not None
    assert ASSERT in record.error.message
    assert judge(record, load_invariants()).outcome is Outcome.FAILED


def test_a_run_that_loses_its_device_keeps_what_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its steps and its error; nothing reads the weights, which would end the session."""
    calls: list[str] = []

    def answers(device_type: str) -> bool:
        calls.append(device_type)
        # before the run, and not after its training
        return len(calls) == 1

    monkeypatch.setattr(runner.devices, "answers", answers)
    record = runner.run(
        RunConfig(cell=Cell("fp32", 2, 1), target="tests.targets.tiny:raises_in_training", device="cpu", steps=4)
    )
    assert record.steps
    assert record.error is not None
    assert record.error.stage == "train"
    assert record.adapter == ()
    assert record.base is None


def test_a_run_that_loses_its_device_to_an_answer_reports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record keeps the training, and looks at its batches use the copies on the host."""
    asked: list[str] = []

    def answers(device_type: str) -> bool:
        asked.append(device_type)
        # before the run, and after its training
        return len(asked) < 3

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
    """Only CUDA tensors are copied; rescued tensors are equal, with memory of their own."""
    batch = {"input_ids": torch.arange(6).reshape(2, 3), "step": 1}
    copies = devices.copied(batch)
    assert copies["input_ids"] is batch["input_ids"]
    [rescued] = devices.rescued([copies])
    assert torch.equal(rescued["input_ids"], batch["input_ids"])
    assert rescued["input_ids"].data_ptr() != batch["input_ids"].data_ptr()
    assert rescued["step"] == 1


def attempt(name: str, folder: str) -> detection.Attempt:
    """An attempt that loses the device of its process."""
    torch.cuda.is_initialized, devices._lost = (lambda: True), "gone"
    # raises if the attempt is made twice
    Path(folder, name).touch(exist_ok=False)
    return detection.Attempt(fault=name, precision="fp32")


@pytest.mark.slow
def test_attempts_after_a_lost_device_are_made_in_new_processes(tmp_path: Path) -> None:
    """Each is made once, and all are returned in the requested order."""
    reported: list[str] = []
    tasks = [(attempt, (name, str(tmp_path))) for name in ("one", "two", "three")]
    found = detection.run_all(tasks, 2, lambda a: reported.append(a.fault))
    assert [a.fault for a in found] == ["one", "two", "three"]
    assert sorted(reported) == ["one", "three", "two"]
