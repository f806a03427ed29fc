"""The reports: text that says what, where, by how much, on what and what next; scalars; files."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import shlex
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard import registry, reports
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import ErrorRecord, RunRecord
from pytest_sftguard.reports import failure, json_files, junit, terminal
from pytest_sftguard.reports._headline import headline
from pytest_sftguard.reports._screen import Screen, columns
from pytest_sftguard.session import message, pack, unpack
from pytest_sftguard.verdicts import JudgedRun, Verdict, judge
from tests.strategies import healthy_records, non_finite
from tests.support import canned
from tests.support.canned import healthy, with_step, with_steps

ALL = load_invariants()
NAN = math.nan
SCREEN = Screen(width=80)
RERUN = 'pytest "tests/test_gpu.py::test_it[fp32-b2x1]" --sftguard-steps=4'
BAD = with_step(healthy(model="some/folder", log=False), 3, loss=NAN, micro_losses=(NAN,))
UNSEEN = dataclasses.replace(healthy(not_run="no"), steps=(), log=(), seconds=None)


def judged(record):
    return JudgedRun(record, judge(record, ALL))


@pytest.mark.parametrize("name", registry.names("pytest_sftguard.reports"))
def test_report_offers_hooks(name):
    """A public function of a report that is no hook would never run."""
    module = importlib.import_module(f"pytest_sftguard.reports.{name}")
    own = {n for n, f in vars(module).items() if getattr(f, "__module__", "") == module.__name__ and n[0] != "_"}
    assert own
    assert own <= set(get_args(reports.Hook))


def flat(text):
    """The text without its line breaks, which depend on the width."""
    return re.sub(r"\s+", " ", text)


@pytest.mark.parametrize(
    "wording",
    [
        "fp32-b2x1 FAILED: raw_loss_finite, evidence_complete",
        "device Some CPU (1 thread), torch 2.13.0",
        "target some.module:build_trainer with model some/folder",
        "step 3 raw_loss_finite: loss is not finite at 1 of 4 steps (first: step 3, micro-batch 1)",
        "[observed nan, allowed finite]",
        f"rerun {RERUN}",
    ],
    ids=["what", "device", "target", "where", "how-much", "rerun"],
)
def test_failure_says(wording):
    """The text of a failed cell says what, where, by how much, on what, and what to run next."""
    assert wording in flat(failure.message(judged(BAD), RERUN, SCREEN))


@pytest.mark.parametrize("label", ["cause", "evidence", "cure"])
def test_failure_says_why(label):
    """Where a mechanism is likely, the text names it, its evidence and its cure."""
    text = failure.message(judged(with_step(healthy(), 2, supervised_tokens=0)), RERUN, SCREEN)
    assert re.search(rf"^  {label} +\S", text, re.MULTILINE)


SKIPPED = judged(dataclasses.replace(healthy(Cell("fp16-mixed", 2, 1), steps=8, skipped=(1, 2, 3, 4)), schedule=None))
RAISED = judged(healthy(error=ErrorRecord(stage="train", type="KeyError", message="row 7", where="mine.py:3 in f")))


def test_failure_without_a_cause_says_what_is_certain():
    """Without evidence for a mechanism the text says so, where it begins, and what that rules out."""
    text = flat(failure.message(SKIPPED, RERUN, SCREEN))
    assert "cause no known mechanism fits certain the first that deviates is the optimizer's step at step 4: " in text
    assert "ruled out rows and labels, the model before its first step, the forward pass and its loss, " in text
    assert "open nothing looked at the learning rate" in text
    assert "or else" not in text


def test_exception_of_the_training_is_what_is_certain():
    """Of a training that raised, the exception and its place are certain."""
    text = flat(failure.message(RAISED, RERUN, SCREEN))
    assert "no known mechanism fits certain the code under test raised KeyError: row 7 in mine.py:3 in f" in text


@pytest.mark.parametrize(
    ("rerun", "words"), [(RERUN, "--sftguard-waive=effective_steps, or waive= in the marker"), ("", "--waive")]
)
def test_failure_says_how_to_accept_it(rerun, words):
    """What may be meant can be waived: by option or marker in a session, by another option where records are judged."""
    assert f"if meant accept it with {words}" in flat(failure.message(SKIPPED, rerun, SCREEN))


def test_nobody_means_a_loss_that_is_not_finite():
    """What is not finite is nothing to accept."""
    lost = judged(dataclasses.replace(with_step(healthy(), 3, loss=math.nan, micro_losses=(math.nan,)), log=()))
    kept = [f for f in lost.verdict.failures if f.invariant == "raw_loss_finite"]
    text = failure.message(JudgedRun(lost.record, Verdict(tuple(kept))), RERUN, SCREEN)
    assert "if meant" not in text


def test_failure_findings_are_in_the_order_of_steps():
    """What happened first stands first."""
    record = with_step(with_step(healthy(), 4, loss=NAN), 2, grad_norm=NAN)
    steps = re.findall(r"^  step (\d)", failure.message(judged(record), RERUN, SCREEN), re.MULTILINE)
    assert steps == sorted(steps)


def words(text):
    """The words that a shell reads in the command of a failed cell's text."""
    return shlex.split(text.partition("  rerun ")[2].replace("\\\n", ""))


