"""Reporting: the terminal section, the JUnit file and the records, from one process and from several."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from pytest_sftguard import reports
from pytest_sftguard.records import RunRecord
from tests.plugin.conftest import ONE_CELL
from tests.support import canned

HEADING = "pytest-sftguard: stability of LoRA fine-tuning"


def rows(result):
    """The table of the terminal section, without its heading."""
    lines = result.outlines
    start = next(i for i, line in enumerate(lines) if HEADING in line)
    return [line for line in lines[start:] if re.search(r" (ok|FAILED|not evaluated)  ", line)]


def test_section_has_a_row_for_each_cell(pytester, engine):
    """The section shows each cell with its verdict."""
    engine.make = lambda c: {"fp32": canned.of, "bf16-mixed": canned.failing}.get(c.cell.precision, canned.not_run)(c)
    pytester.makepyfile(test_it=ONE_CELL.replace('"fp32"', '"fp32 bf16-mixed tf32"'))
    found = [re.split(r"  +", row)[:3] for row in rows(pytester.runpytest_inprocess())]
    assert found == [["fp32", "2x1", "ok"], ["bf16-mixed", "2x1", "FAILED"], ["tf32", "2x1", "not evaluated"]]


@pytest.mark.parametrize(
    "line",
    [
        "precision  batch  verdict*grad_norm*raw loss*answers*seconds",
        "on Some CPU (1 thread), torch 2.13.0",
        "fp32-b2x1 FAILED: *raw_loss_finite*",
        '  rerun     pytest "test_it.py::test_it?fp32-b2x1?"',
        "strict_answers: not evaluated -- the target offers no questions() (fp32-b2x1)",
    ],
    ids=["heading", "device", "failure", "rerun", "not-evaluated"],
)
def test_section_says(pytester, engine, one_cell, line):
    """The section holds the table, the device, each failure, and what was not evaluated."""
    engine.make = canned.failing
    pytester.runpytest_inprocess().stdout.fnmatch_lines([line])


def test_rerun_has_the_same_settings(pytester, engine, one_cell):
    """The command repeats every option of ours, whichever way it was given."""
    engine.make = canned.failing
    result = pytester.runpytest_inprocess("--sftguard-seed", "3", "--sftguard-batch=2 8", "--sftguard-strict", "-v")
    result.stdout.fnmatch_lines(
        ["""*pytest "test_it.py::test_it?fp32-b2x1?" --sftguard-batch='2 8' --sftguard-seed=3 --sftguard-strict"""]
    )


ON_A_TERMINAL = """
import pytest

