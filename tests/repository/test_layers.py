"""The layers of docs/design.md: imports point one way, and heavy libraries stay in the engine."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

from pytest_sftguard import registry
from pytest_sftguard.tiers import LOOKS

PACKAGE = Path(__file__).resolve().parents[2] / "pytest_sftguard"
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors"}
LIGHT = {"pytest_sftguard", "pytest", "hypothesis"}
ORDER = (
    {"registry", "precision", "benchmarking"},
    {"matrix", "hardware", "sizes"},
    {"tiers"},
    {"records", "logs"},
    {"verdicts", "bundles"},
    {"rendering"},
    {"invariants", "strategies"},
    {"diagnosis"},
    {"reports"},
    {"settings", "session"},
    {"loops"},
    {"detection"},
    {"plugin", "commands"},
    {"__main__"},
)
ENGINE_SEES = {"registry", "precision", "matrix", "hardware", "sizes", "tiers", "records", "engine"}
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
    """Nothing outside the engine imports torch and its companions, or the engine itself but in a function."""
    assert not HEAVY & {m.partition(".")[0] for m in imports(path, top_level=False)}
    assert "engine" not in ours(path)


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) not in ("engine", "plugin", "settings")])
def test_the_core_needs_the_standard_library_alone(path: str) -> None:
    """Records, invariants and reports import no third party."""
    roots = {m.partition(".")[0] for m in imports(path, top_level=True)}
    assert roots <= set(sys.stdlib_module_names) | LIGHT


NAMING = ("invariants", "diagnosis", "engine", "tiers", "records")
"""Parts that may name an invariant or a look; a field of the record has the name of the look that fills it."""


@pytest.mark.parametrize("path", [m for m in MODULES if part(m) not in NAMING])
def test_generic_code_names_no_invariant_and_no_look(path: str) -> None:
    """Outside of their own folders and of the tiers, no invariant and no look is treated by its name."""
    names = {*registry.names("pytest_sftguard.invariants"), *LOOKS}
    nodes = ast.walk(ast.parse((PACKAGE / path).read_text(encoding="utf-8")))
    assert not names & {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


TREES = ("pytest_sftguard", "homework")


def tree_modules(tree: str) -> dict[str, Path]:
    """Every module of a tree by its dotted name, packages by theirs."""
    files = sorted((PACKAGE.parent / tree).rglob("*.py"))
    names = [".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for f in files]
    return dict(zip(names, files, strict=True))


def imported(name: str, known: dict[str, Path]) -> set[str]:
    """The modules of its tree that a module imports, within functions too, but for what types alone need."""
    path = known[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in known else base)
    return (found & known.keys()) - {name}


@pytest.mark.parametrize("tree", TREES)
def test_no_module_imports_itself_by_way_of_others(tree: str) -> None:
    """The imports of a tree can be put into one order, those within functions too."""
    known = tree_modules(tree)
    order = graphlib.TopologicalSorter({name: imported(name, known) for name in known})
    assert set(order.static_order()) == known.keys()


@pytest.mark.parametrize("tree", TREES)
def test_no_folder_imports_itself_by_way_of_others(tree: str) -> None:
    """The rooms of each folder, its modules and its folders, can be put into one order."""
    known = tree_modules(tree)
    arrows = {name: imported(name, known) for name in known}
    for folder in (n for n, path in known.items() if path.name == "__init__.py"):
        depth = folder.count(".") + 2
        inside = [n for n in known if n.startswith(f"{folder}.")]
        rooms: dict[str, set[str]] = {".".join(n.split(".")[:depth]): set() for n in inside}
        for name in inside:
            room = ".".join(name.split(".")[:depth])
            targets = {".".join(t.split(".")[:depth]) for t in arrows[name] if t.startswith(f"{folder}.")}
            rooms[room] |= targets - {room}
        assert set(graphlib.TopologicalSorter(rooms).static_order()) == rooms.keys(), folder


@pytest.mark.parametrize("tree", TREES)
def test_every_folder_says_what_is_in_it(tree: str) -> None:
    """Each folder of code begins with a docstring."""
    for name, path in tree_modules(tree).items():
        if path.name == "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name