@pytest.mark.parametrize("width", [40, 80, 120])
def test_rerun_can_be_copied(width):
    """A shell reads the command as it was, however many lines it fills."""
    long = RERUN + " --sftguard-batch='2 8' --sftguard-target=" + "x" * 200
    text = failure.message(judged(BAD), long, Screen(width=width))
    assert words(text) == shlex.split(long)


@pytest.mark.parametrize("own", [AssertionError("1 == 2\nassert 1 == 2"), ValueError()], ids=["lines", "empty"])
def test_own_exception_stands_below(own):
    """What the test's body raised is printed with its type, on one line."""
    told = message(judged(BAD), RERUN, SCREEN, own).splitlines()[-1]
    assert told == f"The test itself raised {type(own).__name__}: {own}".partition("\n")[0].removesuffix(": ")


@given(record=healthy_records(), value=non_finite(), data=st.data())
def test_any_failure_can_be_told(record, value, data):
    """The text of any failed cell has its name in the first line and the command in the last."""
    step = data.draw(st.sampled_from(record.steps)).step
    failed = with_step(record, step, **{data.draw(st.sampled_from(["loss", "max_update", "learning_rate"])): value})
    text = failure.message(judged(failed), RERUN, SCREEN)
    assert (text.startswith(record.cell), words(text)) == (True, shlex.split(RERUN))


@given(record=healthy_records(), value=non_finite(), width=st.integers(40, 120))
def test_failure_fits(record, value, width):
    """No line of a failed cell's text is longer than the screen is wide, long names of tensors included."""
    failed = judged(with_step(record, 1, **dict.fromkeys(["loss", "grad_norm", "max_update"], value)))
    assert max(map(len, failure.message(failed, "", Screen(width=width)).splitlines())) <= width


def test_long_name_breaks_after_a_dot():
    """A name that is longer than a line can be read in its pieces."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
    lines = Screen(width=60).wrap(f"the tensor {name} is not finite", " " * 12)
    assert (name in "".join(map(str.strip, lines)), lines[0][-1]) == (True, ".")


@pytest.mark.parametrize(("asked", "given"), [("20", 40), ("100", 100), ("300", 120)])
def test_width_of_the_terminal(monkeypatch, asked, given):
    """Lines are as wide as the terminal, within limits."""
    monkeypatch.setenv("COLUMNS", asked)
    assert columns() == given


@pytest.mark.parametrize(
    ("record", "start"),
    [
        pytest.param(with_step(healthy(), 2, supervised_tokens=0), "all_labels_masked: ", id="cause"),
        pytest.param(healthy(base=None), "evidence_complete: ", id="finding"),
    ],
)
def test_headline(record, start):
    """One line says the cause, or the first finding where none is known."""
    line = headline(judged(record))
    assert (line[: len(start)], "\n" in line) == (start, False)


@pytest.mark.parametrize(
    ("record", "wording"),
    [
        pytest.param(healthy(not_run="no cuda device"), "fp32-b2x1 not evaluated: no cuda device", id="not-run"),
        pytest.param(healthy(compute_dtypes={}), "no matrix product of an adapted layer was seen", id="no-evidence"),
    ],
)
def test_not_evaluated_says_why(record, wording):
    """The reason why a cell was not evaluated is one line."""
    assert wording in failure.message(judged(record), RERUN, SCREEN)


def test_not_evaluated_without_findings():
    """A cell that nothing was held against says so."""
    run = JudgedRun(healthy(), judge(healthy(), []))
    assert failure.message(run, RERUN, SCREEN) == "fp32-b2x1 not evaluated: nothing in it could be judged"


def table(*records, **screen):
    """The terminal's section for `records` of one test."""
    return terminal.section([("t.py::test_it[a]", judged(r), RERUN) for r in records], Screen(width=80, **screen))


