"""Reporting: the terminal section, the JUnit file and the records, from one process and from several."""

from __future__ import annotations

import itertools
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
        "precision  batch  verdict*grad_norm*raw loss*seconds",
        "on Some CPU (1 thread), torch 2.13.0",
        "fp32-b2x1 FAILED: *raw_loss_finite*",
        '  rerun     pytest "test_it.py::test_it?fp32-b2x1?"',
        "FAILED fp32-b2x1: log_laundered: *",
        "findings, evidence and cures: FAILURES above",
        "not evaluated: *, strict_answers and *",
    ],
    ids=["heading", "device", "failure", "rerun", "cause", "place", "not-evaluated"],
)
def test_output_says(pytester, engine, one_cell, line):
    """A failed session shows the failure, the table, the device, the cause, and what was not evaluated."""
    engine.make = canned.failing
    pytester.runpytest_inprocess().stdout.fnmatch_lines([line])


def test_reasons_are_told_with_v(pytester, engine, one_cell):
    """With -v each finding that was not evaluated has its reason."""
    result = pytester.runpytest_inprocess("-v")
    result.stdout.fnmatch_lines(["strict_answers not evaluated: the target offers no questions() (fp32-b2x1)"])


@pytest.mark.parametrize("style", ["auto", "long", "short", "line", "native", "no"])
def test_failure_is_printed_once(pytester, engine, one_cell, style):
    """However pytest prints tracebacks, the whole text of a failed cell stands in the output, once."""
    engine.make = canned.failing
    text = pytester.runpytest_inprocess(f"--tb={style}").stdout.str()
    assert [text.count(part) for part in ("fp32-b2x1 FAILED: ", "  cause  ", "  rerun  ")] == [1, 1, 1]


@pytest.mark.parametrize("style", ["auto", "no"])
def test_failure_is_headed_by_its_test(pytester, engine, one_cell, style):
    """The line above the text of a failed cell holds the test's id, whoever prints it."""
    engine.make = canned.failing
    lines = pytester.runpytest_inprocess(f"--tb={style}").outlines
    (at,) = (i for i, line in enumerate(lines) if line.startswith("fp32-b2x1 FAILED: "))
    assert lines[at - 1].strip("_ ").endswith("test_it[fp32-b2x1]")


def test_failure_is_located_in_the_test(pytester, engine, one_cell):
    """Where pytest prints one line for a failure, that is the line of the test and the cause."""
    engine.make = canned.failing
    result = pytester.runpytest_inprocess("--tb=line")
    result.stdout.fnmatch_lines(
        ["*test_it.py:3: log_laundered: *", "FAILED test_it.py::test_it[[]fp32-b2x1[]] - log_l*"]
    )


LATE = "\n@pytest.fixture\ndef late(sft_run): 1 / 0\n"


def test_failure_stands_below_the_exception_of_a_fixture(pytester, engine):
    """Where another fixture raises, its traceback comes first, and the text of the failed cell follows."""
    engine.make = canned.failing
    pytester.makepyfile(test_it=ONE_CELL.replace("sft_run", "sft_run, late") + LATE)
    result = pytester.runpytest_inprocess("--show-capture=no")
    result.stdout.fnmatch_lines(["E   *ZeroDivisionError*", "fp32-b2x1 FAILED: *", "*short test summary*"])
    assert result.stdout.str().count("fp32-b2x1 FAILED: ") == 1


def test_expected_failure_is_a_line(pytester, engine):
    """Of a cell that is expected to fail, the section tells the cause, and how to see the rest."""
    engine.make = canned.failing
    pytester.makepyfile(test_it=ONE_CELL.replace("@", "@pytest.mark.xfail\n@"))
    result = pytester.runpytest_inprocess()
    result.stdout.fnmatch_lines(["FAILED fp32-b2x1: log_laundered: *", "*cures: run again with --runxfail"])
    assert "fp32-b2x1 FAILED: " not in result.stdout.str()


def test_junit_has_the_headline_and_the_text(pytester, engine, one_cell):
    """The message of a failure in the JUnit file is its cause, and its content the whole text."""
    engine.make = canned.failing
    pytester.runpytest_inprocess("--junitxml=report.xml", "--tb=no")
    (failure,) = ElementTree.parse(pytester.path / "report.xml").iter("failure")
    assert failure.get("message").startswith("log_laundered: ")
    assert failure.text.startswith("fp32-b2x1 FAILED: ")


SIX_CELLS = """
import pytest

@pytest.mark.gpu_stability(steps=2)
def test_trains(sft_run):
    pass
"""


