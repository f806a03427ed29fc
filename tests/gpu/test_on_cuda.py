"""What only a CUDA device can show: how often the guard waits for it, and what a training takes of its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from pytest_sftguard.engine.building.targets import resolve
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.engine.machine.profiles import device_profile
from pytest_sftguard.engine.memory.prediction import predict
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.recording.watching import Watch
from pytest_sftguard.engine.runner import run
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named
from pytest_sftguard.sizes import DEFAULT_MARGIN
from tools.benchmarks.memory_table import measured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

ROOT = Path(__file__).resolve().parents[2]
TARGET = "homework.sft:build_trainer"
CELLS = [Cell("fp32", 8, 1), Cell("fp32", 2, 4), Cell("bf16-mixed", 8, 1), Cell("fp16-mixed", 2, 4)]


LOSES = """
import pytest

pytestmark = pytest.mark.gpu_stability(precision="fp32", batch=4, steps=4, device="cuda")

@pytest.mark.gpu_stability(target="tests.targets.tiny:unknown_token_id")
def test_loses(sft_run): ...

def test_comes_after(sft_run): ...
"""


def waits(cell: Cell, steps: int, folder: Path, *, guarded: bool) -> list[str]:
    """Where a training waited for the device, as torch warns of it."""
    config = RunConfig(cell=cell, target=TARGET, device="cuda", steps=steps)
    with isolated(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = build(resolve(TARGET), config, mode_named(cell.precision), "cuda", folder)
        trainer.log = lambda *_, **__: None
        watch = Watch(trainer, Recorder(trainer.model)) if guarded else None
        torch.cuda.set_sync_debug_mode("warn")
        try:
            trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if watch is not None:
            watch.detach()
    return [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_the_guard_waits_for_the_device_once_a_step(cell: Cell, tmp_path: Path) -> None:
    """The looks at the first step and at the end aside, which a longer training has no more of."""

    def of_a_step(*, guarded: bool) -> tuple[float, set[str]]:
        few, many = (waits(cell, steps, tmp_path, guarded=guarded) for steps in (4, 12))
        return (len(many) - len(few)) / 8, set(many)

    (bare, _), (guarded, where) = of_a_step(guarded=False), of_a_step(guarded=True)
    # torch's count sees something: the Trainer itself reads the loss
    assert bare > 0
    assert guarded - bare <= 1, sorted(where)


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed"])
def test_the_predicted_memory_is_what_the_device_gives(precision: str) -> None:
    """Within a tenth of the peak, and never short of it by more than the margin covers."""
    config = RunConfig(cell=Cell(precision, 32, 1), target=TARGET, device="cuda", steps=3)
    predicted = predict(config, device_profile("cuda")).peak_bytes
    real = measured(config, "cuda")
    assert predicted == pytest.approx(real, rel=0.1)
    assert real * (1 - DEFAULT_MARGIN) <= predicted


def test_a_cell_that_does_not_fit_the_device_is_not_trained() -> None:
    """It says what it needs and what there is, as the driver tells it; here all but a millionth is left alone."""
    record = run(RunConfig(cell=Cell("fp32", 32, 1), target=TARGET, device="cuda", steps=2, fit_margin=1 - 1e-6))
    assert not record.steps
    assert record.not_run is not None
    assert "needs" in record.not_run
    assert "free" in record.not_run


def test_a_token_id_out_of_range_is_named_and_ends_no_session(tmp_path: Path) -> None:
    """The kernel's assertion ends what the process can do with the device: another one catches the next fault."""
    found = tmp_path / "found.json"
    faults = ["token-id-out-of-range", "lr-zero-or-warmup-longer-than-run"]
    command = [sys.executable, "-m", "pytest_sftguard", "faults", *faults, "--device", "cuda", "--jobs", "1"]
    done = subprocess.run([*command, "--json", found], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    by_fault = {a["fault"]: a for a in json.loads(found.read_text(encoding="utf-8"))["attempts"]}
    assert "token_id_out_of_range" in by_fault["token-id-out-of-range"]["named"]
    assert by_fault["lr-zero-or-warmup-longer-than-run"]["caught"]


def test_cells_after_a_lost_device_say_so(tmp_path: Path) -> None:
    """In one pytest session: the first cell tells of its kernel, the second that there is no device any more."""
    (tmp_path / "test_it.py").write_text(LOSES, encoding="utf-8")
    # which names the plugin where nothing is installed
    ours = ["-p", "conftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *ours, "--rootdir", tmp_path, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "device-side assert" in done.stdout
    assert "lost its CUDA device in an earlier training" in done.stdout
    assert "2 failed" in done.stdout
