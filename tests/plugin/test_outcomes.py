"""Outcomes: the verdict decides the test, whatever its body says, and the exit code tells."""

from __future__ import annotations

import os

import pytest

from tests.plugin.conftest import ONE_CELL
from tests.support import canned
from tests.support.stub import TargetError


def test_healthy_cell_passes(pytester, engine, one_cell):
    """A cell that is sound passes."""
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_failed_verdict_fails(pytester, engine, one_cell):
    """A cell that failed fails the test, though the body passes."""
    engine.make = canned.failing
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_failed_verdict_is_told_without_a_traceback(pytester, engine, one_cell):
    """The text of a failed cell stands alone: no frame of ours is in it."""
    engine.make = canned.failing
    text = pytester.runpytest_inprocess().stdout.str()
    assert "fp32-b2x1 FAILED: " in text
    assert ("Traceback" in text, "plugin.py" in text) == (False, False)


def body(pytester, code, marks=""):
    """The one cell, with `code` for its body and `marks` above it."""
    return pytester.makepyfile(test_it=ONE_CELL.replace("    pass", f"    {code}").replace("@", f"{marks}@"))


def test_body_can_fail(pytester, engine):
    """A sound cell whose body fails is a failure with the body's own traceback."""
    body(pytester, "assert sft_run.losses == []")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([">*assert sft_run.losses == []", "E*assert *"])


def test_failing_body_is_told_beside_the_verdict(pytester, engine):
    """Where both fail, the verdict is told first, and the body's exception below it."""
    engine.make = canned.failing
    body(pytester, "raise ValueError('mine')")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["fp32-b2x1 FAILED: *", "The test itself raised ValueError: mine"])


def test_failed_verdict_wins_over_a_skip_in_the_body(pytester, engine):
    """A body cannot skip a failed cell away."""
    engine.make = canned.failing
    body(pytester, "pytest.skip('not today')")
    pytester.runpytest_inprocess().assert_outcomes(failed=1)


def test_failed_verdict_wins_over_a_skip_in_a_fixture(pytester, engine):
    """Nor can a fixture that comes after the training."""
    engine.make = canned.failing
    pytester.makepyfile(
        test_it=ONE_CELL.replace("sft_run", "sft_run, late")
        + "\n@pytest.fixture\ndef late(sft_run):\n    pytest.skip('not today')\n"
    )
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["fp32-b2x1 FAILED: *"])


def test_skip_in_a_fixture_stays_a_skip(pytester, engine):
    """A sound cell that a later fixture skips is skipped."""
    pytester.makepyfile(
        test_it=ONE_CELL.replace("sft_run", "sft_run, late")
        + "\n@pytest.fixture\ndef late(sft_run):\n    pytest.skip('not today')\n"
    )
    pytester.runpytest_inprocess().assert_outcomes(skipped=1)


def test_skip_before_the_training_trains_nothing(pytester, engine):
    """A fixture that skips before sft_run saves the training."""
    pytester.makepyfile(
        test_it=ONE_CELL.replace("sft_run", "early, sft_run")
        + "\n@pytest.fixture\ndef early():\n    pytest.skip('not today')\n"
    )
    pytester.runpytest_inprocess().assert_outcomes(skipped=1)
    assert engine.ran == []


def test_autouse_fixture_comes_first(pytester, engine):
    """What an autouse fixture sets up is there when the cell is trained."""
    pytester.makepyfile(
        test_it=ONE_CELL + "\n@pytest.fixture(autouse=True)\ndef early(monkeypatch):\n"
        "    monkeypatch.setenv('SET_EARLY', '1')\n"
    )
    seen = []
    engine.make = lambda c: seen.append(os.environ.get("SET_EARLY")) or canned.of(c)
    pytester.runpytest_inprocess()
    assert seen == ["1"]


def test_not_evaluated_skips_with_the_reason(pytester, engine, one_cell):
    """A cell that could not be evaluated is a skip, and its reason is shown."""
    engine.make = canned.not_run
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["SKIPPED [[]1[]] test_it.py:3: fp32-b2x1 not evaluated: the device lacks this"])


@pytest.mark.parametrize("option", ["--sftguard-strict", "--sftguard-require-gpu"])
def test_not_evaluated_fails_where_it_must_not(pytester, engine, one_cell, clean, option):
    """With --sftguard-strict, and where a GPU is required, a cell that is not evaluated is no skip."""
    engine.make = canned.not_run
    result = pytester.runpytest_inprocess(option)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    clean(result, "fp32-b2x1 not evaluated: the device lacks this")


@pytest.mark.parametrize("source", ["environment", "ini"])
def test_strict_from_elsewhere(pytester, engine, one_cell, monkeypatch, source):
    """Strictness can be set in the environment and in the ini file."""
    engine.make = canned.not_run
    if source == "environment":
        monkeypatch.setenv("SFTGUARD_STRICT", "1")
    else:
        pytester.makeini("[pytest]\nsftguard_strict = true\n")
    assert pytester.runpytest_inprocess().ret == pytest.ExitCode.TESTS_FAILED


