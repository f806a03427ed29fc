"""The study of generated faults: bounds, limits, truth, what is kept, and a small study from end to end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard import __main__
from pytest_sftguard.detection import generated, pages, truth
from pytest_sftguard.detection.processes import run_all
from pytest_sftguard.detection.rates import bounds, isotonic, limit
from pytest_sftguard.detection.study import Study, TrailError, study
from pytest_sftguard.detection.trials import Seen, Trial
from pytest_sftguard.diagnosis import MECHANISMS
from pytest_sftguard.engine.generated.grammar import OPERATIONS, STATIONS

FAULT = Trial(
    id="fault-1-0",
    where="save",
    what="noise",
    magnitude=0.1,
    effect=0.1,
    floor=1e-6,
    measure="file",
    seen={"quick": Seen(reported=("round_trip",), named=("adapter_file_differs",))},
)
MISSED = replace(FAULT, id="fault-1-1", magnitude=0.01, seen={"quick": Seen()})


@pytest.mark.parametrize(
    ("hits", "trials", "low", "high"),
    [(0, 600, 0.0, 0.006129), (45, 50, 0.78186, 0.96672), (10, 10, 0.69150, 1.0), (0, 0, 0.0, 1.0)],
)
def test_bounds_are_those_of_clopper_and_pearson(hits: int, trials: int, low: float, high: float) -> None:
    """As tables have them."""
    assert bounds(hits, trials) == pytest.approx((low, high), abs=1e-4)


@given(st.lists(st.tuples(st.floats(1e-3, 10), st.booleans()), min_size=1))
def test_the_fit_never_falls(points: list[tuple[float, bool]]) -> None:
    """Its rates lie between 0 and 1, one for each size, and their mean is that of the outcomes."""
    rates = [rate for _, rate in isotonic(points)]
    assert rates == sorted(rates)
    assert all(0 <= rate <= 1 for rate in rates)
    assert len(rates) == len({size for size, _ in points})


def test_the_limit_is_where_the_rate_is_reached() -> None:
    """And there is none where nothing is detected."""
    points = [(1.0, False), (2.0, True), (3.0, False), (4.0, True), (5.0, True)]
    assert limit(points, 0.5) == 2.0
    assert limit(points, 0.95) == 4.0
    assert limit([(1.0, False)], 0.5) is None


def test_every_mechanism_says_of_what_it_speaks() -> None:
    """No cause is counted as wrong because the table does not know it, and the table knows no other."""
    assert truth.unknown() == []
    assert truth.ASSERTS.keys() <= {m.name for m in MECHANISMS}


def test_the_table_of_truth_names_what_exists() -> None:
    """Stations and operations of the grammar."""
    for stations, operations in truth.ASSERTS.values():
        assert set(stations) <= STATIONS.keys()
        assert operations == truth.ANY or set(operations) <= OPERATIONS.keys()


def test_a_cause_is_right_where_it_speaks_of_the_fault() -> None:
    """Of its station, and not against its content."""
    assert truth.is_right("adapter_file_differs", FAULT)
    assert not truth.is_right("scaling_wrong", FAULT)
    assert truth.is_right("labels_shifted_twice", replace(FAULT, where="labels", what="shift"))
    assert not truth.is_right("labels_shifted_twice", replace(FAULT, where="labels", what="drop"))


def test_a_study_tells_its_rates_and_its_map() -> None:
    """With bounds, and a row for each class."""
    found = Study(seed=1, tiers=("quick",), healthy=False, trials=(FAULT, MISSED, replace(FAULT, discarded="none")))
    assert "quick: detected 1 of 2 (50.0%; 95% bounds 1.3% to 98.7%)" in found.summary()
    assert "1 discarded: none" in found.summary()
    assert not found.sound()
    assert found.sound(at_least=0.5)
    assert any(line.startswith("| save | 2 |") for line in pages.markdown(found))
    assert "1 further classes have fewer than 4 faults each." in list(pages.markdown(found))
    assert any("--replay fault-1-1 --tier quick" in line for line in pages.text(found))


def test_an_exception_of_the_guards_own_is_no_detection() -> None:
    """It is counted by itself, and the study is not sound."""
    broken = replace(FAULT, seen={"quick": Seen(error="KeyError: 'x'")})
    found = Study(seed=1, tiers=("quick",), healthy=False, trials=(broken,))
    assert found.reported("quick") == found.missed("quick") == []
    assert not found.sound()


def test_a_trial_is_read_back_as_it_was() -> None:
    """From the file that a study resumes from."""
    assert Trial.from_dict(FAULT.to_dict()) == FAULT


def made(seed: int, number: int, tiers: Sequence[str]) -> Trial:
    """A trial without a training, of which every second one is discarded."""
    return replace(FAULT, id=f"fault-{seed}-{number}", discarded="" if number % 2 else "no effect")


@pytest.mark.slow
def test_a_study_is_resumed(tmp_path: Path) -> None:
    """It draws until enough can be judged, and makes nothing twice."""
    trail = tmp_path / "trail.jsonl"
    first = study(made, 3, 1, ("quick",), 1, healthy=False, trail=trail)
    lines = trail.read_text()
    assert [t.id for t in first.judged] == ["fault-1-1", "fault-1-3", "fault-1-5"]
    assert study(made, 3, 1, ("quick",), 1, healthy=False, trail=trail) == first
    assert trail.read_text() == lines


def written(folder: Path, number: int) -> int:
    """A task that leaves a file, or raises."""
    if not number:
        raise ValueError("a mistake in the study")
    time.sleep(0.2)
    (folder / str(number)).touch()
    return number


@pytest.mark.slow
def test_an_exception_ends_a_study_at_once(tmp_path: Path) -> None:
    """What has not begun is not begun."""
    with pytest.raises(ValueError, match="a mistake in the study"):
        run_all([(written, (tmp_path, number)) for number in range(40)], 1, str)
    assert len(list(tmp_path.iterdir())) < 20


def test_a_trail_of_something_else_is_refused(tmp_path: Path) -> None:
    """The message names the file, and says what to do."""
    (tmp_path / "trail.jsonl").write_text("{}\n")
    with pytest.raises(TrailError, match="name another file"):
        study(made, 1, 1, ("quick",), 1, healthy=False, trail=tmp_path / "trail.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--generate", "1", "--healthy", "1"], "cannot be combined"),
        (["--seed", "1"], "--seed needs --generate"),
        (["--healthy", "1", "--at-least", "0.8"], "--at-least is for composed faults"),
        (["--generate", "1", "nan-best-metric"], "leave ids of faults"),
        (["--replay", "17"], "write fault-SEED-NUMBER"),
    ],
)
def test_misuse_is_answered(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With a sentence that says what to write."""
    assert __main__.main(["faults", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_study_of_faults() -> None:
    """Six draws of a fixed seed: what has an effect and is as large as itself is detected in the tier quick."""
    trials = [generated.fault_trial(2026, number, ("quick",)) for number in range(6)]
    judged = [t for t in trials if not t.discarded]
    assert len(judged) >= 3
    assert not any(t.seen["quick"].error for t in judged)
    assert sum(bool(t.detected("quick")) for t in judged) >= len(judged) // 2


@pytest.mark.slow
def test_a_small_study_of_healthy_trainings() -> None:
    """Six draws of a fixed seed: most of them learn, by a plain run."""
    trials = [generated.healthy_trial(2026, number, ()) for number in range(6)]
    assert sum(not t.discarded for t in trials) >= 4
