"""Attention over unpadded tokens is that of each row alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from homework.speed.packing import CannotPackError, Rows, bucket_padding
from homework.speed.packing.attention import ROWS, attend

TRAINING: Any = SimpleNamespace(training=True)


def heads_of(rows: Rows, queries: int, keys: int, size: int = 4) -> tuple[Tensor, ...]:
    """Return random queries, keys and values of all tokens, in the layout of a model's projections."""
    tokens = len(rows.places)
    return tuple(torch.randn(1, tokens, n, size).transpose(1, 2).requires_grad_() for n in (queries, keys, keys))


def attended(rows: Rows, *given: Tensor, **more: Any) -> Tensor:
    """Return the result of the app's attention, shape (1, tokens, heads, size)."""
    token = ROWS.set(rows)
    try:
        return attend(TRAINING, *given, None, **more)[0]
    finally:
        ROWS.reset(token)


# padding in front, tokens, padding behind
masks = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4)


def mask_of(rows: list[tuple[int, int, int]]) -> Tensor:
    """Return an attention mask, rows padded on the right to the longest."""
    width = max(map(sum, rows))
    return torch.tensor([[0] * a + [1] * n + [0] * (width - a - n) for a, n, _ in rows])


@given(rows=masks, keys=st.integers(1, 3), groups=st.integers(1, 3), bucketed=st.booleans(), seed=st.integers(0, 99))
def test_each_token_attends_to_its_row_alone(
    rows: list[tuple[int, int, int]], keys: int, groups: int, bucketed: bool, seed: int
) -> None:
    """Results and gradients are those of torch's attention on each row, wherever its padding is."""
    torch.manual_seed(seed)
    where = Rows.of(mask_of(rows), bucketed=bucketed)
    given = heads_of(where, keys * groups, keys)
    result = attended(where, *given)
    weights = torch.randn_like(result)
    ours = torch.autograd.grad((result * weights).sum(), given)
    total = sum(n for _, n, _ in rows)
    assert result.isfinite().all()
    assert not any(grad[:, :, total:].count_nonzero() for grad in ours)
    result, weights, ours = result[:, :total], weights[:, :total], tuple(grad[:, :, :total] for grad in ours)
    alone, begin = [], 0
    for _, tokens, _ in rows:
        q, k, v = (x[:, :, begin : begin + tokens] for x in given)
        row = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        alone.append(row.transpose(1, 2))
        begin += tokens
    expected = torch.cat(alone, dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), given), strict=True):
        torch.testing.assert_close(a, b[:, :, :total], rtol=1e-4, atol=1e-5)


@given(rows=masks)
def test_padding_fills_a_micro_batch_up_to_its_bucket(rows: list[tuple[int, int, int]]) -> None:
    """Every token once and in order, then places of padding, each once, while there are any."""
    mask = mask_of(rows)
    plain, filled = Rows.of(mask).places.tolist(), Rows.of(mask, bucketed=True).places.tolist()
    assert filled[: len(plain)] == plain
    more = filled[len(plain) :]
    assert len(set(filled)) == len(filled)
    assert not mask.flatten()[more].any()
    assert len(more) == min(bucket_padding(len(plain)), mask.numel() - len(plain))


@given(rows=masks)
def test_each_padding_of_a_bucket_is_a_row_of_its_own(rows: list[tuple[int, int, int]]) -> None:
    """Its position is 0, so that no padding is taken for the continuation of a row."""
    mask = mask_of(rows)
    plain, filled = (Rows.of(mask, bucketed=bucketed).positions()[0].tolist() for bucketed in (False, True))
    assert plain == [column for row in mask.tolist() for column, token in enumerate(row) if token]
    assert filled == plain + [0] * (len(filled) - len(plain))


@given(least=st.integers(128, 4096))
def test_there_are_few_buckets(least: int) -> None:
    """A dozen from a size to its one and a half, and none adds more than a sixteenth."""
    counts = range(least, least * 3 // 2)
    assert all(0 <= bucket_padding(n) <= n / 16 for n in counts)
    assert len({n + bucket_padding(n) for n in counts}) <= 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("front", [0, 2])
def test_half_precision_stays_finite_at_padding(dtype: torch.dtype, front: int) -> None:
    """A place that may attend to nothing holds no token, and its numbers reach none."""
    torch.manual_seed(0)
    where = Rows.of(mask_of([(front, 3, 0), (0, 6, 0)]))
    given = heads_of(where, 4, 2)
    with torch.autocast("cpu", dtype=dtype):
        result = attended(where, *(30 * x for x in given))
    result.float().square().sum().backward()
    assert result.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in given)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_hand_written_derivative_is_autograds(dropout: float) -> None:
    """With dropout and without, for the same random numbers."""
    torch.manual_seed(0)
    where = Rows.of(mask_of([(0, 3, 0), (0, 5, 0)]))
    given = heads_of(where, 4, 2)
    heads = where.heads(4, 2, torch.float32)
    torch.manual_seed(1)
    ours = attended(where, *given, dropout=dropout)
    torch.manual_seed(1)
    q, k, v = (heads.block(x) for x in given)
    weights = torch.baddbmm(heads.bias, q, k.transpose(1, 2), alpha=0.5).softmax(-1)
    if dropout:
        weights = torch.native_dropout(weights, dropout, True)[0]
    plain = heads.flat(weights @ v, torch.float32).transpose(1, 2)
    assert torch.equal(ours, plain)
    for a, b in zip(*(torch.autograd.grad(r.square().sum(), given) for r in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}]
)
def test_other_attention_is_refused(more: dict[str, Any]) -> None:
    """By the name of the argument, which is not ignored."""
    where = Rows.of(mask_of([(0, 3, 0)]))
    with pytest.raises(CannotPackError, match="attention with"):
        attended(where, *heads_of(where, 4, 2), **more)
