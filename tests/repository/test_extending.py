"""The recipes of docs/extending.md: each works as it stands there, and touches nothing but what it names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
GENERATED = (".sftguard", ".hypothesis", ".pytest_cache", ".benchmarks", "__pycache__")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the files that git tracks, as they are here, in a repository of its own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def follow(recipe: str, folder: Path) -> set[str]:
    """Make the changes of a recipe, and return the files that it names."""
    named = set()
    for language, text in BLOCK.findall(recipe):
        if language == "python":
            name = text.partition("\n")[0].removeprefix("# ")
            assert not (folder / name).exists()
            (folder / name).write_text(text.partition("\n")[2], encoding="utf-8")
            named.add(name)
        elif language == "diff":
            subprocess.run(["git", "apply", "--recount", "-C1"], cwd=folder, input=text, text=True, check=True)
            named |= set(re.findall(r"^\+\+\+ b/(.+)$", text, re.MULTILINE))
    return named


def commands(recipe: str) -> list[str]:
    """What a recipe types, a line each; a backslash goes on in the next line."""
    typed = "".join(text for language, text in BLOCK.findall(recipe) if language == "console")
    return re.findall(r"^\$ (.+)$", typed.replace("\\\n", ""), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_works_at_the_first_try(title: str, clone: Path) -> None:
    """Its commands succeed, ruff has nothing to say, and no other file has changed."""
    named = follow(RECIPES[title], clone)
    bin_folder = str(Path(sys.executable).parent)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "SFTGUARD_"))}
    environment |= {"PYTHONPATH": str(clone), "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    assert commands(RECIPES[title])
    for command in commands(RECIPES[title]):
        done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    status = subprocess.run(
        ["git", "status", "--porcelain", "-uall"], cwd=clone, capture_output=True, text=True, check=True
    ).stdout
    changed = {line[3:] for line in status.splitlines() if not any(part in line for part in GENERATED)}
    assert changed == named
