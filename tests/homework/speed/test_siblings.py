"""Layers that take the same input compute together, and each gives what it would give alone."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from homework.speed.fused import fuse, join_siblings, siblings, unfuse
from homework.speed.fused.siblings import find_siblings, join

NAMES = "qkv"


def plain() -> Any:
    """Return three adapted layers of one parent with peft's own code; each has another rank and another scaling."""
    torch.manual_seed(0)
    base = nn.ModuleDict(
        {name: nn.Linear(6, out, bias=name == "k") for name, out in zip(NAMES, (5, 3, 4), strict=True)}
    )
    patterns = {"rank_pattern": {"k": 2, "v": 3}, "alpha_pattern": {"v": 5}}
    return get_peft_model(
        base, LoraConfig(r=4, target_modules=[*NAMES], lora_alpha=8, init_lora_weights=False, **patterns)
    )


def layers_of(model: Any) -> Any:
    """Its three layers by name."""
    return model.base_model.model


def joined(model: Any) -> Any:
    """Return a copy whose layers compute together."""
    ours = copy.deepcopy(model)
    fuse(ours)
    join(layers_of(ours).values())
    return ours


def batch(requires_grad: bool = False) -> Tensor:
    """Return an input of shape (5, 6) that is not a leaf."""
    return torch.linspace(-1, 1, 30).reshape(5, 6).requires_grad_(requires_grad) * 1


def together(results: list[Tensor]) -> int:
    """Return how many groups of results were computed together."""
    return len({result.grad_fn for result in results})


@given(
    order=st.permutations(NAMES),
    called=st.integers(1, 3),
    shape=st.sampled_from([(3, 6), (2, 3, 6), (1, 0, 6)]),
    frozen_input=st.booleans(),
)
def test_siblings_are_pefts_layers(order: list[str], called: int, shape: tuple[int, ...], frozen_input: bool) -> None:
    """In whatever order, also where one is not called at all: results and gradients in double precision."""
    model = plain().double()
    seen: list[list[Any]] = []
    for layers in (model, joined(model)):
        x = torch.linspace(-1, 1, 36, dtype=torch.float64)[: torch.Size(shape).numel()].reshape(shape)
        x.requires_grad_(not frozen_input)
        results = [layers_of(layers)[name](x) for name in order[:called]]
        sum(result.square().sum() for result in results).backward()  # type: ignore[union-attr]
        seen.append([*results, x.grad, *(p.grad for p in layers.parameters())])
    for a, b in zip(*seen, strict=True):
        # an optimizer would make a step with zeros, and makes none with None
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_they_are_computed_together() -> None:
    """By the first of them that is called."""
    layers, x = layers_of(joined(plain())), batch()
    assert together([layers[name](x) for name in NAMES]) == 1
    assert together([layers[name](x) for name in "kqv"]) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_siblings_share_the_cast_of_their_input(dtype: torch.dtype) -> None:
    """Their gradients meet in the dtype of the products, within three roundings of what peft's layers give."""
    model = plain()
    gradients = []
    for layers in (model, joined(model)):
        x = torch.linspace(-1, 1, 30).reshape(5, 6).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            results = [layers_of(layers)[name](x) for name in NAMES]
        assert {result.dtype for result in results} == {dtype}
        sum(result.float().square().sum() for result in results).backward()
        gradients.append(x.grad)
    a, b = gradients
    assert a.dtype == torch.float32
    assert (a - b).norm() <= 3 * torch.finfo(dtype).eps * b.norm()


def test_results_can_be_written_over() -> None:
    """As those of any layer: by in-place activations, and by in-place sums."""
    model = plain()
    gradients = []
    for layers in (model, joined(model)):
        x = torch.linspace(-1, 1, 30).reshape(5, 6).requires_grad_()
        results = [layers_of(layers)[name](x) for name in NAMES]
        results[1].relu_()
        results[2].mul_(3.0)
        sum(result.square().sum() for result in results).backward()  # type: ignore[union-attr]
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def changes() -> dict[str, Any]:
    """Return changes between the calls of two siblings that make the results of the first call stale."""

    def quietly(change: Any) -> Any:
        with torch.no_grad():
            return change()

    return {
        "the input": lambda layers, x: quietly(lambda: x.mul_(-1)),
        "a factor": lambda layers, x: quietly(lambda: layers["k"].lora_A["default"].weight.mul_(-1)),
        "a frozen weight": lambda layers, x: quietly(lambda: layers["k"].base_layer.weight.mul_(-1)),
        "a factor that is another": lambda layers, x: setattr(
            layers["k"].lora_B["default"], "weight", nn.Parameter(torch.ones(3, 2))
        ),
        "a scaling": lambda layers, x: layers["k"].set_scale("default", 3.0),
        "an active adapter": lambda layers, x: layers["k"].enable_adapters(False),
        "a hook": lambda layers, x: layers["k"].base_layer.register_forward_hook(lambda *a: a[2] * 7),
    }


