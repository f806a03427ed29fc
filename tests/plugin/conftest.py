"""What the tests of the plugin need: an engine that trains nothing, and an environment without settings."""

from __future__ import annotations

import functools
import os
import re
import sys

import pytest

from tests.support import stub

ONE_CELL = """
import pytest

@pytest.mark.gpu_stability(precision="fp32", batch="2x1", steps=3)
def test_it(sft_run):
    pass
"""


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch, pytester):
    """No setting of this machine, and none of this repository's ini file, gets into a test; lines are wide."""
    for name in [n for n in os.environ if n.startswith("SFTGUARD_")]:
        monkeypatch.delenv(name)
    # under CI pytest prints its last lines in full, however long they are
    for name in ("NO_COLOR", "FORCE_COLOR", "PY_COLORS", "CI", "BUILD_NUMBER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    # plugins that are slow to import
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:benchmark -p no:anyio")
    monkeypatch.delitem(sys.modules, "test_it", raising=False)
    pytester.makeini("[pytest]\n")


@pytest.fixture
def engine(monkeypatch):
    """The engine of a run in this process: set `engine.make` to hand out other records than healthy ones."""
    return stub.install(put=functools.partial(monkeypatch.setattr, raising=False))


@pytest.fixture
def one_cell(pytester):
    """A file with one marked test of one cell, fp32-b2x1."""
    return pytester.makepyfile(test_it=ONE_CELL)


@pytest.fixture
def in_subprocess(pytester, pytestconfig):
    """Runs pytest in a process of its own, with canned records for the engine's: a function of arguments."""

    def run(*arguments, make="canned.of"):
        pytester.makeconftest(
            f"import sys\nsys.path.append({str(pytestconfig.rootpath)!r})\n"
            f"from tests.support import canned, stub\nstub.install({make})\n"
        )
        return pytester.runpytest_subprocess(*arguments)

    return run


@pytest.fixture
def clean():
    """Holds the output of a run to one message without a traceback: a function of the result and the message."""

    def check(result, message, lines=2):
        text = result.stdout.str() + result.stderr.str()
        # wherever its lines break
        found = re.search(r"\s+".join(map(re.escape, message.split())), text)
        assert found, text
        assert not any(told in text for told in ("Traceback", "The above exception", "During handling")), text
        assert [line for line in text.splitlines() if line.startswith("E  ")] == []
        block = text[found.start() :].splitlines()
        end = next((i for i, line in enumerate(block) if not line or line.startswith(("=", "-", "_"))), len(block))
        assert end <= lines, text

    return check
