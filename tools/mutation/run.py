"""Mutation test of one module: `python tools/mutation/run.py hardware` (or `selection`); docs/mutation.md has the rest.

The mutants are cosmic-ray's. They are made in a copy of the repository in a temporary folder, and each is tried in a
fork of this process, which has imported the heavy libraries before: that is several times as fast as a new Python.
Mutations in annotations and in the table of devices are left out: the first do nothing at run time, the second are
data, and a test cannot know a data sheet better than the table does. So are powers, which make numbers of a billion
digits.
"""

from __future__ import annotations

import ast
import difflib
import io
import os
import shutil
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    "hardware": ("pytest_sftguard/hardware.py", ["tests/unit/test_hardware_profiles.py"]),
    "selection": (
        "homework/selection.py",
        ["tests/homework/test_selection.py", "tests/homework/test_selectors_under_simulation.py"],
    ),
}
"""The modules, and the tests that are to notice."""
DATA = {"_SHEETS", "KNOWN_DEVICES"}
"""Module-level names whose values are data."""
SECONDS = 30
"""A mutant that takes longer counts as noticed."""

Span = tuple[tuple[int, int], tuple[int, int]]


def left_out(source: str) -> list[Span]:
    """Spans of the source, from (line, column) to (line, column), that are not mutated."""
    tree = ast.parse(source)
    nodes: list[ast.AST | None] = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.AnnAssign, ast.arg)):
            nodes.append(node.annotation)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes.append(node.returns)
    for statement in tree.body:
        if isinstance(statement, ast.AnnAssign) and getattr(statement.target, "id", None) in DATA:
            nodes.append(statement.value)
    return [
        ((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in nodes if isinstance(n, ast.expr)
    ]


def survives(copy: Path, tests: list[str]) -> bool:
    """Whether the tests pass in a fork."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.chdir(copy)
        sys.path.insert(0, str(copy))
        import pytest

        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            arguments = [
                "-x",
                "-q",
                "-p",
                "no:sftguard",
                "-p",
                "pytest_sftguard.plugin",
                "-p",
                "no:cacheprovider",
                "--tb=no",
            ]
            code = pytest.main([*arguments, *tests])
        os._exit(int(code))
    return os.waitpid(child, 0)[1] == 0


def main(name: str) -> int:
    """Try all mutants of a module; 0 if less than 5 % survive."""
    import hypothesis  # noqa: F401 # before the forks
    import torch  # noqa: F401
    from cosmic_ray.commands.init import _all_work_items
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    path, tests = MODULES[name]
    source = (ROOT / path).read_text(encoding="utf-8")
    spans = left_out(source)
    survivors = total = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "copy")
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
        sys.dont_write_bytecode = True
        os.environ |= {"PYTHONPATH": str(copy), "HYPOTHESIS_PROFILE": "mutation", "PYTHONDONTWRITEBYTECODE": "1"}
        if not survives(copy, tests):
            sys.exit("the tests fail without a mutation")
        for item in _all_work_items([ROOT / path], {}):
            mutation = item.mutations[0]
            if mutation.operator_name.endswith("_Pow"):
                continue
            if any(start <= tuple(mutation.start_pos) <= end for start, end in spans):
                continue
            operator = get_operator(mutation.operator_name)(**mutation.operator_args)
            mutant = mutate_code(source, operator, mutation.occurrence)
            if mutant is None or mutant == source:
                continue
            (copy / path).write_text(mutant, encoding="utf-8")
            total += 1
            if survives(copy, tests):
                survivors += 1
                changed = [d for d in difflib.ndiff(source.splitlines(), mutant.splitlines()) if d[:1] in "+-"]
                where = f"{path}:{mutation.start_pos[0]} {mutation.operator_name}"
                print(where, *changed, sep="\n    ", flush=True)
            if total % 20 == 0:
                print(f"... {total} tried, {survivors} survived", flush=True)
    print(f"{survivors} of {total} mutants survived ({100 * survivors / total:.1f} %)")
    return int(not 20 * survivors < total)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
