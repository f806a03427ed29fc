"""The grammar of generated faults: what it composes means something, is told in words, and can be replayed."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.engine.faults import fault_named
from pytest_sftguard.engine.generated import axes, faults, learning, trainings
from pytest_sftguard.engine.generated.faults import Generated, path_of
from pytest_sftguard.engine.generated.grammar import IDS, NUMBERS, OPERATIONS, STATIONS, compose, meaningful
from pytest_sftguard.engine.generated.operations import on_ids, on_numbers

seeds = st.integers(0, 2**32)
numbers = st.integers(0, 10**6)


@given(seeds, numbers)
def test_a_draw_is_replayed_from_its_seed_and_number(seed: int, number: int) -> None:
    """Also by its path, which other processes are given."""
    draw = compose(seed, number)
    assert draw == compose(seed, number)
    fault = fault_named(path_of(draw))
    assert isinstance(fault, Generated)
    assert fault.draw == draw


@given(seeds, numbers)
def test_a_draw_means_something(seed: int, number: int) -> None:
    """The operation fits what passes through the station, the training has what that needs, a step is affected."""
    draw = compose(seed, number)
    station = STATIONS[draw.where]
    assert meaningful(station, OPERATIONS[draw.what])
    assert draw.setting.has(station.needs)
    assert any(map(draw.affects, range(1, draw.setting.steps + 1)))
    assert draw.whom in station.whom
    assert draw.describe("it").count("{") == 0


def test_every_station_and_every_operation_is_drawn() -> None:
    """In a few hundred draws."""
    draws = [compose(0, i) for i in range(600)]
    assert {d.where for d in draws} == STATIONS.keys()
    assert {d.what for d in draws} == OPERATIONS.keys()


def test_the_past_of_a_gradient_graph_is_no_substitute() -> None:
    """A stale loss has no gradient, and a schedule has one number, which cannot be exchanged with others."""
    pairs = {(s.name, o.name) for s, o in itertools.product(STATIONS.values(), OPERATIONS.values()) if meaningful(s, o)}
    assert ("loss", "stale") not in pairs
    assert ("schedule", "swap") not in pairs
    assert ("labels", "scale") not in pairs
    assert ("backward", "stale") in pairs


@given(seeds, numbers)
def test_an_operation_on_numbers_keeps_the_shape_and_the_generators(seed: int, number: int) -> None:
    """Whatever is drawn; the training's random numbers stay as they are."""
    draw = compose(seed, number)
    if STATIONS[draw.where].passes != NUMBERS:
        return
    value, past, state = torch.linspace(1, 2, 24).view(4, 6), torch.zeros(4, 6), torch.get_rng_state()
    changed = on_numbers(draw, value, "w", 1, past)
    assert changed.shape == value.shape
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(changed, on_numbers(draw, value, "w", 1, past)) or draw.what == "non-finite"


@given(seeds, numbers)
def test_an_operation_on_ids_changes_what_it_may(seed: int, number: int) -> None:
    """One row where it is limited to one, and eligible entries alone unless it moves along the tokens."""
    draw = compose(seed, number)
    if STATIONS[draw.where].passes != IDS:
        return
    value = torch.arange(24).view(4, 6)
    eligible = value % 6 < 4
    changed = on_ids(draw, value, eligible, -100, 1, value.flip(0))
    different = changed != value
    if draw.whom == "row":
        assert int(different.any(1).sum()) <= 1
    if draw.what != "shift":
        assert not different[~eligible].any()


@given(seeds, numbers)
def test_a_healthy_training_is_replayed_and_told(seed: int, number: int) -> None:
    """Its task is one of its architecture's, and its extras do not contradict each other."""
    training = axes.compose(seed, number)
    assert training == axes.compose(seed, number)
    assert training.task in axes.ARCHITECTURES[training.architecture].tasks
    assert not any(set(pair) <= set(training.extras) for pair in axes.EITHER)
    assert training.architecture in training.describe()


def test_every_architecture_and_method_is_drawn() -> None:
    """In a thousand draws."""
    drawn = [axes.compose(0, i) for i in range(1000)]
    assert {d.architecture for d in drawn} == axes.ARCHITECTURES.keys()
    assert {d.adapter for d in drawn} == {*axes.LORA, *axes.OTHERS, *axes.PROMPTS}


def test_no_other_name_leads_to_a_draw() -> None:
    """Python asks modules for names of its own."""
    with pytest.raises(AttributeError):
        faults.__getattr__("questions")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_packed_row_is_divided_by_what_is_predicted(architecture: str, tmp_path: Path) -> None:
    """The Trainer counts the first label of a row where it does not know the loss, so that this must not be one."""
    draws = (trainings.compose(3, n) for n in itertools.count())
    draw = next(d for d in draws if (d.architecture, d.collator) == (architecture, "packed"))
    trainer = trainings.built(draw, output_dir=str(tmp_path), report_to=[], max_steps=8, use_cpu=True)
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(8)]
    counted = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
    assert counted == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "resumes"), [(233, False), (0, True)])
def test_a_plain_trainer_says_whether_a_training_resumes(number: int, resumes: bool) -> None:
    """Peft saves no encoder of prompts, so that p-tuning does not."""
    assert (learning.not_resumable(axes.compose(5, number)) == "") is resumes
