"""Bases in four bits: trained as QLoRA trains them, asked without being spoiled, and judged as what they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from torch import nn

from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.building.targets import resolve
from pytest_sftguard.precision import MODES
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

Run = Callable[..., JudgedRun]
TARGETS = "tests.targets.quantised"
STANDARD = ("wiring", "supervision", "prompts", "context", "paths", "evaluation", "merging")
needs_library = pytest.mark.skipif(not importlib.util.find_spec("bitsandbytes"), reason="bitsandbytes is not installed")


def rearranges() -> bool:
    """Whether bitsandbytes rearranges 4-bit weights on this machine's CPU."""
    from bitsandbytes.functional import has_avx512bf16

    return bool(has_avx512bf16())


def run(run_cell: Run, target: str, **config: object) -> JudgedRun:
    """The run of a target in `nf4-bf16`, at all looks of the tier standard that apply."""
    return run_cell(f"{TARGETS}:{target}", "nf4-bf16", looks=STANDARD, questions=0, **config)


def failed(judged: JudgedRun) -> set[str]:
    """Names of the invariants that failed."""
    return {f.invariant for f in judged.verdict.failures}


@needs_library
@pytest.mark.parametrize("target", ["build_trainer", "always", "evaluating_without_rearranging"])
def test_a_quantised_training_passes(run_cell: Run, target: str) -> None:
    """Four bits, once or twice quantised, through `quantization_config` or by itself, pass with uint8 weights."""
    judged = run(run_cell, target)
    assert judged.verdict.passed, judged.verdict.findings
    assert set(judged.record.weights_dtypes) == {"uint8"}
    assert set(judged.record.compute_dtypes) == {"bfloat16"}
    assert judged.record.round_trip.max_logit_change == 0


@needs_library
def test_an_evaluation_after_the_last_step_harms_nothing(run_cell: Run) -> None:
    """Weights that an evaluation rearranged when all was learned are the same weights."""
    judged = run(run_cell, "evaluating_at_the_end")
    assert judged.verdict.passed, judged.verdict.findings


@needs_library
@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")
def test_a_training_through_rearranged_weights_fails(run_cell: Run) -> None:
    """No gradient passes through bitsandbytes' layers for inference, into which an evaluation turns those of a CPU."""
    if not rearranges():
        pytest.skip("bitsandbytes does not rearrange weights on this CPU")
    judged = run(run_cell, "evaluating")
    assert failed(judged) == {"base_bit_frozen"}
    assert "no gradient passes through them" in message(judged.verdict.failures[0])


@needs_library
def test_another_quantised_base_fails(run_cell: Run) -> None:
    """An adapter that is reloaded onto other four bits is no longer the one that was trained."""
    assert "round_trip" in failed(run(run_cell, "another_base_each_time"))


@needs_library
@pytest.mark.parametrize(
    ("target", "message_part"),
    [("never", "not quantised; in this mode a target with the parameter"), ("float16_compute", "computed in float16")],
)
def test_what_is_not_quantised_as_asked_is_not_evaluated(run_cell: Run, target: str, message_part: str) -> None:
    """A base in sixteen bits, or four bits that compute in another type, are no evidence for the mode."""
    judged = run(run_cell, target)
    assert judged.verdict.outcome is Outcome.NOT_EVALUATED
    assert any(message_part in message(f) for f in judged.verdict.of("precision_is_real"))


def test_without_the_library_the_cell_is_not_run(run_cell: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says what to install."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    judged = run(run_cell, "build_trainer")
    assert judged.record.not_run == "nf4-bf16 needs bitsandbytes: pip install pytest-sftguard[qlora]"


@pytest.mark.parametrize("mode", [m for m in MODES.values() if not m.quantisation], ids=lambda m: m.name)
def test_other_modes_need_no_library(mode: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a mode with a quantised base looks for bitsandbytes."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert quantised.lacks_library(mode) is None


@pytest.mark.parametrize(("function", "takes"), [("build_trainer", True), ("never", False)])
def test_a_target_is_given_what_it_takes(function: str, takes: bool) -> None:
    """A function that has no parameter for it is called without `quantization_config`."""
    assert resolve(f"{TARGETS}:{function}").takes("quantization_config") == takes


@needs_library
@pytest.mark.parametrize("double", [False, True], ids=["once", "twice"])
def test_the_layout_for_inference_has_the_same_bits(double: bool) -> None:
    """The canonical form of rearranged weights is what was loaded, and saving does not spoil what is kept."""
    import bitsandbytes
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        128, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=double
    )
    model = nn.Sequential(layer.to("cpu"))
    loaded = layer.weight.data.clone()
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        loaded.clone(), layer.weight.quant_state
    )
    assert quantised.is_rearranged(layer)
    assert torch.equal(quantised.canonical(layer.weight), loaded)
    rearranged, scales = layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()
    with quantised.kept(model):
        model.state_dict()
        assert not quantised.is_rearranged(layer)
    assert torch.equal(layer.weight.data, rearranged)
    assert torch.equal(layer.weight.quant_state.absmax, scales)