@pytest.mark.parametrize(
    ("record", "row"),
    [
        pytest.param(healthy(), "fp32 2x1 ok 0.5 .. 2 1.2500 -> 1.2500 2.0", id="passed"),
        pytest.param(with_steps(healthy(), grad_norm=1.0, loss=0.5), "fp32 2x1 FAILED 1 .. 1", id="failed"),
        pytest.param(
            with_step(healthy(log=False), 2, grad_norm=NAN), "fp32 2x1 FAILED 1.25 .. 2, 1 nan/inf", id="one-nan"
        ),
        pytest.param(with_steps(healthy(), grad_norm=NAN), "fp32 2x1 FAILED 4 nan/inf", id="every-nan"),
        pytest.param(with_step(healthy(), 4, loss=NAN), "1.2500 -> nan", id="loss-nan"),
        pytest.param(UNSEEN, "fp32 2x1 not evaluated", id="not-evaluated"),
        pytest.param(healthy(answers=[1.0, None]), " 1/2 ", id="answers"),
        pytest.param(healthy(answers=[1.0, NAN]), " 1/2 ", id="answer-nan"),
    ],
)
def test_terminal_row(record, row):
    """A cell is one line: precision, batch, verdict, norms, loss, answers, seconds."""
    assert row in flat(table(record)[1])


def test_terminal_names_tests_where_there_are_several():
    """The rows of each test stand below its name where there are several, in whatever order they came."""
    runs = [(f"t.py::{name}[a]", judged(healthy()), RERUN) for name in ("test_one", "test_two", "test_one")]
    first = [line.split()[0] for line in terminal.section(runs, SCREEN)[1:6]]
    assert first == ["t.py::test_one", "fp32", "fp32", "t.py::test_two", "fp32"]


def test_terminal_leaves_out_what_no_cell_has():
    """A column without a number in it has no heading."""
    assert "answers" not in table(healthy())[0]


def test_terminal_narrows_the_column_that_breaks_fewest_cells():
    """Where the table is too wide, one cell goes on in a second line, and the others stay as they are."""
    wide = with_step(healthy(answers=[1.0]), 2, grad_norm=NAN, loss=12345.6)
    lines = table(healthy(answers=[1.0]), wide, healthy(answers=[1.0]))
    assert [line.split()[0] for line in lines[:5]] == ["precision", "fp32", "fp32", "nan/inf", "fp32"]


@given(records=st.lists(healthy_records(), min_size=1, max_size=3), width=st.integers(60, 120), details=st.booleans())
def test_terminal_fits(records, width, details):
    """No line of the section is longer than the screen is wide."""
    runs = [("t.py::test_it", judged(with_step(r, 1, grad_norm=NAN)), "") for r in records]
    lines = terminal.section(runs, Screen(width=width, details=details))
    assert max(map(len, lines)) <= width


def test_terminal_names_each_device_once():
    """The devices stand on one line below the table."""
    lines = table(healthy(), healthy(seed=1), healthy(device=canned.H100, tf32=False))
    assert "on NVIDIA H100 x2, torch 2.13.0; Some CPU (1 thread), torch 2.13.0" in lines


def test_terminal_tells_each_failure():
    """Below the table stands the text of each failed cell, headed by the test's id."""
    lines = table(healthy(), BAD)
    (at,) = (i for i, line in enumerate(lines) if line.startswith("fp32-b2x1 FAILED: raw_loss_finite"))
    assert lines[at - 1].strip("_") == " t.py::test_it[a] "


