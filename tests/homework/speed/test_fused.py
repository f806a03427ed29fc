"""The fused paths compute what the model's own code computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPTNeoXConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm.modeling_glm import GlmRMSNorm
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from homework.speed.fused import fuse, losses, rotaries, rotated, token_losses, unfuse
from homework.speed.fused.rotary import _with_fused_path


def pair(**config: Any) -> tuple[nn.Module, nn.Module]:
    """The same adapted layer twice: peft's, and fused."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5, bias=config.pop("base_bias", False)))
    plain = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False, **config))
    ours = copy.deepcopy(plain)
    assert fuse(ours) == 1
    return plain, ours


@given(
    rank=st.integers(1, 4),
    alpha=st.integers(1, 9),
    shape=st.sampled_from([(3, 6), (2, 3, 6), (1, 0, 6)]),
    bias=st.booleans(),
    frozen_input=st.booleans(),
)
def test_a_fused_layer_is_pefts(rank: int, alpha: int, shape: tuple[int, ...], bias: bool, frozen_input: bool) -> None:
    """Result and gradients, in double precision to the last digits."""
    plain, ours = (m.double() for m in pair(r=rank, lora_alpha=alpha, base_bias=bias))
    seen = []
    for model in (plain, ours):
        x = torch.linspace(-1, 1, max(1, torch.Size(shape).numel()), dtype=torch.float64)
        x = x[: torch.Size(shape).numel()].reshape(shape).requires_grad_(not frozen_input)
        y = model(x)
        y.square().sum().backward()
        seen.append([y, *([] if frozen_input else [x.grad]), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_a_fused_layer_rounds_like_pefts(dtype: torch.dtype) -> None:
    """Within two roundings of the dtype, and the factors' gradients stay in float32."""
    plain, ours = pair(r=4, lora_alpha=8)
    results = []
    for model in (plain, ours):
        with torch.autocast("cpu", dtype=dtype):
            y = model(torch.linspace(-1, 1, 30).reshape(5, 6))
        y.float().square().sum().backward()
        assert y.dtype == dtype
        results.append([y.float(), *(p.grad for p in model.parameters() if p.requires_grad)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2 * torch.finfo(dtype).eps * b.norm()


def own_code_cases() -> dict[str, Any]:
    """Return the changes to a layer that need peft's own code."""
    return {
        "dropout": lambda m: setattr(
            m.base_model.model[0], "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.5)})
        ),
        "merged": lambda m: m.merge_adapter(),
        "disabled": lambda m: m.base_model.disable_adapter_layers(),
        "hooked": lambda m: m.base_model.model[0].lora_A["default"].register_forward_hook(lambda *a: a[2] * 0 + 7),
        "trainable base": lambda m: m.base_model.model[0].base_layer.requires_grad_(True),
        "base in half precision": lambda m: m.base_model.model[0].base_layer.bfloat16(),
    }


@pytest.mark.parametrize("what", own_code_cases())
def test_more_than_two_products_takes_pefts_own_code(what: str) -> None:
    """Bit for bit, random numbers included."""
    plain, ours = pair(r=4, lora_alpha=8)
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    results = []
    for model in (plain, ours):
        own_code_cases()[what](model)
        torch.manual_seed(1)
        results.append(model(x.bfloat16() if "half" in what else x))
    assert torch.equal(*results)


def test_a_trainable_bias_gets_its_gradient() -> None:
    """Peft can train the biases of frozen layers."""
    gradients = []
    for model in pair(r=4, lora_alpha=8, base_bias=True, bias="all"):
        model(torch.linspace(-1, 1, 18).reshape(3, 6)).square().sum().backward()
        gradients.append(model.base_model.model[0].base_layer.bias.grad)  # type: ignore[union-attr]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


def test_what_reads_the_frozen_layers_result_gets_it() -> None:
    """A hook on the frozen layer sees its result, without the adapter's, also later."""
    _, ours = pair(r=4, lora_alpha=8)
    kept: list[Tensor] = []
    layer: Any = ours.base_model.model[0]  # type: ignore[union-attr]
    layer.base_layer.register_forward_hook(lambda module, given, result: kept.append(result))
    x = torch.linspace(-1, 1, 18).reshape(3, 6)
    ours(x)
    assert torch.equal(kept[0], nn.functional.linear(x, layer.base_layer.weight))


def norms(size: int) -> dict[str, nn.Module]:
    """RMS norms of several models, their weights drawn and frozen."""
    made = {"llama": LlamaRMSNorm(size, 1e-5), "qwen3": Qwen3RMSNorm(size, 1e-6), "torch": nn.RMSNorm(size, eps=1e-3)}
    for module in made.values():
        module.weight.data = torch.randn(size)  # type: ignore[operator]
        module.requires_grad_(False)
    return made


@given(
    family=st.sampled_from(["llama", "qwen3", "torch"]),
    size=st.integers(1, 40),
    rows=st.integers(0, 5),
    scale=st.sampled_from([1e-6, 1e-2, 1.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_a_fused_norm_is_the_norm(family: str, size: int, rows: int, scale: float, seed: int) -> None:
    """Result and gradient, in float32, are as near the double-precision ones as float32 is."""
    torch.manual_seed(seed)
    plain = norms(size)[family]
    ours = copy.deepcopy(plain)
    assert fuse(ours) == 1
    x, gradient = torch.randn(2, rows, size) * scale, torch.randn(2, rows, size)
    weight, eps = plain.weight.double(), getattr(plain, "variance_epsilon", getattr(plain, "eps", None))
    seen = []
    for norm, dtype in (
        (ours, torch.float32),
        (lambda y: nn.functional.rms_norm(y, (size,), weight, eps), torch.double),
    ):
        y = x.to(dtype, copy=True).requires_grad_()
        result = norm(y)
        result.backward(gradient.to(dtype))
        seen.append((result.double(), y.grad.double()))
    inverse = (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    # the gradient is a difference of two terms of this size, which may cancel
    largest = (weight * gradient * inverse).norm()
    for a, b, size_of_terms in zip(*seen, (seen[1][0].norm(), largest), strict=True):
        assert (a - b).norm() <= 3e-6 * size_of_terms


def other_norms() -> dict[str, nn.Module]:
    """Return norms that are no plain frozen RMS norm, or have a hook."""
    learning, hooked, half = norms(8)["llama"], norms(8)["llama"], norms(8)["llama"]
    learning.requires_grad_(True)
    hooked.register_forward_hook(lambda module, given, result: result * 7)
    gemma = Gemma2RMSNorm(8)
    gemma.weight.data = torch.randn(8)
    return {
        "learning": learning,
        "hooked": hooked,
        "half": half.bfloat16(),
        "gemma2": gemma.requires_grad_(False),
        "layer norm": nn.LayerNorm(8).requires_grad_(False),
    }


@pytest.mark.parametrize("family", other_norms())
def test_any_other_norm_takes_its_own_code(family: str) -> None:
    """Bit for bit, and a trainable weight gets its gradient."""
    torch.manual_seed(0)
    plain = other_norms()[family]
    ours = copy.deepcopy(plain)
    fuse(ours)
    x = torch.linspace(-2, 3, 24).reshape(3, 8).to(plain.weight.dtype)
    results = [module(x) for module in (plain, ours)]
    assert torch.equal(*results)
    if family == "learning":
        results[1].sum().backward()
        assert ours.weight.grad is not None


def test_unfusing_gives_layers_their_own_code_back() -> None:
    """Layers and norms have their own classes again."""
    plain, ours = pair(r=4, lora_alpha=8)
    both = nn.ModuleList([ours, norms(8)["qwen3"]])
    fuse(both)
    unfuse(both)
    classes = [type(m) for m in nn.ModuleList([plain, norms(8)["qwen3"]]).modules()]
    assert [type(m) for m in both.modules()] == classes


@given(
    tokens=st.integers(0, 9),
    words=st.integers(1, 12),
    block=st.integers(1, 60),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.1, 1.0, 30.0, 1e4]),
)
def test_token_losses_are_the_cross_entropy(tokens: int, words: int, block: int, seed: int, scale: float) -> None:
    """Losses and gradients, whatever the size of a block."""
    torch.manual_seed(seed)
    logits, targets = torch.randn(tokens, words) * scale, torch.randint(words, (tokens,))
    weights = torch.rand(tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_BLOCK", block)
        ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        a, b = token_losses(ours, targets), nn.functional.cross_entropy(plain, targets, reduction="none")
        (a * weights).sum().backward()
    (b * weights).sum().backward()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * max(1, scale))
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_token_losses_of_half_precision_are_computed_in_float32(dtype: torch.dtype) -> None:
    """As transformers computes them, which casts all logits first; gradients have the dtype of the logits."""
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(50, 33)).to(dtype), torch.randint(33, (50,))
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    a, b = token_losses(ours, targets), nn.functional.cross_entropy(plain.float(), targets, reduction="none")
    a.mean().backward()
    b.mean().backward()
    assert a.dtype == torch.float32
    assert ours.grad is not None
    assert plain.grad is not None
    assert ours.grad.dtype == dtype
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
def test_token_losses_hide_no_non_finite_number(planted: float) -> None:
    """NaN and infinity among the logits give NaN, in the loss of that token and in its gradient alone."""
    logits = torch.zeros(3, 5)
    logits[1, 2] = planted
    logits.requires_grad_()
    found = token_losses(logits, torch.tensor([0, 1, 2]))
    found.sum().backward()
    assert not found[1].isfinite()
    assert found[[0, 2]].isfinite().all()
    assert logits.grad is not None
    assert logits.grad[1].isnan().any()
    assert logits.grad[[0, 2]].isfinite().all()


@given(
    heads=st.integers(1, 3),
    tokens=st.integers(1, 5),
    half=st.integers(1, 4),
    dtype=st.sampled_from(["32", "64"]),
    seed=st.integers(0, 99),
)
def test_fused_rotary_embeddings_are_the_models(heads: int, tokens: int, half: int, dtype: str, seed: int) -> None:
    """Results and gradients of queries and keys, whose heads are interleaved as in the layout of projections."""
    torch.manual_seed(seed)
    wide = getattr(torch, f"float{dtype}")
    [(_, ours)] = rotaries(LlamaRMSNorm(8))
    cos, sin = torch.randn(2, 1, tokens, 2 * half, dtype=wide)
    given = [torch.randn(1, tokens, n, 2 * half, dtype=wide).requires_grad_() for n in (heads, 1)]
    weights = [torch.randn(1, n, tokens, 2 * half, dtype=wide) for n in (heads, 1)]
    seen = []
    for rotary in (ours, modeling_llama.apply_rotary_pos_emb):
        results = rotary(*(x.transpose(1, 2) for x in given), cos, sin)
        total = sum((r * w).sum() for r, w in zip(results, weights, strict=True))
        seen.append([*results, *torch.autograd.grad(total, given)])
    tolerance = 1e-6 if dtype == "32" else 1e-12
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_under_autocast_rotary_embeddings_keep_their_dtypes() -> None:
    """Queries in bfloat16, angles in float32: results as the model's, gradients in the dtype of the queries."""
    torch.manual_seed(0)
    [(_, ours)] = rotaries(LlamaRMSNorm(8))
    cos, sin = torch.randn(2, 1, 5, 8)
    seen = []
    for rotary in (ours, modeling_llama.apply_rotary_pos_emb):
        q = torch.linspace(-1, 1, 80).view(1, 2, 5, 8).bfloat16().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result, _ = rotary(q, q[:, :1], cos, sin)
        result.square().sum().backward()
        seen.append((result, q.grad))
    for a, b in zip(*seen, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).float().norm() <= torch.finfo(torch.bfloat16).eps * b.float().norm()


def test_other_rotary_embeddings_take_their_own_code() -> None:
    """Interleaved pairs, and results in the dtype of the heads where angles are wider."""
    assert rotaries(GlmRMSNorm(8)) == []
    assert rotaries(Olmo2RMSNorm(8)) == []


@pytest.mark.parametrize("call", ["in part", "by name", "trainable", "without keys"])
def test_any_other_call_takes_the_models_own_code(call: str) -> None:
    """Partly rotated heads, arguments by name, trainable angles, queries alone."""
    torch.manual_seed(0)
    [(home, _)] = rotaries(GPTNeoXRotaryEmbedding(GPTNeoXConfig()))
    called: list[int] = []
    plain = home.apply_rotary_pos_emb
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
    cos, sin = torch.randn(2, 1, 5, 4 if call == "in part" else 8)
    if call == "trainable":
        cos.requires_grad_()
    named = {"unsqueeze_dim": 1} if call == "by name" else {}
    given = (q, None if call == "without keys" else k, cos, sin)

    def counted(*args: Any, **more: Any) -> Any:
        called.append(1)
        return args if call == "without keys" else plain(*args, **more)

    results = _with_fused_path(counted)(*given, **named)
    assert called
    if call != "without keys":
        for a, b in zip(results, plain(*given, **named), strict=True):
            assert torch.equal(a, b)


def test_a_models_module_is_left_as_it_was() -> None:
    """Also where a forward pass raises."""
    plain = modeling_llama.apply_rotary_pos_emb

    def training() -> None:
        with rotated(rotaries(LlamaRMSNorm(8))):
            assert modeling_llama.apply_rotary_pos_emb is not plain
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        training()
    assert modeling_llama.apply_rotary_pos_emb is plain


def test_a_function_that_somebody_else_put_there_stays() -> None:
    """Before and within a forward pass, and two trainings at once leave nothing behind."""
    plain, places = modeling_llama.apply_rotary_pos_emb, rotaries(LlamaRMSNorm(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *given: None)
        theirs = modeling_llama.apply_rotary_pos_emb
        with rotated(places):
            assert modeling_llama.apply_rotary_pos_emb is theirs
        assert modeling_llama.apply_rotary_pos_emb is theirs
    one, other = rotated(places), rotated(rotaries(LlamaRMSNorm(8)))
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    other.__exit__(None, None, None)
    assert modeling_llama.apply_rotary_pos_emb is plain