XFAIL = {
    "xfail": ("@pytest.mark.xfail\n", canned.failing, {"xfailed": 1}),
    "xfail-strict": ("@pytest.mark.xfail(strict=True)\n", canned.failing, {"xfailed": 1}),
    "xpass": ("@pytest.mark.xfail\n", canned.of, {"xpassed": 1}),
    "xpass-strict": ("@pytest.mark.xfail(strict=True)\n", canned.of, {"failed": 1}),
    "not-evaluated": ("@pytest.mark.xfail(strict=True)\n", canned.not_run, {"skipped": 1}),
    "other-exception": ("@pytest.mark.xfail(raises=ZeroDivisionError)\n", canned.failing, {"failed": 1}),
}


@pytest.mark.parametrize(("marks", "make", "outcomes"), XFAIL.values(), ids=XFAIL)
def test_expected_failure(pytester, engine, marks, make, outcomes):
    """A failed cell can be expected to fail like any test."""
    engine.make = make
    body(pytester, "pass", marks)
    pytester.runpytest_inprocess().assert_outcomes(**outcomes)


def test_failure_can_be_expected_by_the_body(pytester, engine):
    """A body that calls pytest.xfail expects the failed verdict."""
    engine.make = canned.failing
    body(pytester, "pytest.xfail('known')")
    pytester.runpytest_inprocess().assert_outcomes(xfailed=1)


def test_first_failure_stops(pytester, engine):
    """`-x` trains no cell after the first that failed."""
    engine.make = canned.failing
    pytester.makepyfile(test_it=ONE_CELL.replace('"fp32"', '"fp32 bf16-mixed"'))
    pytester.runpytest_inprocess("-x").assert_outcomes(failed=1)
    assert engine.ran == ["fp32-b2x1"]


def test_last_failed_runs_that_cell_alone(pytester, engine):
    """`--lf` trains the cell that failed, and no other."""
    pytester.makepyfile(test_it=ONE_CELL.replace('"fp32"', '"fp32 bf16-mixed"'))
    engine.make = lambda c: canned.failing(c) if c.cell.precision == "fp32" else canned.of(c)
    pytester.runpytest_inprocess()
    engine.ran.clear()
    pytester.runpytest_inprocess("--lf")
    assert engine.ran == ["fp32-b2x1"]


def test_same_cells_train_once(pytester, engine):
    """Two tests that ask for the same runs share them."""
    pytester.makepyfile(test_it=ONE_CELL + ONE_CELL.replace("test_it", "test_too"))
    pytester.runpytest_inprocess().assert_outcomes(passed=2)
    assert engine.ran == ["fp32-b2x1"]


def test_other_settings_train_again(pytester, engine):
    """Two tests that differ in a setting share nothing."""
    pytester.makepyfile(test_it=ONE_CELL + ONE_CELL.replace("test_it", "test_too").replace("steps=3", "steps=4"))
    pytester.runpytest_inprocess().assert_outcomes(passed=2)
    assert engine.ran == ["fp32-b2x1", "fp32-b2x1"]


def test_shared_failure_fails_both(pytester, engine):
    """A shared run that failed fails each of its tests."""
    engine.make = canned.failing
    pytester.makepyfile(test_it=ONE_CELL + ONE_CELL.replace("test_it", "test_too"))
    pytester.runpytest_inprocess().assert_outcomes(failed=2)


def test_keyboard_interrupt_stops(one_cell, in_subprocess):
    """Ctrl-C while training stops pytest, and fails no test."""
    result = in_subprocess(make="lambda c: (_ for _ in ()).throw(KeyboardInterrupt)")
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_target_that_cannot_be_used(pytester, engine, one_cell, clean):
    """What is wrong with a target takes one line."""

    def refuse(config):
        raise TargetError("target a:b is no function that builds a Trainer")

    engine.make = refuse
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    clean(result, "target a:b is no function that builds a Trainer")


def test_engine_that_cannot_be_imported(pytester, one_cell, in_subprocess, clean):
    """Without torch a marked test says what to install."""
    result = in_subprocess(make="canned.of); sys.modules.update(torch=None); stub.engine.__dict__.pop('runner'")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    clean(result, "training needs torch, transformers, accelerate and peft, and one is missing", lines=2)


def test_folder_that_cannot_be_written(pytester, engine, one_cell, clean):
    """A folder below a file is told with the option that names another."""
    pytester.makefile(".txt", occupied="")
    result = pytester.runpytest_inprocess("--sftguard-dir=occupied.txt/records")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    clean(result, "name another folder with --sftguard-dir", lines=2)


OUTSIDERS = """
from pytest_sftguard.verdicts import Finding, Outcome

class LossFalls:
    def check(self, record, reference=None):
        if not record.losses[-1] < record.losses[0]:
            yield Finding(invariant="loss_falls", outcome=Outcome.FAILED, message="the loss did not fall")

class Broken:
    def check(self, record, reference=None):
        raise KeyError("absent")
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LossFalls", "*loss_falls: the loss did not fall"),
        ("Broken", "*broken not evaluated: the invariant itself is broken: KeyError: 'absent'*"),
    ],
    ids=["failing", "broken"],
)
def test_outsider_is_judged(pytester, engine, one_cell, name, message):
    """An invariant of the user's own, named by dotted path, decides like ours."""
    engine.make = lambda c: canned.with_step(canned.of(c), 3, loss=9.0)
    pytester.makepyfile(mine=OUTSIDERS)
    pytester.syspathinsert()
    result = pytester.runpytest_inprocess(f"--sftguard-invariants=mine:{name}")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([message])


