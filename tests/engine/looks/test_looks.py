"""Looks as a contributor writes them: one file each, which concludes at the stage that its class names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_sftguard import registry
from pytest_sftguard.engine import looks
from pytest_sftguard.engine.looks import arrival
from pytest_sftguard.verdicts import JudgedRun

Write = Callable[..., str]
LOOK = """
from pytest_sftguard.engine.looks import Look
from pytest_sftguard.engine.stages import Reloaded, Started, Trained

class {name}(Look[{stage}]):
    last = {last}

    def {breaks}(self, stage):
        raise ValueError("broken")

    def conclude(self, reached):
        assert reached.{field}
        return {{}}
"""


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Write:
    """Adds the file of a look to the folder of looks, and gives its name."""
    monkeypatch.setattr(looks, "__path__", [*looks.__path__, str(tmp_path)])

    def written(name: str, stage: str, field: str = "trainer", last: bool = False, breaks: str = "nothing") -> str:
        code = LOOK.format(name=registry.class_name(name), stage=stage, field=field, last=last, breaks=breaks)
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        return name

    return written


@pytest.mark.parametrize(
    ("stage", "field"),
    [("Started", "batches"), ("Trained", "trained_model"), ("Reloaded", "reloaded_model")],
)
def test_a_look_is_one_file(run_cell: Callable[..., JudgedRun], write: Write, stage: str, field: str) -> None:
    """A look that names its stage finds there what that stage holds."""
    name = write(f"of_{stage.lower()}", stage, field)
    assert run_cell(looks=(name,), steps=1).record.looks[0].done


@pytest.mark.parametrize("stage", ["Trained", "Reloaded"])
def test_a_look_whose_stage_was_not_reached_says_so(
    run_cell: Callable[..., JudgedRun], write: Write, stage: str
) -> None:
    """After a training that raises, a look at the trained or the reloaded model is inapplicable."""
    name = write(f"never_{stage.lower()}", stage)
    [look] = run_cell("raises_in_training", looks=(name,), batch=(8, 1)).record.looks
    assert look.inapplicable == "the run ended before it could be looked at"


def test_a_look_can_conclude_after_a_training_that_raises(run_cell: Callable[..., JudgedRun], write: Write) -> None:
    """A look at a training that has started concludes, also where an exception ends it."""
    name = write("ends_early", "Started", "batches")
    assert run_cell("raises_in_training", looks=(name,), batch=(8, 1)).record.looks[0].done


def test_a_look_that_changes_the_models_comes_last(run_cell: Callable[..., JudgedRun], write: Write) -> None:
    """A look that declares itself the last one concludes after those that are named behind it."""
    names = write("changes_them", "Trained", last=True), write("reads_them", "Trained")
    assert [look.name for look in run_cell(looks=names, steps=1).record.looks] == ["reads_them", "changes_them"]


@pytest.mark.parametrize("hook", ["prepare", "attach", "rebuilt"])
def test_a_look_that_raises_leaves_the_run_alone(run_cell: Callable[..., JudgedRun], write: Write, hook: str) -> None:
    """Whichever hook raises, the record names the exception, and the training has the bits that it has without."""
    name = write(f"breaks_in_{hook}", "Reloaded", breaks=hook)
    broken, plain = (run_cell(looks=asked, steps=2).record for asked in ((name,), ()))
    assert (broken.looks[0].error, broken.adapter_digest) == ("ValueError: broken", plain.adapter_digest)


WARNS = """
import warnings

from pytest_sftguard.engine.looks import Look
from pytest_sftguard.engine.stages import Started

class Warns(Look[Started]):
    def conclude(self, reached):
        warnings.warn("a library says so of the guard's own pass", UserWarning)
        return {}
"""


def test_a_warning_ends_no_look(run_cell: Callable[..., JudgedRun], write: Write, tmp_path: Path) -> None:
    """Also where the filters of the user, as those of these tests, make errors of warnings."""
    (tmp_path / "warns.py").write_text(WARNS, encoding="utf-8")
    assert run_cell(looks=("warns",), steps=1).record.looks[0].done


def test_an_exception_of_a_look_inside_the_training_ends_the_look_alone(
    run_cell: Callable[..., JudgedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows cannot be read, and the training is the one that it would be without the look."""

    def unreadable(item: object) -> None:
        raise ValueError("unreadable")

    monkeypatch.setattr(arrival.Feature, "of", unreadable)
    run, plain = (run_cell(looks=asked, steps=2) for asked in (("arrival",), ()))
    assert run.record.looks[0].error == "ValueError: unreadable"
    assert (run.record.error, run.record.adapter_digest) == (None, plain.record.adapter_digest)
    assert [f.invariant for f in run.verdict.findings if f.guards_own] == ["rows_arrive"]
