"""A clone on a machine where nothing may be installed: its own plugin is found, and the Python that has torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

tox = pytest.importorskip("tox", reason="toxfile.py is read by tox alone")

ROOT = Path(__file__).resolve().parents[2]


def python(folder: Path, *, has_torch: bool) -> Path:
    """Something like an interpreter, which has torch or has not."""
    found = folder / "python3"
    found.write_text(f"#!/bin/sh\nexit {0 if has_torch else 1}\n", encoding="utf-8")
    found.chmod(0o755)
    return found


@pytest.fixture
def toxfile(monkeypatch: pytest.MonkeyPatch):
    """The module beside tox.ini."""
    monkeypatch.syspath_prepend(ROOT)
    import toxfile

    return toxfile


def test_tox_trains_with_its_own_python_if_that_has_torch(toxfile, monkeypatch, tmp_path) -> None:
    """As where both were installed into one environment."""
    (own := tmp_path / "own").mkdir()
    monkeypatch.setattr(sys, "executable", str(python(own, has_torch=True)))
    monkeypatch.setenv("PATH", "")
    assert toxfile.python_with_torch() == str(own / "python3")


def test_tox_of_an_environment_of_its_own_trains_with_the_python_on_the_path(toxfile, monkeypatch, tmp_path) -> None:
    """As with pipx, while torch lies in the environment that is active."""
    (own := tmp_path / "own").mkdir()
    (active := tmp_path / "active").mkdir()
    monkeypatch.setattr(sys, "executable", str(python(own, has_torch=False)))
    monkeypatch.setenv("PATH", str(python(active, has_torch=True).parent))
    assert toxfile.python_with_torch() == str(active / "python3")


def test_without_torch_anywhere_tox_takes_its_own_python(toxfile, monkeypatch, tmp_path) -> None:
    """It is pytest that then says what is missing."""
    own = python(tmp_path, has_torch=False)
    monkeypatch.setattr(sys, "executable", str(own))
    monkeypatch.setenv("PATH", "")
    assert toxfile.python_with_torch() == str(own)


def test_the_command_of_cuda_names_that_python(tmp_path) -> None:
    """It is what tox reads, also where somebody has chosen another."""
    for chosen, expected in ((None, sys.executable), ("/opt/python", "/opt/python")):
        environment = {k: v for k, v in os.environ.items() if k != "SFTGUARD_PYTHON"}
        environment |= {} if chosen is None else {"SFTGUARD_PYTHON": chosen}
        command = [sys.executable, "-m", "tox", "config", "-e", "cuda", "-k", "commands", "--workdir", str(tmp_path)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert f"{expected} -m pytest tests/gpu -W default -m gpu_stability --sftguard-require-gpu" in done.stdout


LOADS = """
import importlib.metadata, sys
every = importlib.metadata.distributions
importlib.metadata.distributions = lambda **asked: [d for d in every(**asked) if d.name != "pytest-sftguard"]
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests/gpu", "-m", "gpu_stability"]))
"""


def test_a_clone_in_which_nothing_is_installed_has_the_plugin() -> None:
    """No entry point leads to it, and the cells of the matrix are there."""
    environment = os.environ | {"PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOADS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "tests/gpu/test_matrix.py::test_trains[fp32-b2x4]" in done.stdout, done.stdout + done.stderr
