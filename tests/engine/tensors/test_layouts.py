"""Reductions of blocks equal those of each tensor alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pytest_sftguard.engine.recording.moments import Moments
from pytest_sftguard.engine.recording.recorder import Recorder
from pytest_sftguard.engine.tensors.layouts import Layout, joined, l2, largest, ordered, total

SHAPES = st.sampled_from([(2, 3), (3, 2), (6,), (1,), (), (4, 4), (0, 5), (5, 1, 2)])
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])


@st.composite
def tensors(draw: st.DrawFn) -> list[torch.Tensor]:
    """A few tensors of various shapes and types, some with numbers that are not finite."""
    made = []
    for shape, dtype in draw(st.lists(st.tuples(SHAPES, DTYPES), max_size=9)):
        numbers = draw(st.lists(st.floats(width=16), min_size=math.prod(shape), max_size=math.prod(shape)))
        made.append(torch.tensor(numbers, dtype=dtype).reshape(shape))
    return made


def reduced(layout: Layout, reduction: Any, *given: Any) -> list[float]:
    """The result for each tensor, in their order."""
    return ordered(layout.order, joined([reduction(rows) for rows in layout.blocks(*given)]).tolist())


@given(of=tensors(), data=st.data())
def test_blocks_reduce_like_their_tensors(of: list[torch.Tensor], data: st.DataObject) -> None:
    """Results have the order of the tensors, with zeros for those that are left out."""
    there = [i for i in range(len(of)) if data.draw(st.booleans())]
    layout = Layout(of)
    alone = [of[i].flatten().float() if i in there else torch.zeros(1) for i in range(len(of))]
    most = [t.abs().max().item() if t.numel() else 0.0 for t in alone]
    norms = [t.double().norm().item() for t in alone]
    given_there = ([of[i] for i in there], there)
    assert reduced(layout, largest, *given_there) == pytest.approx(most, nan_ok=True, abs=0, rel=0)
    assert reduced(layout, l2, *given_there) == pytest.approx(norms, nan_ok=True, rel=1e-6)


@given(of=tensors())
def test_copies_come_back(of: list[torch.Tensor]) -> None:
    """Tensors come back bit for bit, in the same order and shapes."""
    layout = Layout(of)
    for tensor, copy in zip(of, layout.tensors_of(layout.copies(of)), strict=True):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(
            copy.view(torch.uint8) if copy.dim() else copy.isnan(),
            tensor.view(torch.uint8) if tensor.dim() else tensor.isnan(),
        )


@given(of=tensors())
def test_a_sum_is_finite_only_where_all_is(of: list[torch.Tensor]) -> None:
    """Infinities of both signs do not cancel."""
    sums = [total(rows).item() for rows in Layout(of).blocks(of)]
    assert all(map(math.isfinite, sums)) == all(bool(t.isfinite().all()) for t in of)


def stepped(parameters: dict[str, nn.Parameter], **optimizer: Any) -> torch.optim.Optimizer:
    """An AdamW that has taken a step on every parameter but the last."""
    adam = torch.optim.AdamW(parameters.values(), **optimizer)
    for p in list(parameters.values())[:-1]:
        p.grad = torch.ones_like(p)
    adam.step()
    return adam


SHAPED = {"a": (2, 3), "b": (3, 2), "c": (4,), "d": (4,)}
BAD = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize(
    ("key", "stepped_on_all"), [("exp_avg", False), ("exp_avg_sq", False), ("step", False), ("exp_avg_sq", True)]
)
@pytest.mark.parametrize("bad", BAD)
def test_one_state_that_is_not_finite_is_named(key: str, stepped_on_all: bool, bad: float) -> None:
    """Any state is named, also while some parameters have none."""
    parameters = {n: nn.Parameter(torch.ones(s)) for n, s in SHAPED.items()}
    adam, moments = stepped(parameters), Moments(parameters)
    with torch.no_grad():
        assert all(map(math.isfinite, moments.finite(adam, stepped=stepped_on_all).tolist()))
        adam.state[parameters["b"]][key].view(-1)[0] = bad
        assert not all(map(math.isfinite, moments.finite(adam, stepped=stepped_on_all).tolist()))
    assert moments.nonfinite(adam).first == (f"b:{key}",)


@pytest.mark.parametrize(("key", "bad"), [*(("exp_avg", b) for b in BAD), ("step", math.nan)])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_what_is_left_out_shows_in_the_weights(key: str, bad: float, optimizer: Any, rate: float) -> None:
    """It reaches the weights in the next step, whatever the second moment and the learning rate are."""
    for second in (0.0, 1.0, math.inf):
        weight = nn.Parameter(torch.ones(2, 3))
        adam = optimizer([weight], lr=rate)
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            adam.step()
            with torch.no_grad():
                adam.state[weight][key].view(-1)[0] = bad
                adam.state[weight]["exp_avg_sq"].view(-1)[0] = second
        assert not weight.isfinite().all()


def test_other_optimizers_states_are_all_checked() -> None:
    """States are left out for the Adam family only."""
    weight = nn.Parameter(torch.ones(2))
    sgd, moments = torch.optim.SGD([weight], lr=0.1, momentum=0.9), Moments({"w": weight})
    weight.grad = torch.ones(2)
    sgd.step()
    with torch.no_grad():
        sgd.state[weight]["momentum_buffer"][0] = math.inf
        assert not all(map(math.isfinite, moments.finite(sgd, stepped=True).tolist()))


def test_replaced_states_are_checked() -> None:
    """Loading a checkpoint replaces every tensor."""
    parameters = {"a": nn.Parameter(torch.ones(2)), "b": nn.Parameter(torch.ones(2))}
    adam, moments = stepped(parameters), Moments(parameters)
    with torch.no_grad():
        moments.finite(adam, stepped=True)
        adam.state[parameters["a"]]["exp_avg_sq"] = torch.tensor([1.0, math.nan])
        assert not all(map(math.isfinite, moments.finite(adam, stepped=True).tolist()))


def test_a_model_that_changes_its_type_is_followed() -> None:
    """A step is measured in the present type of the parameters."""
    model = nn.Linear(2, 1, bias=False).to(torch.bfloat16)
    recorder = Recorder(model)
    model.float()
    model(torch.ones(1, 2)).sum().backward()
    recorder.before_step()
    with torch.no_grad():
        # bfloat16 would swallow it
        model.weight += 1e-6
    recorder.after_step(torch.optim.SGD(model.parameters(), lr=1.0), 1.0)
    assert recorder.steps[0].changed == 1
    assert 0 < (recorder.steps[0].max_update or 0) < 2e-6
