"""Silence is free: what judges records imports no torch, and so does not this folder."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy")


@pytest.mark.parametrize(
    "module",
    [
        *(f"pytest_sftguard.{m}" for m in ("records", "verdicts", "invariants", "diagnosis", "settings", "session")),
        *(f"pytest_sftguard.{m}" for m in ("plugin", "matrix", "hardware", "precision", "registry", "engine")),
        *(f"pytest_sftguard.reports.{m}" for m in ("failure", "json_files", "junit", "terminal")),
        "tests.strategies",
    ],
)
def test_module_is_light(pytestconfig, module):
    """A module outside of the engine, and every invariant, is imported without torch."""
    code = (
        f"import sys, {module}\n"
        "from pytest_sftguard import invariants; invariants.load_invariants()\n"
        f"print(*(m for m in {HEAVY} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=pytestconfig.rootpath, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("", 0), done.stderr
