"""Attention of tokens in one line is that of their rows, each alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from homework.speed.packing import CannotPackError, Rows, missing
from homework.speed.packing.attention import ROWS, attend

TRAINING: Any = SimpleNamespace(training=True)


def lines(rows: Rows, queries: int, keys: int, size: int = 4) -> tuple[Tensor, ...]:
    """Queries, keys and values of all tokens, as a model's projections leave them."""
    tokens = len(rows.places)
    return tuple(torch.randn(1, tokens, n, size).transpose(1, 2).requires_grad_() for n in (queries, keys, keys))


def in_line(rows: Rows, *given: Tensor, **more: Any) -> Tensor:
    """What the app's attention gives, shape (1, tokens, heads, size)."""
    token = ROWS.set(rows)
    try:
        return attend(TRAINING, *given, None, **more)[0]
    finally:
        ROWS.reset(token)


masks = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=4
)  # padding in front, tokens, padding behind


def mask_of(rows: list[tuple[int, int, int]]) -> Tensor:
    """An attention mask, rows padded behind to the longest."""
    width = max(map(sum, rows))
    return torch.tensor([[0] * a + [1] * n + [0] * (width - a - n) for a, n, _ in rows])


@given(rows=masks, keys=st.integers(1, 3), groups=st.integers(1, 3), like_sizes=st.booleans(), seed=st.integers(0, 99))
def test_each_token_looks_at_its_row_alone(
    rows: list[tuple[int, int, int]], keys: int, groups: int, like_sizes: bool, seed: int
) -> None:
    """Results and gradients are those of torch's attention on each row, wherever its padding is, and along with it."""
    torch.manual_seed(seed)
    where = Rows.of(mask_of(rows), like_sizes=like_sizes)
    given = lines(where, keys * groups, keys)
    result = in_line(where, *given)
    weights = torch.randn_like(result)
    ours = torch.autograd.grad((result * weights).sum(), given)
    total = sum(n for _, n, _ in rows)
    assert result.isfinite().all()
    assert not any(of[:, :, total:].count_nonzero() for of in ours)
    result, weights, ours = result[:, :total], weights[:, :total], tuple(of[:, :, :total] for of in ours)
    alone, begin = [], 0
    for _, tokens, _ in rows:
        q, k, v = (line[:, :, begin : begin + tokens] for line in given)
        row = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        alone.append(row.transpose(1, 2))
        begin += tokens
    expected = torch.cat(alone, dim=1)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(ours, torch.autograd.grad((expected * weights).sum(), given), strict=True):
        torch.testing.assert_close(a, b[:, :, :total], rtol=1e-4, atol=1e-5)


@given(rows=masks)
def test_padding_fills_a_line_up_to_a_size_that_others_have(rows: list[tuple[int, int, int]]) -> None:
    """Every token once and in its order, then places without one, each once, as far as there are any."""
    mask = mask_of(rows)
    plain, filled = Rows.of(mask).places.tolist(), Rows.of(mask, like_sizes=True).places.tolist()
    assert filled[: len(plain)] == plain
    more = filled[len(plain) :]
    assert len(set(filled)) == len(filled)
    assert not mask.flatten()[more].any()
    assert len(more) == min(missing(len(plain)), mask.numel() - len(plain))


@given(rows=masks)
def test_padding_in_a_line_is_a_row_of_its_own(rows: list[tuple[int, int, int]]) -> None:
    """Its positions begin again at every place, so that nobody takes it for what a row goes on with."""
    mask = mask_of(rows)
    plain, filled = (Rows.of(mask, like_sizes=like_sizes).positions()[0].tolist() for like_sizes in (False, True))
    assert plain == [column for row in mask.tolist() for column, token in enumerate(row) if token]
    assert filled == plain + [0] * (len(filled) - len(plain))


@given(least=st.integers(128, 4096))
def test_sizes_that_differ_by_a_half_are_a_dozen(least: int) -> None:
    """And none is more than a sixteenth above what was asked for."""
    counts = range(least, least * 3 // 2)
    assert all(0 <= missing(n) <= n / 16 for n in counts)
    assert len({n + missing(n) for n in counts}) <= 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("front", [0, 2])
def test_half_precision_stays_finite_where_no_token_is(dtype: torch.dtype, front: int) -> None:
    """A place that may look at nothing is no token's, and its numbers reach none."""
    torch.manual_seed(0)
    where = Rows.of(mask_of([(front, 3, 0), (0, 6, 0)]))
    given = lines(where, 4, 2)
    with torch.autocast("cpu", dtype=dtype):
        result = in_line(where, *(30 * line for line in given))
    result.float().square().sum().backward()
    assert result.isfinite().all()
    assert all(line.grad is not None and line.grad.isfinite().all() for line in given)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_short_graph_is_torchs(dropout: float) -> None:
    """The hand-written derivative is the one that torch works out, with the same random numbers."""
    torch.manual_seed(0)
    where = Rows.of(mask_of([(0, 3, 0), (0, 5, 0)]))
    given = lines(where, 4, 2)
    heads = where.heads(4, 2, torch.float32)
    torch.manual_seed(1)
    ours = in_line(where, *given, dropout=dropout)
    torch.manual_seed(1)
    q, k, v = (heads.block(line) for line in given)
    weights = torch.baddbmm(heads.bias, q, k.transpose(1, 2), alpha=0.5).softmax(-1)
    if dropout:
        weights = torch.native_dropout(weights, dropout, True)[0]
    plain = heads.line(weights @ v, torch.float32).transpose(1, 2)
    assert torch.equal(ours, plain)
    for a, b in zip(*(torch.autograd.grad(r.square().sum(), given) for r in (ours, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "more", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}]
)
def test_what_it_does_not_know_is_refused(more: dict[str, Any]) -> None:
    """By its name, and not ignored."""
    where = Rows.of(mask_of([(0, 3, 0)]))
    with pytest.raises(CannotPackError, match="attention with"):
        in_line(where, *lines(where, 4, 2), **more)
