"""The attention that a CUDA device computes with a fused kernel, and the attention that it computes plainly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_sftguard.engine.memory.attention import as_on_cuda, fused

HALF, WIDE = torch.float16, torch.float32


@pytest.mark.parametrize(
    ("dtype", "masked", "grouped", "capability", "head", "expected"),
    [
        (HALF, False, True, (8, 0), 64, True),
        (torch.bfloat16, False, True, (9, 0), 64, True),
        (HALF, False, True, (7, 5), 64, False),
        (torch.bfloat16, False, False, (7, 5), 64, False),
        (HALF, False, False, (7, 5), 64, True),
        (WIDE, False, True, (9, 0), 64, False),
        (WIDE, False, False, (9, 0), 64, True),
        (WIDE, True, False, (8, 0), 64, True),
        (HALF, True, False, (8, 0), 64, True),
        (HALF, True, True, (8, 0), 64, False),
        (HALF, False, True, (8, 0), 512, False),
        (WIDE, False, False, (8, 0), 30, False),
        (WIDE, False, False, (7, 0), 30, True),
        (torch.float64, False, False, (9, 0), 64, False),
    ],
)
def test_a_fused_kernel_takes_it(
    dtype: torch.dtype, masked: bool, grouped: bool, capability: tuple[int, int], head: int, expected: bool
) -> None:
    """Flash attention takes half precision; the memory-efficient kernel masks and float32, but no grouped heads."""
    heads = torch.empty(1, 2, 3, head)
    found = fused(heads, heads, dtype=dtype, masked=masked, grouped=grouped, capability=capability)
    assert found is expected


class Seen(TorchDispatchMode):
    """Collects the names of the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name())
        return func(*args, **kwargs or {})


@pytest.fixture
def heads() -> tuple[Tensor, Tensor]:
    """Four heads of queries and two of keys."""
    return torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)


@pytest.mark.parametrize(("autocast", "plainly"), [(False, True), (True, False)])
def test_attention_is_plain_where_the_device_computes_it_plainly(
    heads: tuple[Tensor, Tensor], autocast: bool, plainly: bool
) -> None:
    """Grouped heads in float32 are computed plainly, unless autocast makes them half precision."""
    query, key = heads
    with Seen() as seen, as_on_cuda((8, 0)), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    assert any("softmax" in name for name in seen.names) is plainly
    expected = functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.02)


def test_one_key_for_all_queries_that_nobody_declares_is_computed_plainly(heads: tuple[Tensor, Tensor]) -> None:
    """Broadcasting works without `enable_gqa`, and no fused kernel supports it."""
    query, key = (t.half() for t in heads)
    with Seen() as seen, as_on_cuda((8, 0)):
        functional.scaled_dot_product_attention(query, key[:, :1], key[:, :1])
    assert any("softmax" in name for name in seen.names)


def test_torch_has_its_attention_back() -> None:
    """The function is restored, also after an exception."""
    original = functional.scaled_dot_product_attention

    def fail() -> None:
        assert functional.scaled_dot_product_attention is not original
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), as_on_cuda((8, 0)):
        fail()
    assert functional.scaled_dot_product_attention is original
