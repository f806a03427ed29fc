"""Real trainings of the tiny model: what the engine sees, in health and with one thing wrong."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import numpy
import pytest
import torch

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.engine import runner
from pytest_sftguard.engine.building.targets import TargetError
from pytest_sftguard.invariants import precision_is_real
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets.tiny import TINY

ON_A_CPU = ("fp32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true")
DTYPES = {"fp32": "float32", "bf16-mixed": "bfloat16", "fp16-mixed": "float16", "bf16-true": "bfloat16"}


@pytest.mark.parametrize("batch", [(2, 4), (8, 1)], ids=["2x4", "8x1"])
@pytest.mark.parametrize("precision", ON_A_CPU)
def test_a_healthy_target_passes(run_cell: Callable[..., JudgedRun], precision: str, batch: tuple[int, int]) -> None:
    """Every mode that a CPU has passes every invariant that can be looked at."""
    run = run_cell(precision=precision, batch=batch)
    assert run.verdict.passed, run.verdict.findings


@pytest.mark.parametrize(("precision", "dtype"), DTYPES.items())
def test_the_compute_dtype_is_the_modes(run_cell: Callable[..., JudgedRun], precision: str, dtype: str) -> None:
    """The adapted layers' products are seen in the type that the mode promises."""
    assert run_cell(precision=precision).record.compute_dtypes == {dtype: 14}