@pytest.mark.parametrize("make", ["of", "failing", "not_run"])
@pytest.mark.parametrize(
    "arguments", [[], ["-v"], ["-n", "2"], ["--tb=no"]], ids=["plain", "verbose", "xdist", "no-tb"]
)
def test_lines_fit_the_terminal(pytester, in_subprocess, monkeypatch, make, arguments):
    """At 80 columns no line of ours is longer, whatever the cells came to; pytest's own are not counted."""
    monkeypatch.setenv("COLUMNS", "80")
    pytester.makepyfile(test_it=SIX_CELLS)
    lines = in_subprocess(
        "-p", "no:sftguard", "-p", "pytest_sftguard.plugin", *arguments, make=f"canned.{make}"
    ).outlines
    ours = itertools.dropwhile(lambda line: "[100%]" not in line, lines)
    assert [line for line in ours if len(line) > 80] == []


@pytest.mark.parametrize("option", [[], ["-q"], ["-n", "2"]], ids=["plain", "quiet", "xdist"])
def test_healthy_session_fits_a_screen(pytester, in_subprocess, monkeypatch, option):
    """Six sound cells are told in 25 lines at 80 columns, pytest's own among them, without a warning."""
    monkeypatch.setenv("COLUMNS", "80")
    pytester.makepyfile(test_it=SIX_CELLS)
    # no two precisions give the same numbers to the bit
    result = in_subprocess(
        *option, make="lambda c: canned.of(c, values=(0.5, 1.25 + len(c.cell.precision) / 1e5, 2.0))"
    )
    result.assert_outcomes(passed=6, warnings=0)
    assert len(result.outlines) <= 25


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
        ({"PY_COLORS": "1"}, True),
    ],
    ids=["file", "FORCE_COLOR", "NO_COLOR", "PY_COLORS"],
)
def test_colour_is_as_pytest_has_it(pytester, one_cell, in_subprocess, monkeypatch, environment, coloured):
    """The verdicts are coloured where pytest's own lines are, and nowhere else."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = in_subprocess().stdout.str()
    assert ("\x1b[32mok" in text, "\x1b[1mprecision" in text, "\x1b" in text) == (coloured,) * 3


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


def seen(written):
    """What is left on a screen of what was written, line by line: a backspace goes back one character."""
    for line in written.splitlines():
        screen, at = {}, 0
        for character in line:
            if character == "\b":
                at -= 1
            else:
                screen[at] = character
                at += 1
        yield "".join(screen[i] for i in sorted(screen))


@pytest.mark.parametrize("doing", ["building", "step 2/3", "looking at what was trained"])
def test_progress_is_shown_on_a_terminal(pytester, engine, one_cell, doing):
    """Where a person watches, the current line shows what a cell is at."""
    pytester.makeconftest(ON_A_TERMINAL)
    assert f"fp32-b2x1: {doing}" in pytester.runpytest_inprocess().stdout.str()


@pytest.mark.parametrize("make", [canned.of, lambda config: 1 / 0], ids=["done", "broken-off"])
def test_progress_leaves_nothing_behind(pytester, engine, one_cell, make):
    """When a cell is done, its line is as pytest writes it."""
    engine.make = make
    pytester.makeconftest(ON_A_TERMINAL)
    (line,) = (s for s in seen(pytester.runpytest_inprocess().stdout.str()) if s.startswith("test_it.py "))
    assert re.fullmatch(r"test_it\.py [.E] +\[100%\]", line)
    assert len(line) == 119


def test_progress_stays_in_its_line(pytester, engine, monkeypatch):
    """Where the line is nearly full, the end of what a cell is doing is left out."""
    monkeypatch.setenv("COLUMNS", "60")
    pytester.makeconftest(ON_A_TERMINAL)
    pytester.makepyfile(test_it=ONE_CELL)
    written = pytester.runpytest_inprocess("-v").stdout.str()
    line = next(line for line in written.splitlines() if line.startswith("test_it.py::"))
    assert max(len(part) for part in line.split("\b") if part) < 60


@pytest.mark.parametrize("arguments", [[], ["-s"]], ids=["captured", "not-captured"])
def test_progress_is_not_shown_in_a_log(pytester, engine, one_cell, arguments):
    """Where the output is a file, no step is shown."""
    assert "step 2/3" not in pytester.runpytest_inprocess(*arguments).stdout.str()


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
    pytester.makepyfile(test_it=ONE_CELL.replace("sft_run", "sft_run, late") + LATE)
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

def message(run, rerun, screen):
    return f"dropped: again by {rerun}"

def section(runs, screen):
    return (f"dropped: {name} {run.record.cell}" for name, run, _ in runs)
"""


@pytest.fixture
def dropped(pytester, monkeypatch):
    """A session with a failing cell, and with one more file in the folder of reports."""
    pytester.mkdir("more").joinpath("dropped.py").write_text(DROPPED)
    monkeypatch.setattr(reports, "__path__", [*reports.__path__, str(pytester.path / "more")])


@pytest.mark.parametrize("line", ["dropped: test_it.py::test_it* fp32-b2x1", "dropped: again by pytest *"])
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
