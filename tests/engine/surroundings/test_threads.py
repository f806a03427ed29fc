"""A worker of xdist trains with its share of the cores, unless the user chose the number of threads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from pytest_sftguard.engine import runner
from pytest_sftguard.engine.surroundings.threads import shared_cores
from pytest_sftguard.matrix import Cell, RunConfig


@pytest.fixture(autouse=True)
def eight_threads_on_eight_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of eight cores, all of which torch uses, without a choice of the user."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("workers", "share"), [("1", 8), ("2", 4), ("3", 2), ("8", 1), ("20", 1), ("", 8), ("auto", 8)]
)
def test_cores_are_shared_among_workers(workers: str, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each worker gets at least one, a single process all; afterwards the number is restored."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    with shared_cores():
        assert torch.get_num_threads() == share
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_who_has_chosen_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chosen number of threads stays, even if it is larger than that of the cores."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    monkeypatch.setenv(name, "8")
    with shared_cores():
        assert torch.get_num_threads() == 8


def test_fewer_threads_than_the_share_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that sets torch to one thread keeps it."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    torch.set_num_threads(1)
    with shared_cores():
        assert torch.get_num_threads() == 1


def test_it_is_undone_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of threads is restored."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "4")
    with pytest.raises(ZeroDivisionError), shared_cores():
        _ = 1 / 0
    assert torch.get_num_threads() == 8


def test_the_record_says_with_how_many_threads_a_cell_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training, its references and its looks use the share."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "2")
    torch.set_num_threads(2)
    record = runner.run(
        RunConfig(
            cell=Cell("fp32", 2, 1), target="pytest_sftguard.engine.models.tiny:build_trainer", device="cpu", steps=1
        )
    )
    assert record.error is None
    assert record.device.threads == 1
    assert "(1 thread)" in str(record.device)
    assert torch.get_num_threads() == 2
