"""Healthy trainings of many kinds: a guard that cries wolf is switched off, so that all of them must pass."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.targets import healthy as healthy_targets

pytestmark = pytest.mark.slow
BUILDING = ("built", "with_kernel", "collate_left")
TARGETS = [
    name
    for name, thing in vars(healthy_targets).items()
    if inspect.isfunction(thing)
    and thing.__module__ == healthy_targets.__name__
    and name[0] != "_"
    and name not in BUILDING
]
ACCUMULATED = ("one_row", "three_rows", "eleven_rows", "streamed", "dropout", "idle_experts", "own_loss_normalised")
HALF = ("dora", "pissa", "saved_lm_head", "tied_embeddings_saved", "mixtral", "gpt2", "bias_lora_only", "lora_plus")
HALF_TRAINABLES = ("saved_lm_head", "tied_embeddings_saved", "bias_lora_only")
"""Those that train tensors of the base, which peft leaves in the base's type: to be waived by whoever means it."""
ARGUMENTS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "adamw_fused": {"optim": "adamw_torch_fused"},
    "adafactor": {"optim": "adafactor"},
    # at 0.1 float32 swallows it
    "sgd": {"optim": "sgd", "learning_rate": 1.0},
    "rmsprop": {"optim": "rmsprop"},
    "adagrad": {"optim": "adagrad"},
    "no_clipping": {"max_grad_norm": 0.0},
    "never_clips": {"max_grad_norm": float("inf")},
    "always_clips": {"max_grad_norm": 1e-3},
    "warm_up": {"lr_scheduler_type": "linear", "warmup_steps": 3},
    "cosine": {"lr_scheduler_type": "cosine"},
    "cosine_warm_up": {"lr_scheduler_type": "cosine", "warmup_steps": 2},
    "inverse_sqrt": {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 1},
    "rate_1e-6": {"learning_rate": 1e-6},
    "rate_1e-1": {"learning_rate": 1e-1},
    "weight_decay": {"weight_decay": 0.1},
    "label_smoothing": {"label_smoothing_factor": 0.1},
    "neftune": {"neftune_noise_alpha": 5.0},
    "drop_last": {"dataloader_drop_last": True},
    "log_every_third": {"logging_steps": 3},
    "log_first": {"logging_steps": 5, "logging_first_step": True},
    "log_by_epoch": {"logging_strategy": "epoch"},
    "no_log": {"logging_strategy": "no"},
    "log_unfiltered": {"logging_nan_inf_filter": False},
    "checkpoints": {"save_strategy": "steps", "save_steps": 2},
    "other_seed": {"data_seed": 7, "full_determinism": False},
    "sequential": {"train_sampling_strategy": "sequential"},
    "average_tokens_off": {"average_tokens_across_devices": False},
    "epochs_ignored": {"num_train_epochs": 50},
    "cache_emptied": {"torch_empty_cache_steps": 2},
    "beta": {"adam_beta2": 0.95, "adam_epsilon": 1e-6},
}


@pytest.mark.parametrize("target", TARGETS)
def test_a_healthy_variant_passes(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Adapters, architectures, data and Trainers of many kinds train soundly in float32."""
    run = run_cell(f"tests.targets.healthy:{target}")
    assert run.verdict.passed, run.verdict.findings


@pytest.mark.parametrize("target", ACCUMULATED)
def test_a_healthy_variant_passes_with_accumulation(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Steps of several micro-batches, and of fewer at the end of an epoch, are sound."""
    run = run_cell(f"tests.targets.healthy:{target}", batch=(2, 4), steps=8)
    assert run.verdict.passed, run.verdict.findings


# peft leaves what is no factor in the base's float16, where Adam's second moment underflows: no healthy training, and
# test_steps.py says so
UNSOUND = [(t, "fp16-true") for t in ("saved_lm_head", "tied_embeddings_saved", "bias_lora_only")]


@pytest.mark.parametrize(
    ("target", "precision"),
    [
        (t, p)
        for t, p in itertools.product(HALF, ["bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"])
        if (t, p) not in UNSOUND
    ],
)
def test_a_healthy_variant_passes_in_low_precision(
    run_cell: Callable[..., JudgedRun], target: str, precision: str
) -> None:
    """What is sound in float32 is sound, by the same invariants, in the other modes."""
    run = run_cell(f"tests.targets.healthy:{target}", precision=precision)
    waived = ("fp32_master",) if target in HALF_TRAINABLES and precision.endswith("-true") else ()
    assert judge(run.record, load_invariants(), waived=waived).passed, run.verdict.findings


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_healthy_arguments_pass(run_cell: Callable[..., JudgedRun], arguments: str) -> None:
    """Optimizers, schedules, clipping and logging of all kinds are sound."""
    run = run_cell("tests.targets.healthy:twice_the_rank", steps=7, training_arguments=ARGUMENTS[arguments])
    assert run.verdict.passed, run.verdict.findings


def test_a_scale_that_grows_passes(run_cell: Callable[..., JudgedRun]) -> None:
    """Sixty steps under a loss scale that doubles every twelfth, and is halved where it overflows."""
    run = run_cell("tests.targets.healthy:scale_grows", precision="fp16-mixed", steps=60)
    assert run.verdict.passed, run.verdict.findings
