"""Forward passes outside the training: in which type a model computes, and that it is left as it was."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Wav2Vec2Config, Wav2Vec2ForCTC

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.models import tiny
from pytest_sftguard.precision import mode_named

MODE = mode_named("bf16-true")
IDS = torch.arange(3, 23)[None]


def half() -> Any:
    """A model in bfloat16, whose rotary frequencies stay in float32."""
    torch.manual_seed(0)
    return tiny.in_dtype(LlamaForCausalLM(tiny.llama(64, 0.1)), torch.bfloat16).eval()


def replaced(model: Any) -> Any:
    """`model` with a forward method that calls its first one, as a library's fused head does."""
    first = model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return first(*args, **kwargs)

    model.forward = types.MethodType(forward, model)
    return model


def logits(model: Any) -> torch.Tensor:
    """Its answer to one row."""
    with torch.no_grad():
        return forwards.main_output(model(input_ids=IDS))


@pytest.mark.parametrize("prepare", [lambda model: model, replaced], ids=["as-made", "forward-replaced"])
def test_a_model_in_half_precision_computes_in_float32(prepare: Any) -> None:
    """Whoever has replaced its forward method: its logits are those of the same weights in float32."""
    model, wanted = prepare(half()), logits(half().float())
    with forwards.widened(model, MODE) as arithmetic:
        found = logits(model)
    assert arithmetic == "float32"
    assert torch.equal(found, wanted)


def test_inputs_are_widened_with_the_weights() -> None:
    """Whatever holds them; ids and numbers of other types stay."""
    ids, picture = torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2, dtype=torch.bfloat16)
    found = forwards.in_float32({"input_ids": ids, "pictures": [picture], "flag": True})
    assert found["input_ids"] is ids
    assert found["pictures"][0].dtype == torch.float32
    assert found["flag"] is True


def test_a_model_without_tokens_has_no_embeddings() -> None:
    """Those of transformers have a method that raises."""
    config = Wav2Vec2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with torch.device("meta"):
        model = Wav2Vec2ForCTC(config)
    assert forwards.embeddings(model) is None
    assert forwards.embeddings(torch.nn.Linear(2, 2), "output") is None


def test_a_padding_id_beyond_the_vocabulary_is_not_used() -> None:
    """Configurations of several models in one declare ids of a vocabulary that this model need not have."""
    model = half()
    model.config.pad_token_id = 5
    assert forwards.padding_id(model) == 5
    model.config.pad_token_id = 128_002
    assert forwards.padding_id(model) == 0


def test_a_widened_model_is_left_as_it_was() -> None:
    """Its tensors are the same objects with the same memory, also where something raises within."""
    model = half()
    before = [(p, p.data_ptr(), p.dtype) for p in (*model.parameters(), *model.buffers())]
    with pytest.raises(RuntimeError), forwards.widened(model, MODE):
        raise RuntimeError
    assert [(p, p.data_ptr(), p.dtype) for p, _, _ in before] == before
    assert model.config.dtype == torch.bfloat16
