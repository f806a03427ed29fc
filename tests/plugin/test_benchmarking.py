"""Step times in the hands of pytest-benchmark: what it keeps, compares and fails."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests.support import canned

TIMED = """
import pytest

@pytest.mark.gpu_stability(precision="fp32", batch="2x1", steps=4)
@pytest.mark.benchmark(group="steps")
def test_it(sft_run, benchmark):
    sft_run.benchmark_steps(benchmark)
"""


def lasting(*seconds):
    """Makes records whose steps took so long."""

    def make(config):
        record = canned.of(config)
        steps = zip(record.steps, seconds, strict=True)
        return dataclasses.replace(record, steps=tuple(dataclasses.replace(s, seconds=t) for s, t in steps))

    return make


@pytest.fixture
def timed(pytester, engine, monkeypatch):
    """Runs the one timed test: a function of the seconds of its steps, and of arguments."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest -p no:anyio -p no:xdist")
    # under which pytest-benchmark switches itself off
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makepyfile(test_it=TIMED)

    def run(seconds, *arguments):
        engine.make = lasting(*seconds)
        return pytester.runpytest_inprocess(*arguments)

    return run


def test_the_steps_are_the_rounds(timed, pytester):
    """Each step but the first is a round of exactly its time."""
    timed([9.0, 0.25, 0.1, 0.2], "--benchmark-json=kept.json").assert_outcomes(passed=1)
    [kept] = json.loads((pytester.path / "kept.json").read_text())["benchmarks"]
    assert kept["stats"]["data"] == [0.25, 0.1, 0.2]
    assert (kept["group"], kept["stats"]["rounds"]) == ("steps", 3)


def test_a_slower_training_fails_the_comparison(timed):
    """`--benchmark-compare-fail` holds a training to the steps of an earlier one."""
    steps, compared = [9.0, 0.1, 0.1, 0.1], ("--benchmark-compare", "--benchmark-compare-fail=median:10%")
    timed(steps, "--benchmark-save=before").assert_outcomes(passed=1)
    timed(steps, *compared).assert_outcomes(passed=1)
    result = timed([t * 1.5 for t in steps], *compared)
    assert result.ret != pytest.ExitCode.OK
    result.stderr.fnmatch_lines(["*Performance has regressed*"])


def test_disabled_benchmarks_cost_a_training_nothing(timed):
    """The training is judged as ever."""
    timed([9.0, 0.1, 0.1, 0.1], "--benchmark-disable").assert_outcomes(passed=1)


# the inner test fails before it uses the fixture, of which pytest-benchmark warns
@pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")
def test_a_training_without_steps_has_nothing_to_time(pytester, timed):
    """What is asked for is said, in place of an empty table."""
    pytester.makepyfile(test_it=TIMED.replace("(benchmark)", "(benchmark, warm_up=4)"))
    result = timed([9.0, 0.1, 0.1, 0.1])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*there is no step to hand to benchmark*"])