@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    config.pluginmanager.getplugin("terminalreporter").isatty = lambda: True
"""


def test_steps_are_shown_on_a_terminal(pytester, engine, one_cell):
    """Where a person watches, the current line shows the step that a cell is at."""
    pytester.makeconftest(ON_A_TERMINAL)
    assert "fp32-b2x1 step 2/3" in pytester.runpytest_inprocess().stdout.str()


def test_steps_are_not_shown_in_a_log(pytester, engine, one_cell):
    """Where the output is a file, no step is shown."""
    assert " step 2/3" not in pytester.runpytest_inprocess().stdout.str()


def test_terminal_without_capture(pytester, engine, one_cell):
    """Where a person watches and pytest captures nothing at all, a cell is trained all the same."""
    pytester.makeconftest(ON_A_TERMINAL)
    pytester.runpytest_inprocess("-p", "no:capture").assert_outcomes(passed=1)


def test_no_section_without_cells(pytester):
    """A session without marked tests has no section."""
    pytester.makepyfile(test_it="def test_it(): pass\n")
    assert HEADING not in pytester.runpytest_inprocess().stdout.str()


def test_section_tells_a_cell_whose_fixture_failed(pytester, engine):
    """A cell that was trained before another fixture raised has its row."""
    pytester.makepyfile(
        test_it=ONE_CELL.replace("sft_run", "sft_run, late") + "\n@pytest.fixture\ndef late(sft_run): 1 / 0\n"
    )
    assert len(rows(pytester.runpytest_inprocess())) == 1


def test_several_processes_share_one_section(pytester, in_subprocess):
    """Under xdist the controller prints one section with the cells of all workers."""
    pytester.makepyfile(test_it=ONE_CELL.replace('batch="2x1"', 'batch="2x1 4x1 8x1"'))
    result = in_subprocess("-n", "2", make="canned.failing")
    result.assert_outcomes(failed=3)
    assert (result.stdout.str().count(HEADING), len(rows(result))) == (1, 3)


def test_rerun_of_a_worker_has_the_same_settings(pytester, one_cell, in_subprocess):
    """The command of a cell that a worker trained repeats the options that the controller was given."""
    result = in_subprocess("-n", "1", "--sftguard-seed", "3", make="canned.failing")
    result.stdout.fnmatch_lines(["  rerun     pytest * --sftguard-seed=3"])


def properties(pytester):
    """The properties of the one test in the JUnit file."""
    tree = ElementTree.parse(pytester.path / "report.xml")
    return {p.get("name"): p.get("value") for p in tree.iter("property")}


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["one-process", "xdist"])
@pytest.mark.parametrize(
    ("make", "verdict"),
    [("of", "passed"), ("failing", "failed"), ("not_run", "not evaluated")],
    ids=["passed", "failed", "not-evaluated"],
)
def test_junit_has_the_verdict(pytester, one_cell, in_subprocess, make, verdict, workers):
    """The JUnit file has the verdict of each cell as a property."""
    in_subprocess("--junitxml=report.xml", *workers, make=f"canned.{make}")
    assert properties(pytester)["sftguard_verdict"] == verdict


def test_junit_properties_are_scalars(pytester, engine, one_cell):
    """Properties of the JUnit file can be charted: a word or a number each."""
    pytester.runpytest_inprocess("--junitxml=report.xml")
    found = {k: v for k, v in properties(pytester).items() if k.startswith("sftguard_")}
    assert {k for k, v in found.items() if not re.fullmatch(r"[\w .,-]*", v)} == set()
    assert float(found["sftguard_grad_norm_max"]) > 0


def written(pytester, folder=".sftguard"):
    """The files of records below `folder`."""
    return sorted((pytester.path / folder / "records").glob("*.json"))


@pytest.mark.parametrize("make", [canned.of, canned.failing, canned.not_run], ids=["passed", "failed", "not-evaluated"])
def test_record_is_written(pytester, engine, one_cell, make):
    """Whatever the verdict, the record of a cell can be read from its file."""
    engine.make = make
    pytester.runpytest_inprocess()
    assert [RunRecord.read(p).cell for p in written(pytester)] == ["fp32-b2x1"]


def test_folder_keeps_out_of_git(pytester, engine, one_cell):
    """The folder of records brings its own .gitignore."""
    pytester.runpytest_inprocess()
    assert (pytester.path / ".sftguard" / ".gitignore").read_text() == "*\n"


def test_folder_can_be_named(pytester, engine, one_cell):
    """--sftguard-dir names another folder, below pytest's root."""
    pytester.runpytest_inprocess("--sftguard-dir=some/where")
    assert len(written(pytester, "some/where")) == 1


def test_each_test_has_its_file(pytester, engine):
    """Two tests that share a run have a file each."""
    pytester.makepyfile(test_it=ONE_CELL + ONE_CELL.replace("test_it", "test_too"))
    pytester.runpytest_inprocess()
    assert len(written(pytester)) == 2


DROPPED = """
def properties(run):
    return [("dropped", run.record.cell)]

def write(folder, nodeid, run):
    (folder / "dropped.txt").write_text(f"{nodeid} {run.verdict.outcome.value}")

def message(run, rerun):
    return f"dropped: again by {rerun}"

def section(runs):
    return (f"dropped: {name} {run.record.cell}" for name, run, _ in runs)
"""


@pytest.fixture
def dropped(pytester, monkeypatch):
    """A session with a failing cell, and with one more file in the folder of reports."""
    pytester.mkdir("more").joinpath("dropped.py").write_text(DROPPED)
    monkeypatch.setattr(reports, "__path__", [*reports.__path__, str(pytester.path / "more")])


@pytest.mark.parametrize("line", ["dropped: test_it.py::test_it fp32-b2x1", "dropped: again by pytest *"])
def test_new_report_is_printed(pytester, engine, one_cell, dropped, line):
    """A file that is dropped into the folder of reports prints, with no other file touched."""
    engine.make = canned.failing
    pytester.runpytest_inprocess().stdout.fnmatch_lines([line])


def test_new_report_is_written(pytester, engine, one_cell, dropped):
    """It also writes."""
    pytester.runpytest_inprocess()
    assert (pytester.path / ".sftguard" / "dropped.txt").read_text() == "test_it.py::test_it[fp32-b2x1] passed"


def test_new_report_has_properties(pytester, engine, one_cell, dropped):
    """Its properties are in the JUnit file."""
    pytester.runpytest_inprocess("--junitxml=report.xml")
    assert properties(pytester)["dropped"] == "fp32-b2x1"


def test_nothing_is_written_without_cells(pytester):
    """A session without marked tests leaves no folder behind."""
    pytester.makepyfile(test_it="def test_it(): pass\n")
    pytester.runpytest_inprocess()
    assert not (pytester.path / ".sftguard").exists()