def test_rest_is_judged_beside_a_broken_outsider(pytester, engine, one_cell):
    """A broken invariant keeps no other from being judged."""
    engine.make = canned.failing
    pytester.makepyfile(mine=OUTSIDERS)
    pytester.syspathinsert()
    result = pytester.runpytest_inprocess("--sftguard-invariants=mine:Broken")
    result.stdout.fnmatch_lines(["fp32-b2x1 FAILED: *raw_loss_finite*", "*broken not evaluated: *KeyError: 'absent'*"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent:It", "it: the invariant cannot be used: 'absent:It' cannot be imported: ModuleNotFoundError"),
        ("json:loads", "loads: the invariant cannot be used: 'json:loads' is no invariant: it has no check"),
        ("loss_falls", "loss_falls: the invariant cannot be used: unknown name 'loss_falls': choose from"),
    ],
    ids=["absent", "no-check", "unknown-name"],
)
def test_outsider_that_cannot_be_used(pytester, engine, one_cell, clean, path, message):
    """What is wrong with a named invariant is told as a failure of that one, beside the verdict of the others."""
    engine.make = canned.failing
    result = pytester.runpytest_inprocess(f"--sftguard-invariants={path}")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    clean(result, message[:100], lines=20)
    result.stdout.fnmatch_lines(["fp32-b2x1 FAILED: *raw_loss_finite*"])


def test_waived_invariant_fails_nothing(pytester, engine, one_cell):
    """What an invariant that the user waived would have failed is reported, and holds up nothing else."""
    engine.make = lambda c: canned.with_step(canned.of(c), 2, loss=float("nan"))
    waived = "--sftguard-waive=raw_loss_finite,evidence_complete,log_honest"
    result = pytester.runpytest_inprocess(waived)
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(["raw_loss_finite not evaluated: waived by the user: loss is not finite*"])


@pytest.mark.parametrize(("share", "outcome"), [("1.0", "failed"), ("0.5", "passed")])
def test_threshold_of_the_user(pytester, engine, one_cell, share, outcome):
    """A threshold is what the user sets it to."""
    engine.make = lambda c: canned.of(c, answers=[1.0, None])
    result = pytester.runpytest_inprocess(f'--sftguard-thresholds={{"strict_answers.min_parsed_fraction": {share}}}')
    result.assert_outcomes(**{outcome: 1})


def test_threshold_that_there_is_not(pytester, engine, one_cell, clean):
    """A threshold's name that is none is told, with those that its invariant has."""
    result = pytester.runpytest_inprocess('--sftguard-thresholds={"strict_answers.min_parsed": 1}')
    clean(result, "there is no threshold 'strict_answers.min_parsed': choose from", lines=30)


def test_required_gpu_that_was_there(pytester, engine, one_cell):
    """Cells that ran on a GPU are what --sftguard-require-gpu asks for."""
    engine.make = lambda c: canned.of(c, device=canned.H100, tf32=False)
    assert pytester.runpytest_inprocess("--sftguard-require-gpu").ret == pytest.ExitCode.OK


def required(pytester, monkeypatch, source, *arguments):
    """A run in which a GPU is required by `source`."""
    if source == "environment":
        monkeypatch.setenv("SFTGUARD_REQUIRE_GPU", "1")
    if source == "ini":
        pytester.makeini("[pytest]\nsftguard_require_gpu = true\n")
    return pytester.runpytest_inprocess(*(["--sftguard-require-gpu"] if source == "option" else []), *arguments)


@pytest.mark.parametrize("source", ["option", "environment", "ini"])
def test_required_gpu_with_no_marked_test(pytester, monkeypatch, source):
    """A session without a marked test fails where a GPU is required, though all its tests pass."""
    pytester.makepyfile(test_it="def test_it(): pass\n")
    result = required(pytester, monkeypatch, source)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(["--sftguard-require-gpu: nothing ran on a GPU"])


def test_required_gpu_with_no_test(pytester, monkeypatch):
    """A session without any test fails where a GPU is required."""
    assert required(pytester, monkeypatch, "option").ret == pytest.ExitCode.TESTS_FAILED


def test_required_gpu_with_a_run_on_the_cpu(pytester, engine, monkeypatch, one_cell):
    """Cells that ran on a CPU are no evidence about a GPU."""
    assert required(pytester, monkeypatch, "option").ret == pytest.ExitCode.TESTS_FAILED


def test_required_gpu_is_not_asked_of_a_collection(pytester, monkeypatch, one_cell):
    """Listing the cells needs no GPU."""
    assert required(pytester, monkeypatch, "option", "--collect-only").ret == pytest.ExitCode.OK
