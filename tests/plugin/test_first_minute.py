"""The README's first test with the real engine: alone in a folder, on a terminal of 80 columns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """What pytest prints of it."""
    path = tmp_path_factory.mktemp("first_minute")
    blocks = BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    (path / "test_training.py").write_text(next(b for b in blocks if "gpu_stability" in b), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SFTGUARD_", "PYTEST_"))}
    environment |= {"COLUMNS": "80", "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "pytest_sftguard.plugin", "-m", "gpu_stability"]
    return subprocess.run(command, cwd=path, env=environment, capture_output=True, text=True).stdout.splitlines()


def test_it_passes_without_a_warning(lines):
    """Every cell is sound, and no library warns of anything."""
    assert re.fullmatch(r"=+ 6 passed in [\d.]+s( \([\d:]+\))? =+", lines[-1])


def test_it_fits_a_screen(lines):
    """It is told in 25 lines, the one that names the installed plugins, which is left out here, among them."""
    assert len(lines) + 1 <= 25


def test_it_fits_the_terminal(lines):
    """No line is longer than 80 columns."""
    assert [line for line in lines if len(line) > 80] == []