@pytest.mark.parametrize("what", changes())
def test_a_change_between_two_calls_is_noticed(what: str) -> None:
    """A waiting result is one of the tensors of its time."""
    model = plain()
    results = []
    for layers in (layers_of(model), layers_of(joined(model))):
        x = batch()
        layers["q"](x)
        changes()[what](layers, x)
        results.append(layers["k"](x))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["dropout", "merged", "disabled", "hooked", "own forward"])
def test_a_layer_that_does_more_than_its_sum_computes_alone(what: str) -> None:
    """The others still compute together, and it is called as before."""
    ours = joined(plain())
    layers, x = layers_of(ours), batch()
    middle = layers["k"]
    {
        "dropout": lambda: setattr(middle, "lora_dropout", nn.ModuleDict({"default": nn.Dropout(0.5)})),
        "merged": lambda: middle.merge(),
        "disabled": lambda: middle.enable_adapters(False),
        "hooked": lambda: middle.lora_A["default"].register_forward_hook(lambda *a: a[2] * 7),
        "own forward": lambda: setattr(middle, "forward", lambda x: x.sum()),
    }[what]()
    results = [layers[name](x) for name in NAMES]
    assert together([results[0], results[2]]) == 1
    assert together(results) == 2
    if what == "own forward":
        assert torch.equal(results[1], x.sum())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_results_without_a_graph_are_not_handed_out_with_one(context: Any) -> None:
    """And the other way round."""
    layers, x = layers_of(joined(plain())), batch()
    with context():
        layers["q"](x)
    assert layers["k"](x).requires_grad
    layers["q"](x)
    with context():
        assert not layers["k"](x).requires_grad


def test_inference_tensors_are_taken() -> None:
    """Torch counts no versions of them, so no result waits for them."""
    model = plain()
    ours = joined(model)
    with torch.inference_mode():
        x = batch()
        for name in NAMES:
            torch.testing.assert_close(layers_of(ours)[name](x), layers_of(model)[name](x))
            x.mul_(-1)


def test_a_sibling_whose_weights_a_hook_fetches_is_not_asked_before_it_is_called() -> None:
    """As where they are offloaded."""
    model = plain()
    x, layer = batch(), layers_of(ours := joined(model))["k"]
    factor, weight = layer.lora_A["default"].weight, layer.lora_A["default"].weight.data
    layer.register_forward_pre_hook(lambda *a: setattr(factor, "data", weight))
    factor.data = torch.empty(0)
    for name in NAMES:
        torch.testing.assert_close(layers_of(ours)[name](x), layers_of(model)[name](x))


def test_a_frozen_layers_result_requires_no_gradient() -> None:
    """Also where its siblings are trainable."""
    layers = layers_of(joined(plain()))
    layers["k"].requires_grad_(False)
    assert [layers[name](batch()).requires_grad for name in NAMES] == [True, False, True]
    x = batch()
    assert [layers[name](x).requires_grad for name in NAMES] == [True, False, True]


class Forgets(torch.autograd.Function):
    """Has no gradient."""

    @staticmethod
    def forward(ctx: Any, *results: Tensor) -> Tensor:
        """The sum of all."""
        return torch.stack([result.sum() for result in results]).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        """For none of the three."""
        return None, None, None


def test_gradients_may_be_missing_for_all() -> None:
    """No parameter gets one then."""
    ours, x = joined(plain()), batch(requires_grad=True)
    loss = Forgets.apply(*(layers_of(ours)[name](x) for name in NAMES)) + x.sum()  # type: ignore[no-untyped-call]
    loss.backward()
    assert {p.grad for p in ours.parameters()} == {None}


def test_a_backward_pass_within_autocast_has_the_dtypes_of_the_forward_pass() -> None:
    """Autocast casts some products, and not those in place."""
    gradients = []
    for within in (False, True):
        ours = joined(plain())
        x = torch.linspace(-1, 1, 30).reshape(5, 6).requires_grad_()
        loss = torch.cat([layers_of(ours)[name](x) for name in NAMES], 1).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_a_backward_pass_within_autocast_is_so_too_where_the_first_result_is_not_used() -> None:
    """Its gradient is the one that is missing then."""
    gradients = []
    for within in (False, True):
        layers = layers_of(joined(plain()))
        x = torch.linspace(-1, 1, 30).reshape(5, 6).requires_grad_()
        _, *used = [layers[name](x) for name in NAMES]
        loss = torch.cat(used, 1).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=within):
            loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_there_is_no_second_derivative() -> None:
    """It is refused, and not wrong."""
    x = batch(requires_grad=True)
    [gradient] = torch.autograd.grad(layers_of(joined(plain()))["q"](x).tanh().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_factor_that_changes_before_the_backward_pass_is_an_error() -> None:
    """As it is in peft's layers: the gradient would be of other numbers than the result."""
    layers = layers_of(joined(plain()))
    loss = layers["q"](batch(requires_grad=True)).sum()
    with torch.no_grad():
        layers["q"].lora_A["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_threads_get_their_own_results() -> None:
    """Each of its own input, whoever calls in between."""
    model = plain()
    ours, interval = joined(model), sys.getswitchinterval()

    def wrong(seed: int) -> int:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            right = [layers_of(model)[name](x) for name in NAMES]
            tries = ([layers_of(ours)[name](x) for name in NAMES] for _ in range(200))
            return sum(not all(map(torch.allclose, tried, right)) for tried in tries)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(wrong, range(4))) == [0] * 4
    finally:
        sys.setswitchinterval(interval)


def test_nothing_of_a_model_that_is_dropped_lives_on() -> None:
    """Also where a result was still waiting: a forward pass that raised midway."""
    ours = joined(plain())
    layers_of(ours)["q"](batch(requires_grad=True))
    seen = [weakref.ref(parameter) for parameter in ours.parameters()]
    del ours
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)


