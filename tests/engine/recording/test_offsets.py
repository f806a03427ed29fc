"""Losses that are the model's own and a number: read off the graph of autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pytest_sftguard.engine.recording.offsets import only_offset

FIXED = torch.tensor(0.3)


@pytest.mark.parametrize(
    ("change", "offset"),
    [
        (lambda loss, weight: loss, True),
        (lambda loss, weight: loss + 0.5, True),
        (lambda loss, weight: FIXED + loss, True),
        (lambda loss, weight: loss - FIXED + FIXED.double(), True),
        (lambda loss, weight: (loss + weight.detach().sum()).float(), True),
        (lambda loss, weight: FIXED - loss, False),
        (lambda loss, weight: torch.add(FIXED, loss, alpha=2), False),
        (lambda loss, weight: loss * 1 + 0.5, True),
        (lambda loss, weight: loss * 1.5 + 0.5, False),
        (lambda loss, weight: loss + 0.0 * weight.sum(), False),
        (lambda loss, weight: loss + loss, False),
        (lambda loss, weight: weight.square().mean() + 0.5, False),
        (lambda loss, weight: loss.detach(), False),
        (lambda loss, weight: loss.expand(2), False),
        (lambda loss, weight: 0.5, False),
    ],
)
def test_an_offset_is_told_from_other_changes(change: Callable[[Tensor, Tensor], object], offset: bool) -> None:
    """What weights enter by another path, and any factor, is no offset."""
    weight = torch.randn(4, requires_grad=True)
    own = weight.square().mean()
    assert only_offset(change(own, weight), own.grad_fn) is offset


def test_a_loss_that_is_changed_in_place_is_followed() -> None:
    """The graph is that of the time at which the model returned its loss."""
    weight = torch.randn(4, requires_grad=True)
    own = weight.square().mean()
    node = own.grad_fn
    own += 0.5
    assert only_offset(own, node)
    own *= 2
    assert not only_offset(own, node)
