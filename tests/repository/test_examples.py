"""The documentation says what is so: its examples run, its tables are the code's."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_sftguard import registry
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell
from pytest_sftguard.precision import MODES
from pytest_sftguard.settings import SETTINGS
from pytest_sftguard.verdicts import Outcome, judge
from tests.support.canned import healthy, with_step

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PAGES = [p.relative_to(ROOT).as_posix() for p in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]]
ITS_OWN = "docs/extending.md"
"""The page whose files belong into the repository itself; test_extending.py puts them there."""
WITH_EXAMPLES = [p for p in PAGES if p != ITS_OWN and BLOCK.search((ROOT / p).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", WITH_EXAMPLES)
def test_the_examples_of_a_page_run(pytester: pytest.Pytester, page: str) -> None:
    """The files that a page shows, put into one folder, pass in pytest, on the embedded model where one is loaded."""
    for name, code in BLOCK.findall((ROOT / page).read_text(encoding="utf-8")):
        (pytester.path / name).write_text(code, encoding="utf-8")
    (pytester.path / "pytest.ini").write_text("[pytest]\npythonpath = .\n", encoding="utf-8")
    arguments = ["-q"]
    if "from_pretrained" in (ROOT / page).read_text(encoding="utf-8"):
        arguments.append(f"--sftguard-model={ROOT / 'homework' / 'model'}")
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret == 0
    assert "failed" not in result.parseoutcomes()
    assert "skipped" not in result.parseoutcomes()


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, Outcome.PASSED),
        ({"grad_norm": 101.0}, Outcome.FAILED),
        ({"grad_norm": math.nan}, Outcome.FAILED),
        ({"grad_norm": None}, Outcome.NOT_EVALUATED),
    ],
    ids=["healthy", "large", "nan", "not-seen"],
)
def test_the_invariant_of_the_page_judges_the_steps_that_were_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], outcome: Outcome
) -> None:
    """A step that the loss scaler skipped is healthy to it, whatever its gradients; any other is held to the limit."""
    examples = dict(BLOCK.findall((ROOT / "docs" / "invariants.md").read_text(encoding="utf-8")))
    (tmp_path / "my_invariants.py").write_text(examples["my_invariants.py"], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_invariants", raising=False)
    (*_, own) = load_invariants(["my_invariants:GradNormsModerate"])
    record = healthy(Cell("fp16-mixed", 2, 1), steps=6, skipped={1, 2})
    assert judge(with_step(record, 4, **changes), [own]).outcome is outcome


def test_the_configuration_page_lists_the_settings() -> None:
    """The table of docs/configuration.md has one row for each setting with its default, in the code's order."""
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    table = text.partition("## Precision modes")[0].replace("`", "")
    rows = re.findall(r"^\| (\w+) \| (.*) \| (yes|no) \|", table, re.MULTILINE)
    assert rows == [(s.name, s.shown, "yes" if s.marker else "no") for s in SETTINGS]


def test_the_configuration_page_lists_the_precision_modes() -> None:
    """The table of modes names every mode with its weights' type."""
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for mode in MODES.values():
        assert f"| `{mode.name}` | {mode.weights_dtype} |" in text


def test_the_invariants_page_lists_the_invariants() -> None:
    """The table of docs/invariants.md holds every invariant with its code, and no other."""
    text = (ROOT / "docs/invariants.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([A-D]\d+) \| `(\w+)` \|", text, re.MULTILINE))
    assert rows == {i.code: i.name for i in load_invariants()}
    assert set(rows.values()) == set(registry.names("pytest_sftguard.invariants"))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link of a page names a file of the repository."""
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / page).read_text(encoding="utf-8")):
        assert ((ROOT / page).parent / link).exists(), link


# of docs/extending.md only what its recipes name is there, once they have been followed
@pytest.mark.parametrize("page", [p for p in [*PAGES, "CONTRIBUTING.md", "homework/README.md"] if p != ITS_OWN])
def test_files_that_a_page_names_exist(page: str) -> None:
    """Each `path/to/file.py` is a file below the repository, one of its packages or the page's folder."""
    below = (ROOT, ROOT / "pytest_sftguard", ROOT / "homework", (ROOT / page).parent)
    for name in re.findall(r"`((?:[\w-]+/)+\w+\.py)`", (ROOT / page).read_text(encoding="utf-8")):
        assert any((folder / name).is_file() for folder in below), name
