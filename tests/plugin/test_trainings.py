"""The plugin with its real engine: the built-in target for two steps, and targets that break their contract.

All of them are cells of one pytest process, as that imports torch once; the tests look at what it left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from pytest_sftguard.records import RunRecord

CELL = """
@pytest.mark.gpu_stability(precision={precision!r}, batch="2x2", steps=2, device="cpu", target={target!r})
def test_{name}(sft_run):
    assert len(sft_run.losses) == 2
"""
BUILT_IN = "pytest_sftguard.engine.models.tiny:build_trainer"
MINE = """
from pytest_sftguard.engine.models import tiny

number = 3

def no_trainer(**arguments):
    return "trained"

def no_keywords():
    return None

def not_yet(**arguments):
    raise NotImplementedError("one day\\nperhaps")

def no_data(**arguments):
    trainer = tiny.build_trainer(**arguments)
    trainer.train_dataset = None
    return trainer
"""
CELLS = {
    "fp32": ("fp32", BUILT_IN),
    "bf16": ("bf16-mixed", BUILT_IN),
    "fp16": ("fp16-mixed", BUILT_IN),
    "tf32": ("tf32", BUILT_IN),
    "does_not_import": ("fp32", "absent_module:build"),
    "no_path": ("fp32", "mine"),
    "absent": ("fp32", "mine:absent"),
    "not_callable": ("fp32", "mine:number"),
    "no_trainer": ("fp32", "mine:no_trainer"),
    "no_keywords": ("fp32", "mine:no_keywords"),
    "no_data": ("fp32", "mine:no_data"),
    "raises": ("fp32", "mine:not_yet"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where pytest trained every cell of the table."""
    path = tmp_path_factory.mktemp("trainings")
    cells = [CELL.format(name=name, precision=p, target=t) for name, (p, t) in CELLS.items()]
    (path / "test_it.py").write_text("import pytest\n" + "".join(cells))
    (path / "mine.py").write_text(MINE)
    (path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SFTGUARD_", "PYTEST_"))}
    environment["COLUMNS"] = "120"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--junitxml=report.xml"], cwd=path, env=environment, capture_output=True
    )
    return path


@pytest.fixture
def case(folder):
    """The JUnit element of a cell: a function of its name in the table."""
    tree = ElementTree.parse(folder / "report.xml")
    return lambda name: next(c for c in tree.iter("testcase") if c.get("name").startswith(f"test_{name}["))


def problems(case):
    """What is in a cell's element beside its properties: failure, error or skip."""
    return [child for child in case if child.tag in ("failure", "error", "skipped")]


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_built_in_target_trains(case, name):
    """The built-in target needs no network, and is sound on this machine."""
    assert [p.get("message") for p in problems(case(name))] == []


def test_mode_that_the_cpu_lacks(case):
    """tf32 on a CPU is skipped with its reason."""
    assert "tf32 exists on NVIDIA GPUs only" in problems(case("tf32"))[0].get("message")


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_real_record_can_be_read(folder, name):
    """The record of a real training goes into a file and back."""
    (path,) = (folder / ".sftguard" / "records").glob(f"test_it.py_test_{name}_*.json")
    assert RunRecord.read(path).global_step == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param(name, message, id=name)
        for name, message in {
            "does_not_import": "target 'absent_module:build' cannot be imported: ModuleNotFoundError",
            "no_path": "target 'mine' is not a dotted path: write module:object",
            "absent": "target 'mine:absent': module mine has no absent",
            "not_callable": "target mine:number is '3' (int), not a function",
            "no_trainer": "target mine:no_trainer returned 'trained' (str), not a transformers.Trainer",
            "no_keywords": "target mine:no_keywords cannot be called: got an unexpected keyword",
            "no_data": "target mine:no_data returned a Trainer without a train_dataset",
        }.items()
    ],
)
def test_target_that_breaks_its_contract(case, name, message):
    """What is wrong with a target is told in a line or two, without a traceback."""
    (problem,) = problems(case(name))
    assert problem.text.startswith(message)
    assert len(problem.text.splitlines()) <= 2


def test_target_that_raises(case):
    """What the code under test raises is evidence: the cell has failed, and says where it ended."""
    (problem,) = problems(case("raises"))
    assert "the run ended in build: NotImplementedError: one day (" in " ".join(problem.text.split())