def test_mixed_float16_on_a_cpu_is_real(run_cell: Callable[..., JudgedRun]) -> None:
    """Under fp16-mixed a loss scaler is at work, and the losses differ from fp32's in the last digits only."""
    half, full = run_cell(precision="fp16-mixed").record, run_cell().record
    assert half.loss_scaling
    assert half.losses != full.losses
    assert half.losses == pytest.approx(full.losses, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed"])
def test_a_precision_that_did_not_happen_is_not_evaluated(run_cell: Callable[..., JudgedRun], precision: str) -> None:
    """A target that drops the precision trains in float32; its cell is neither passed nor failed, and says why."""
    verdict = run_cell("ignores_precision", precision=precision).verdict
    assert verdict.outcome is Outcome.NOT_EVALUATED
    assert verdict.of("precision_is_real")[0].because(precision_is_real.Reason.COMPUTED)


def test_weights_of_another_type_are_not_evaluated(run_cell: Callable[..., JudgedRun]) -> None:
    """A target that drops `dtype` trains on a bfloat16 base; its bf16-mixed cell says so."""
    verdict = run_cell("ignores_dtype", precision="bf16-mixed").verdict
    assert verdict.outcome is Outcome.NOT_EVALUATED
    (finding, *_) = verdict.of("precision_is_real")
    assert finding.because(precision_is_real.Reason.WEIGHTS)
    assert finding.evidence["dtypes"] == ("bfloat16",)


def test_tf32_is_not_run_on_a_cpu(run_cell: Callable[..., JudgedRun]) -> None:
    """A mode that the device lacks is not trained in some other one."""
    run = run_cell(precision="tf32")
    assert run.verdict.outcome is Outcome.NOT_EVALUATED
    assert run.record.not_run == "tf32 exists on NVIDIA GPUs only, and this device is cpu"


@pytest.mark.parametrize(
    ("target", "precision", "invariant", "mechanism"),
    [
        ("fused_half_precision_adapters", "fp16-true", None, "moments_underflow_in_float16"),
        ("learning_rate_zero", "fp32", "effective_steps", "learning_rate_zero"),
        ("labels_masked", "fp32", "raw_loss_finite", "all_labels_masked"),
        ("base_not_frozen", "fp32", "base_bit_frozen", None),
        ("optimizer_of_the_base", "fp32", "effective_steps", "adapter_not_in_optimizer"),
        ("frozen_under_checkpointing", "fp32", "every_factor_moves", "adapter_frozen"),
        ("third_loss_infinite", "fp32", "raw_loss_finite", None),
        ("gradients_zeroed_by_a_callback", "fp32", "gradients_finite", None),
        ("activations_beyond_float16", "fp16-true", "raw_loss_finite", "forward_not_finite"),
        ("activations_beyond_float16", "fp16-mixed", "effective_steps", "forward_overflow_in_float16"),
        ("empty_adapter_file", "fp32", "round_trip", None),
        ("another_base_each_time", "fp32", "round_trip", None),
        ("raises_in_training", "fp32", "evidence_complete", None),
    ],
)
def test_a_fault_is_seen(
    run_cell: Callable[..., JudgedRun], target: str, precision: str, invariant: str | None, mechanism: str | None
) -> None:
    """Each fault fails the invariant that exists for it, and its mechanism goes first where there is one."""
    run = run_cell(target, precision=precision, steps=14 if invariant is None else 6)
    assert run.verdict.outcome is Outcome.FAILED
    assert invariant is None or invariant in {f.invariant for f in run.verdict.failures}
    assert mechanism is None or diagnose(run)[0].mechanism == mechanism


def test_the_step_of_a_fault_is_found(run_cell: Callable[..., JudgedRun]) -> None:
    """One infinite loss in the third step is located there."""
    [finding] = run_cell("third_loss_infinite").verdict.of("raw_loss_finite")
    assert finding.step == 3


@pytest.mark.parametrize("target", ["scaler_skips_three", "warm_up", "backward_by_hand"])
def test_healthy_oddities_pass(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Steps skipped at first, a first step at learning rate 0, and an own backward pass are no failures."""
    run = run_cell(target, precision="fp16-mixed" if target == "scaler_skips_three" else "fp32", steps=8)
    assert run.verdict.passed, run.verdict.findings


def test_steps_that_the_scaler_skips_are_told_from_others(run_cell: Callable[..., JudgedRun]) -> None:
    """The first three steps are skipped, with gradients that are not finite, and the rest applied."""
    effects = [s.effect for s in run_cell("scaler_skips_three", precision="fp16-mixed", steps=6).record.steps]
    assert effects == ["skipped_by_scaler"] * 3 + ["applied"] * 3


def test_an_exception_keeps_what_was_seen_before(run_cell: Callable[..., JudgedRun]) -> None:
    """A training that raises in its second step leaves a record of the first, and the exception's place."""
    record = run_cell("raises_in_training", batch=(8, 1)).record
    assert len(record.steps) == 1
    assert (record.error.stage, record.error.message) == ("train", "row 7 is broken")
    assert "in collate" in record.error.where


def test_a_run_can_be_repeated_bit_for_bit(run_cell: Callable[..., JudgedRun]) -> None:
    """The same config gives the same record, but for its times, and the memory that others left free."""
    one, other = (_timeless(run_cell(precision="bf16-mixed", batch=(2, 4)).record) for _ in range(2))
    assert one == other


def test_a_run_leaves_no_trace(run_cell: Callable[..., JudgedRun]) -> None:
    """Random generators, environment and default dtype are afterwards what they were."""
    torch.manual_seed(1), random.seed(2), numpy.random.seed(3)
    before = (torch.get_rng_state().tolist(), random.getstate(), dict(os.environ), torch.get_default_dtype())
    numpy_before = numpy.random.get_state()[1].tolist()
    run_cell(precision="fp16-mixed", steps=1)
    assert before == (torch.get_rng_state().tolist(), random.getstate(), dict(os.environ), torch.get_default_dtype())
    assert numpy_before == numpy.random.get_state()[1].tolist()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("no_trainer", "not a transformers.Trainer"),
        ("narrow", "must take model, dtype and any \\*\\*training_arguments"),
        ("dropped_wrapper", "its result is what has to be trained"),
        ("ignores_batch", "was asked for per_device_train_batch_size=8, and its Trainer has 4"),
        ("missing", "module tests.targets.tiny has no missing"),
        ("no.such.module:build", "cannot be imported: ModuleNotFoundError"),
        ("tests.targets.tiny:TINY", "not a function that builds a Trainer"),
    ],
)
def test_a_target_that_breaks_its_contract_is_refused(
    run_cell: Callable[..., JudgedRun], target: str, message: str
) -> None:
    """The error names the target and says what is wrong with it."""
    with pytest.raises(TargetError, match=message):
        run_cell(target)


def test_progress_counts_the_steps() -> None:
    """Every optimizer step that is done is told."""
    told: list[int] = []
    runner.run(RunConfig(cell=Cell("fp32", 8, 1), target=TINY, steps=3, device="cpu"), told.append)
    assert told == [1, 2, 3]


def test_a_real_record_survives_its_file(run_cell: Callable[..., JudgedRun], tmp_path) -> None:
    """What is read back is what was written, NaN included."""
    record = run_cell("third_loss_infinite").record
    record.write(tmp_path / "record.json")
    assert repr(RunRecord.read(tmp_path / "record.json")) == repr(record)


def _timeless(record: RunRecord) -> dict[str, object]:
    data = record.to_dict() | {"seconds": None}
    data["device"] |= {"free_memory_bytes": None}
    data["steps"] = [s | {"seconds": None} for s in data["steps"]]
    return data