def test_an_unfused_layer_is_left_alone() -> None:
    """Whether `unfuse` or somebody else gives it another class."""
    for leave in (unfuse, lambda layer: setattr(layer, "__class__", layer.plain)):
        layers, x = layers_of(joined(plain())), batch()
        leave(layers["k"])
        results = [layers[name](x) for name in NAMES]
        assert together([results[0], results[2]]) == 1


@pytest.mark.parametrize("called", [NAMES, "k"])
def test_nothing_is_kept_of_an_input_that_all_have_taken(called: str) -> None:
    """Nor of one that only a later layer took; results that nobody fetches go with the next input at the latest."""
    layers, x = layers_of(joined(plain())), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.cat([layers[name](x).flatten() for name in called]).float().sum().backward()
    seen = weakref.ref(x)
    del x
    gc.collect()
    assert seen() is None


def test_a_result_that_nobody_fetches_goes_with_the_next_input() -> None:
    """So that no more than one is ever kept."""
    layers, x = layers_of(joined(plain())), batch()
    layers["q"](x)
    seen = weakref.ref(x)
    del x
    layers["q"](batch())
    gc.collect()
    assert seen() is None


def test_a_copy_has_no_siblings() -> None:
    """Its layers would be those of the model that it was copied from."""
    ours = joined(plain())
    other = copy.deepcopy(ours)
    x = batch()
    for name in NAMES:
        a, b = (layers_of(model)[name](x) for model in (ours, other))
        torch.testing.assert_close(a, b)
    assert together([layers_of(other)[name](x) for name in NAMES]) == 3


class Odd(nn.Module):
    """Calls some of its layers with one input, and one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.inner = nn.ModuleDict({"e": nn.Linear(4, 4), "f": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        """Shapes (..., 4) to (..., 4)."""
        z = self.c(x) + self.c(x)
        return z + self.b(x) + self.a(x) + self.d(input=x) + self.inner["f"](x) + self.inner["e"](x * 2)


def test_siblings_share_a_parent_and_an_input_and_are_called_once() -> None:
    """In the order of their calls; one that is called by keyword is not seen, and no hook stays."""
    model = Odd()
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert find_siblings(layers, lambda: model(torch.ones(1, 4))) == []
    del layers["c"]
    assert find_siblings(layers, lambda: model(torch.ones(1, 4))) == [["b", "a"]]
    assert not any(module._forward_pre_hooks for module in layers.values())


def llama() -> tuple[Any, dict[str, Tensor]]:
    """An adapted model, and a batch."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_config(config), LoraConfig(target_modules="all-linear", init_lora_weights=False)
    )
    ids = torch.randint(1, 64, (2, 7))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def test_a_llama_s_siblings_are_found_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values; gate and up; five of seven in each layer. The second model is not run for it."""
    monkeypatch.setattr("homework.speed.fused._seen", {})
    for times in (1, 0):
        model, batch = llama()
        fuse(model)
        model.train().get_base_model().lm_head.eval()
        state = torch.get_rng_state()
        ran: list[bool] = []

        def look(module: nn.Module, given: Any, ran: list[bool] = ran) -> None:
            ran.append(module.training)
            torch.rand(1)

        model.register_forward_pre_hook(look)
        assert join_siblings(model, model.get_base_model(), batch) == 10
        assert ran == [False] * times
        assert model.training
        assert not model.get_base_model().lm_head.training
        assert torch.equal(torch.get_rng_state(), state)
        layer = model.get_base_model().model.layers[1]
        assert siblings.siblings_of(layer.self_attn.q_proj) is siblings.siblings_of(layer.self_attn.v_proj) is not None
        assert siblings.siblings_of(layer.mlp.gate_proj) is siblings.siblings_of(layer.mlp.up_proj) is not None
        assert siblings.siblings_of(layer.self_attn.o_proj) is None


def test_a_model_that_refuses_the_batch_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained without."""
    monkeypatch.setattr("homework.speed.fused._seen", {})
    model, _ = llama()
    fuse(model)
    assert join_siblings(model.train(), model.get_base_model(), {"pixels": torch.ones(1)}) == 0
    assert model.training


def test_a_compiled_model_is_left_to_its_compiler() -> None:
    """It fuses by itself, and gets peft's own layers."""
    ours = joined(plain())
    layers, x = layers_of(ours), batch()

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(x: Tensor) -> list[Tensor]:
        return [layers[name](x) for name in NAMES]

    for a, name in zip(compiled(x), NAMES, strict=True):
        torch.testing.assert_close(a, layers[name](x))
