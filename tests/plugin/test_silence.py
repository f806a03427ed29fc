"""Silence is free: what trains nothing imports no torch."""

from __future__ import annotations

import pytest

TELLS = """
import sys

def pytest_sessionfinish():
    heavy = ("torch", "transformers", "peft", "accelerate")
    print("imported:", *(m for m in heavy if m in sys.modules))
"""

UNMARKED = "def test_it(): pass\n"
MARKED = "import pytest\n\n@pytest.mark.gpu_stability\ndef test_it(sft_run): pass\n"
SKIPPED = "import pytest\n\n@pytest.mark.skip\n@pytest.mark.gpu_stability\ndef test_it(sft_run): pass\n"
CELL_ALONE = "import pytest\n\n@pytest.mark.gpu_stability\ndef test_it(sft_cell): assert sft_cell\n"
MISUSED = "import pytest\n\n@pytest.mark.gpu_stability(steps=0)\ndef test_it(sft_run): pass\n"


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        pytest.param(UNMARKED, [], id="unmarked"),
        pytest.param(UNMARKED, ["--sftguard-require-gpu"], id="unmarked-where-a-gpu-is-required"),
        pytest.param(UNMARKED, ["-n", "1"], id="unmarked-under-xdist"),
        pytest.param(MARKED, ["--collect-only", "-q"], id="collection"),
        pytest.param(MARKED, ["--setup-plan"], id="setup-plan"),
        pytest.param(MARKED, ["-k", "nothing"], id="deselected"),
        pytest.param(SKIPPED, [], id="skipped"),
        pytest.param(CELL_ALONE, [], id="cell-alone"),
        pytest.param(MISUSED, [], id="misused"),
    ],
)
def test_nothing_heavy_is_imported(pytester, code, arguments):
    """A session that trains nothing imports no torch, transformers, peft or accelerate."""
    pytester.makeconftest(TELLS)
    pytester.makepyfile(test_it=code)
    result = pytester.runpytest_subprocess("-s", *arguments)
    assert [line for line in result.outlines if "imported:" in line][-1].strip().endswith("imported:")


def test_a_session_without_marked_tests_loads_nothing_that_judges(pytester):
    """Neither invariants nor diagnoses, reports or records, of which there are some fifty modules."""
    parts = ("records", "verdicts", "invariants", "diagnosis", "rendering", "session", "reports.terminal")
    pytester.makeconftest(
        TELLS.replace('("torch", "transformers", "peft", "accelerate")', repr(parts)).replace(
            "m in sys.modules", "f'pytest_sftguard.{m}' in sys.modules"
        )
    )
    pytester.makepyfile(test_it=UNMARKED)
    result = pytester.runpytest_subprocess("-s")
    assert [line for line in result.outlines if "imported:" in line][-1].strip().endswith("imported:")


def test_collection_shows_the_cells(pytester):
    """`--collect-only -q` lists the ids of the cells."""
    pytester.makepyfile(test_it=MARKED)
    pytester.runpytest_subprocess("--collect-only", "-q").stdout.fnmatch_lines(["test_it.py::test_it?fp32-b2x4?"])