def test_terminal_tells_each_cause_once_where_pytest_tells_the_failures():
    """Where the texts stand elsewhere, cells that failed by the same cause share a line, and the place is told."""
    other = healthy(Cell("fp32", 4, 1))
    text = "\n".join(
        table(*(with_step(r, 2, supervised_tokens=0) for r in (healthy(), other)), elsewhere="FAILURES above")
    )
    assert text.count("FAILED every cell: all_labels_masked: ") == 1
    assert text.count("findings, evidence and cures: FAILURES above") == 1
    assert "supervision_audit" not in text


def test_terminal_gathers_what_was_not_evaluated():
    """A reason that holds for every cell is told once."""
    told = [line for line in table(healthy(), healthy(Cell("fp32", 4, 1))) if "strict_answers" in line]
    assert told == ["strict_answers not evaluated: the target offers no questions() (every cell)"]


def test_terminal_names_the_cells_that_were_not_evaluated():
    """A reason that holds for some cells names them."""
    told = [line for line in table(healthy(), healthy(Cell("fp32", 4, 1), not_run="no")) if "cell_ran" in line]
    assert told == ["cell_ran not evaluated: no (fp32-b4x1)"]


FOLDED = {"details": False}


def test_terminal_folds_what_nothing_required():
    """Without details, what was not evaluated and not required is one sentence, with the cells counted."""
    lines = table(healthy(), healthy(Cell("fp32", 4, 1), not_run="no"), **FOLDED)
    (at,) = (i for i, line in enumerate(lines) if line.startswith("not evaluated: "))
    text = flat(" ".join(lines[at:]))
    assert "strict_answers (1 of 2 cells)" in text
    assert text.endswith("left to a higher --sftguard-tier (nothing required them; -v says why)")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        pytest.param(judged(healthy(not_run="no GPU")), "cell_ran not evaluated: no GPU", id="required"),
        pytest.param(
            JudgedRun(BAD, judge(BAD, ALL, {}, ["raw_loss_finite"])),
            "raw_loss_finite not evaluated: waived by the user: loss is not finite",
            id="waived",
        ),
    ],
)
def test_terminal_folds_nothing_that_matters(run, reason):
    """What kept a cell from passing, and what the user waived, stays with its reason."""
    assert any(line.startswith(reason) for line in terminal.section([("t.py::test_it", run, "")], Screen(**FOLDED)))


@pytest.mark.parametrize(
    ("record", "painted"),
    [
        pytest.param(healthy(), "<ok green>", id="passed"),
        pytest.param(BAD, "<FAILED red>", id="failed"),
        pytest.param(healthy(not_run="no"), "<not evaluated yellow>", id="not-evaluated"),
    ],
)
def test_terminal_paints_the_verdict(record, painted):
    """The verdict has the colour that pytest gives to such a test, and the headings are bold."""
    heading, row, *_ = table(record, paint=lambda text, **markup: f"<{text.strip()} {' '.join(markup)}>")
    assert (heading.endswith(" bold>"), painted in row) == (True, True)


@given(record=healthy_records())
def test_terminal_shows_any_record(record):
    """Any record has its line, with its precision first."""
    assert table(record)[1].split()[0] == record.precision


@given(record=healthy_records())
def test_properties_are_scalars(record):
    """JUnit properties are short texts of one line, under our prefix."""
    assert all(
        n.startswith("sftguard_") and "\n" not in v and len(v) < 100 for n, v in junit.properties(judged(record))
    )


