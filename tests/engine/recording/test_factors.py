"""The identity of the two gradients of a LoRA layer, on layers alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from pytest_sftguard.engine.recording.factors import Factors

SIZES = st.integers(1, 6)


class Small(nn.Module):
    """An embedding, a convolution and a linear layer, one after the other, with a norm that is no product."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.out = nn.Embedding(12, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The logits, shape (rows, tokens, 5)."""
        return self.out(nn.functional.gelu(self.mix(self.words(ids).mT).mT))


def adapted(**config: object) -> nn.Module:
    """The model with LoRA on each layer, whose factors are all away from zero."""
    torch.manual_seed(0)
    model = get_peft_model(Small(), LoraConfig(target_modules=["words", "mix", "out"], r=3, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.requires_grad:
                parameter.normal_()
    return model


def gradients(model: nn.Module) -> Factors:
    """Train one step, and return what compares the factors."""
    ids = torch.randint(12, (4, 7), generator=torch.Generator().manual_seed(1))
    model(ids).square().sum().backward()
    return Factors(model, {n: p for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"use_rslora": True}, {"lora_dropout": 0.5}])
def test_any_layer_agrees(config: dict[str, object]) -> None:
    """Linear, convolution and embedding agree to rounding, for the variants of LoRA too."""
    model = adapted(**config)
    factors = gradients(model)
    found = factors.mismatch(factors.products(1).tolist())
    assert found is not None
    assert found.layer
    assert found.share < 1e-6
    assert not found.bounded


@examples(max_examples=40)
@given(
    factor=st.sampled_from(["lora_A", "lora_B"]), layer=st.sampled_from(["words", "mix", "out"]), size=st.floats(-3, 3)
)
def test_a_gradient_that_is_scaled_parts_them(factor: str, layer: str, size: float) -> None:
    """The layer whose factor has another gradient is named, unless the scale is 1."""
    model = adapted()
    factors = gradients(model)
    for name, parameter in model.named_parameters():
        if layer in name and factor in name.replace("lora_embedding", "lora") and parameter.grad is not None:
            parameter.grad *= size
    found = factors.mismatch(factors.products(1).tolist())
    assert found is not None
    if abs(size - 1) > 1e-3:
        assert layer in found.layer
        assert found.share > 1e-5


def test_a_step_between_is_not_looked_at() -> None:
    """After the first four come the eighth, and every sixteenth."""
    factors = gradients(adapted())
    assert [step for step in range(1, 50) if factors.products(step).numel()] == [1, 2, 3, 4, 8, 16, 32, 48]


def test_gradients_that_are_not_finite_are_not_compared() -> None:
    """They are somebody else's to report."""
    model = adapted()
    factors = gradients(model)
    next(p for n, p in model.named_parameters() if "lora_A" in n).grad[0] = float("nan")
    assert factors.mismatch(factors.products(1).tolist()) is None


def test_a_bound_on_elements_is_seen() -> None:
    """What several tensors have as their largest element, under hooks, is a bound."""
    model = adapted()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda g: g.clamp(-1e-2, 1e-2))
    factors = gradients(model)
    found = factors.mismatch(factors.products(1).tolist())
    assert found is not None
    assert found.bounded
