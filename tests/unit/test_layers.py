"""The layers of docs/design.md: imports point one way, and heavy libraries stay in the engine."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "pytest_sftguard"
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors"}
LIGHT = {"pytest_sftguard", "pytest", "hypothesis"}
ORDER = (
    {"registry", "precision", "benchmarking", "cores"},
    {"matrix", "hardware", "sizes"},
    {"tiers"},
    {"records"},
    {"verdicts", "bundles"},
    {"invariants", "diagnosis", "strategies"},
    {"reports"},
    {"settings", "session"},
    {"loops"},
    {"detection"},
    {"plugin", "commands"},
    {"__main__"},
)
ENGINE_SEES = {"registry", "precision", "cores", "matrix", "hardware", "sizes", "tiers", "records", "engine"}
MODULES = sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py"))


def imports(path: str, *, top_level: bool) -> set[str]:
    """Modules that a file imports, those within functions and TYPE_CHECKING blocks only where not `top_level`."""
    tree = ast.parse((PACKAGE / path).read_text(encoding="utf-8"))
    nodes = tree.body if top_level else ast.walk(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(path: str, *, top_level: bool = True) -> set[str]:
    """Parts of the package (`records`, `engine`, ...) that a file imports."""
    return {m.split(".")[1] for m in imports(path, top_level=top_level) if m.startswith("pytest_sftguard.")}


def part(path: str) -> str:
    """The part of the package that a file belongs to."""
    return path.partition("/")[0].removesuffix(".py")


def level(name: str) -> int:
    """Place of a part in the order of layers."""
    return next(i for i, names in enumerate(ORDER) if name in names)


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) not in ("engine", "__init__")])
def test_imports_point_towards_the_foundation(path: str) -> None:
    """No module imports one of a higher layer, and none but those of its own part on its own."""
    for name in ours(path):
        assert name == part(path) or level(name) < level(part(path)) or {name, part(path)} <= {"settings", "session"}


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) == "engine"])
def test_the_engine_knows_nothing_of_verdicts(path: str) -> None:
    """The engine fills records; it imports nothing that judges, reports or configures."""
    assert ours(path, top_level=False) <= ENGINE_SEES


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) != "engine"])
def test_heavy_libraries_stay_in_the_engine(path: str) -> None:
    """Nothing outside the engine imports torch and its kin, or the engine itself but in a function."""
    assert not HEAVY & {m.partition(".")[0] for m in imports(path, top_level=False)}
    assert "engine" not in ours(path)


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) not in ("engine", "plugin", "settings")])
def test_the_core_needs_the_standard_library_alone(path: str) -> None:
    """Records, invariants and reports import no third party."""
    roots = {m.partition(".")[0] for m in imports(path, top_level=True)}
    assert roots <= set(sys.stdlib_module_names) | LIGHT
