"""The public face: what the package exports, at which cost, and that the documentation uses nothing else."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_sftguard

ROOT = Path(__file__).resolve().parents[2]
PUBLIC = {
    "FailedQuery",
    "Finding",
    "HardwareProfile",
    "Invariant",
    "Observer",
    "Outcome",
    "Reason",
    "RunRecord",
    "__version__",
    "hardware_profiles",
    "judged",
    "observe_accelerate",
    "simulated_hardware",
}
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name != "extending.md")]
"""The pages for users; docs/extending.md is about the package's own modules."""
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_public_names_are_these() -> None:
    """A name that is added or taken away is a decision: this list and the changelog change with it."""
    assert set(pytest_sftguard.__all__) == set(dir(pytest_sftguard)) == PUBLIC


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_can_be_imported(name: str) -> None:
    """Each has a docstring, or is a text."""
    found = getattr(pytest_sftguard, name)
    assert isinstance(found, str) or found.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """As for any module, so that `from pytest_sftguard import typo` names what is missing."""
    with pytest.raises(AttributeError, match="has no attribute 'Observed'"):
        _ = pytest_sftguard.Observed


def test_importing_the_package_imports_nothing_else() -> None:
    """Neither torch nor pytest, nor a module of the package's own."""
    code = "import sys; before = set(sys.modules); import pytest_sftguard; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [m for m in done.stdout.split() if m.startswith(("torch", "pytest_sftguard.", "pytest.", "_pytest"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_documentation_uses_public_names_alone(page: Path) -> None:
    """Whatever a page's examples import of the package can be imported from the package itself."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pytest_sftguard"):
                assert node.module == "pytest_sftguard"
                assert {alias.name for alias in node.names} <= PUBLIC
            elif isinstance(node, ast.Import):
                assert not [alias.name for alias in node.names if alias.name.startswith("pytest_sftguard.")]