@pytest.mark.parametrize(
    ("record", "name", "value"),
    [
        pytest.param(healthy(), "cell", "fp32-b2x1", id="cell"),
        pytest.param(healthy(), "verdict", "passed", id="passed"),
        pytest.param(BAD, "verdict", "failed", id="failed"),
        pytest.param(BAD, "failed", "evidence_complete,raw_loss_finite", id="invariants"),
        pytest.param(with_step(healthy(), 2, supervised_tokens=0), "cause", "all_labels_masked", id="cause"),
        pytest.param(RAISED.record, "cause", "unknown", id="no-cause"),
        pytest.param(healthy(not_run="no"), "verdict", "not evaluated", id="not-evaluated"),
        pytest.param(with_step(healthy(), 1, loss=NAN), "loss_first", "nan", id="nan"),
        pytest.param(healthy(), "grad_norm_max", "2.0", id="norm"),
        pytest.param(with_steps(healthy(), grad_norm=NAN), "grad_norm_max", "nan", id="no-finite-norm"),
        pytest.param(with_step(healthy(), 2, grad_norm=math.inf), "grad_norm_nonfinite", "1", id="lost-norms"),
        pytest.param(healthy(answers=[1.0, None, NAN]), "answers_parsed", "1", id="answers"),
    ],
)
def test_property(record, name, value):
    """A property holds the number of the record."""
    assert dict(junit.properties(judged(record)))[f"sftguard_{name}"] == value


@pytest.mark.parametrize("name", ["seconds", "answers", "loss_first"])
def test_property_of_what_was_not_seen(name):
    """A number that was not seen has no property."""
    assert f"sftguard_{name}" not in dict(junit.properties(judged(UNSEEN)))


def test_file_holds_the_record(tmp_path):
    """The record of a test can be read back from its file."""
    json_files.write(tmp_path / "new", "t.py::test_it[a]", judged(healthy()))
    assert [RunRecord.read(path) for path in (tmp_path / "new" / "records").iterdir()] == [healthy()]


def test_folder_is_ignored_by_git(tmp_path):
    """The folder keeps itself out of version control."""
    json_files.write(tmp_path / "new", "t.py::test_it", judged(healthy()))
    assert (tmp_path / "new" / ".gitignore").read_text() == "*\n"


def test_own_gitignore_is_kept(tmp_path):
    """A .gitignore that is there already is left as it is."""
    (tmp_path / ".gitignore").write_text("mine\n")
    json_files.write(tmp_path, "t.py::test_it", judged(healthy()))
    assert (tmp_path / ".gitignore").read_text() == "mine\n"


def test_file_is_replaced(tmp_path):
    """A test has one file, of its last run."""
    for seed in (1, 2):
        json_files.write(tmp_path, "t.py::test_it", judged(healthy(seed=seed)))
    assert [RunRecord.read(path).seed for path in (tmp_path / "records").iterdir()] == [2]


@given(nodeid=st.text(min_size=1, max_size=300))
def test_file_name_is_safe(nodeid):
    """Whatever a test is called, its file's name is short and plain."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,100}", json_files._file_name(nodeid))


@given(one=st.text(max_size=20), other=st.text(max_size=20))
def test_file_name_is_its_own(one, other):
    """Two tests share a file only if they are the same test."""
    assert (json_files._file_name(one) == json_files._file_name(other)) == (one == other)


def test_file_name_reads_like_the_test():
    """The file of a cell is found by its eye."""
    name = json_files._file_name("tests/gpu/test_matrix.py::test_trains[fp16-mixed-b4x2]")
    assert name.startswith("test_matrix.py_test_trains_fp16-mixed-b4x2-")


@given(record=healthy_records(), value=non_finite())
def test_packed_run_travels(record, value):
    """A judged run goes through JSON, as between xdist's processes, and its verdict comes out the same."""
    run = judged(with_step(record, 1, loss=value, max_update=value))
    _, unpacked, _ = unpack(json.loads(json.dumps(pack(run, "test_it", RERUN))))
    assert repr(unpacked.verdict) == repr(run.verdict)


def test_references_of_a_failed_run_travel():
    """The cause of a failure is the same in each process, as the runs that it was compared with are there too."""
    run = JudgedRun(BAD, judge(BAD, ALL), {"rerun": healthy(seed=3)})
    assert unpack(json.loads(json.dumps(pack(run, "test_it", RERUN))))[1].references == run.references


def test_error_is_told():
    """The exception that ended a run is in the text, with its place."""
    error = ErrorRecord(stage="train", type="OutOfMemoryError", message="CUDA out of memory", where="a.py:3 in f")
    text = failure.message(judged(healthy(error=error)), RERUN, SCREEN)
    assert "the run ended in train: OutOfMemoryError: CUDA out of memory (a.py:3 in f)" in flat(text)
