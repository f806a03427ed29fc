"""The fixture sft_observer: a test that trains by itself is judged when its body is done.

All of them are tests of one pytest process, as that imports torch once; the tests look at what it left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from pytest_sftguard.records import RunRecord

ROOT = Path(__file__).resolve().parents[2]
HEAD = """
import pytest, torch
from tests.targets import loops

def train(observe, spoil=lambda model: None, lr=1e-2, **asked):
    model = loops.model()
    spoil(model)
    optimizer = loops.adam(model, lr=lr)
    observer = observe(model, optimizer, **asked)
    for _, batch in zip(range(3), loops.batches()):
        loss = model(**batch).loss
        observer.micro_batch(loss)
        loss.backward()
        observer.before_step()
        optimizer.step()
        observer.after_step()
        optimizer.zero_grad()
    return model, optimizer

def nan(model):
    with torch.no_grad():
        loops.trainable(model)[0][0, 0] = float("nan")
"""
BODIES = {
    "healthy": "train(sft_observer)",
    "unsound": "train(sft_observer, nan)",
    "uncalled": "pass",
    "without_a_step": "model = loops.model(); sft_observer(model, loops.adam(model))",
    "own_exception": "train(sft_observer, nan); assert 1 == 2",
    "skipped_too_late": "train(sft_observer, nan); pytest.skip('not today')",
    "skipped_before": "pytest.skip('no data')",
    "frozen": "train(sft_observer, lr=0.0)",
    "waived": "train(sft_observer, lr=0.0, waive=['effective_steps', 'every_factor_moves', 'lr_trace'])",
    "other_precision": "train(sft_observer, precision='bf16-mixed')",
    "no_precision": "train(sft_observer, precision='bf8')",
    "no_threshold": "train(sft_observer, thresholds={'nothing.at_all': 1})",
    "twice": "train(sft_observer); train(sft_observer)",
    "accelerate": "loops.plain_accelerate(loops.model(), observe=sft_observer)",
}


def pytest_in(path, *arguments):
    """Run all bodies in `path`."""
    tests = [f"\ndef test_{name}(sft_observer):\n    {body}\n" for name, body in BODIES.items()]
    (path / "test_it.py").write_text(HEAD + "".join(tests))
    (path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SFTGUARD_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:sftguard", "-p", "pytest_sftguard.plugin"]
    done = subprocess.run(
        [*command, "-q", "--junitxml=report.xml", *arguments], cwd=path, env=environment, capture_output=True, text=True
    )
    (path / "output.txt").write_text(done.stdout + done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where pytest ran every test of the table."""
    path = tmp_path_factory.mktemp("loops")
    pytest_in(path)
    return path


def told(folder, name):
    """The kind of trouble that a test had, and its text; ("passed", "") where it had none."""
    tree = ElementTree.parse(folder / "report.xml")
    case = next(c for c in tree.iter("testcase") if c.get("name") == f"test_{name}")
    trouble = [(c.tag, (c.get("message") or "") + (c.text or "")) for c in case]
    return next((t for t in trouble if t[0] in ("failure", "error", "skipped")), ("passed", ""))


@pytest.mark.parametrize("name", ["healthy", "accelerate"])
def test_a_healthy_loop_passes(folder, name):
    """No assertion is needed."""
    assert told(folder, name) == ("passed", "")


@pytest.mark.parametrize(
    ("name", "outcome", "text"),
    [
        ("unsound", "failure", "fp32-b4x1 FAILED: "),
        ("uncalled", "failure", "sft_observer was not called: nothing was observed"),
        ("without_a_step", "failure", "0 of 1 optimizer step took place"),
        ("own_exception", "failure", "assert 1 == 2"),
        ("skipped_too_late", "failure", "raw_loss_finite"),
        ("skipped_before", "skipped", "no data"),
        ("frozen", "failure", "effective_steps"),
        ("other_precision", "skipped", "bf16-mixed did not happen"),
        ("no_precision", "failure", "unknown precision 'bf8'"),
        ("no_threshold", "failure", "there is no threshold 'nothing.at_all'"),
        ("twice", "failure", "one test observes one training"),
    ],
)
def test_what_is_wrong_is_told(folder, name, outcome, text):
    """Each in its own way."""
    found, message = told(folder, name)
    assert found == outcome
    assert text in message


def test_a_failed_verdict_is_told_without_a_traceback(folder):
    """No frame of ours is in it."""
    assert "plugin.py" not in told(folder, "unsound")[1]


def test_the_verdict_stands_beside_the_loops_own_exception(folder):
    """The traceback of the test's own code comes first."""
    text = (folder / "output.txt").read_text()
    assert "fp32-b4x1 FAILED: " in text.partition("___ test_own_exception ___")[2].partition("___ test_")[0]


def test_a_waived_invariant_does_not_fail(folder):
    """What the user knows not to hold is told as waived."""
    found, _ = told(folder, "waived")
    assert found == "passed"
    assert "waived by the user" in (folder / "output.txt").read_text()


def test_the_record_is_written_and_reported(folder):
    """To the folder of records, the terminal's section and JUnit, as every cell's."""
    [path] = (folder / ".sftguard" / "records").glob("test_it.py_test_healthy*.json")
    record = RunRecord.read(path)
    assert (record.observed, record.target, len(record.steps)) == (True, "test_it.py::test_healthy", 3)
    assert "pytest-sftguard: stability of LoRA fine-tuning" in (folder / "output.txt").read_text()
    assert 'name="sftguard_verdict" value="passed"' in (folder / "report.xml").read_text()


def test_what_was_not_evaluated_fails_where_that_was_asked(tmp_path):
    """With --sftguard-strict."""
    pytest_in(tmp_path, "--sftguard-strict", "-k", "other_precision")
    assert told(tmp_path, "other_precision")[0] == "failure"
