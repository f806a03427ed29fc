"""Faults are reported at the step where they happen, and looks do not change the training."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

from pytest_sftguard.engine.faults import fault_named
from pytest_sftguard.engine.faults._injected import injected
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import healthy as healthy_targets
from tests.targets.faulty import on, parameters

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"


@pytest.fixture
def run_fault(run_cell: Callable[..., JudgedRun]) -> Callable[..., JudgedRun]:
    """Trains a target with a fault in the cell of the fault, with the look `replay`."""

    def run(name: str, target: str = SUMS) -> JudgedRun:
        fault = fault_named(name)
        with injected(name, target) as path:
            return run_cell(
                path,
                fault.precision,
                fault.batch,
                steps=fault.steps,
                training_arguments=fault.arguments,
                questions=0,
                looks=("replay",),
            )

    return run


def test_the_control_is_green(run_fault: Callable[..., JudgedRun]) -> None:
    """Two skipped steps at the start of a scaled run are healthy, though a fused optimizer's schedule runs ahead."""
    run = run_fault("amp_warmup_skips_are_normal")
    assert run.verdict.passed, run.verdict.failures
    assert [s.effect for s in run.record.steps[:2]] == ["skipped_by_scaler"] * 2


@pytest.mark.parametrize("name", ["fp16_forward_overflow", "amp_warmup_skips_are_normal", "vacuous_evidence"])
@pytest.mark.parametrize("target", ["gpt2", "bert_classifier", "mixtral_experts", "streamed"])
def test_a_fault_is_made_of_any_target(run_fault: Callable[..., JudgedRun], name: str, target: str) -> None:
    """A fault works with models and data of many types."""
    verdict = run_fault(name, f"tests.targets.healthy:{target}").verdict
    reported = {f.invariant for f in verdict.failures}
    expected = set(fault_named(name).reported_by)
    assert reported & expected if expected else verdict.passed, verdict.findings


def test_the_overflow_is_no_fault_in_float32(run_cell: Callable[..., JudgedRun]) -> None:
    """The same base trains in float32, whose range is larger."""
    with injected("fp16_forward_overflow", SUMS) as path:
        run = run_cell(path, questions=0)
    assert run.verdict.passed, run.verdict.failures


REPLAYED = {
    "fp32": ("tests.targets.healthy:twice_the_rank", "fp32", {}),
    "fused-without-clipping": ("tests.targets.healthy:scale_grows", "fp16-mixed", {"max_grad_norm": 0.0}),
    "adafactor": ("tests.targets.healthy:twice_the_rank", "bf16-mixed", {"optim": "adafactor"}),
    "groups": ("tests.targets.healthy:lora_plus", "fp16-mixed", {}),
    "own-optimizer": ("tests.targets.healthy:lion", "fp32", {}),
    "dropout": ("tests.targets.healthy:heavy_dropout", "fp32", {}),
    "experts": ("tests.targets.healthy:mixtral_experts", "bf16-true", {}),
    "frozen-in-the-optimizer": ("tests.targets.healthy:all_parameters_to_the_optimizer", "fp32", {}),
    "calls-its-parent": (f"{__name__}:subclassed", "fp32", {}),
    "noisy": (f"{__name__}:noisy", "fp32", {}),
    # ranks that are taken away are set to zero between the steps, on which the decay depends
    "rewritten-between-steps": (
        "tests.targets.adapters:adalora_pruning",
        "fp32",
        {"optim": "rmsprop", "weight_decay": 0.1, "learning_rate": 1e-2},
    ),
}


@pytest.mark.parametrize(("target", "precision", "arguments"), REPLAYED.values(), ids=REPLAYED)
def test_replaying_changes_no_bit(
    run_cell: Callable[..., JudgedRun], target: str, precision: str, arguments: dict[str, Any]
) -> None:
    """A healthy training has the same bits with and without the look, and moves as far as its replay."""
    with_look, without = (
        run_cell(target, precision=precision, training_arguments=arguments, looks=looks) for looks in (("replay",), ())
    )
    assert with_look.verdict.passed, with_look.verdict.failures
    assert [f.outcome for f in with_look.verdict.of("update_lower_bound")] == [Outcome.PASSED]
    assert with_look.record.adapter_digest == without.record.adapter_digest


class _Subclassed(torch.optim.AdamW):
    """Calls its parent's step, whose hooks run as well."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Noisy(torch.optim.Optimizer):
    """Draws random numbers in each step."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * (p.grad.sign() + 0.1 * torch.randn_like(p)))


def subclassed(**arguments: Any) -> Any:
    """A target whose optimizer is a subclass."""
    # from here on the parent's step has hooks of its own
    torch.optim.AdamW([torch.zeros(1)])
    return _with_optimizer(_Subclassed, arguments)


def noisy(**arguments: Any) -> Any:
    """A target whose optimizer needs the random generator."""
    return _with_optimizer(_Noisy, arguments)


def _with_optimizer(optimizer: Any, arguments: dict[str, Any]) -> Any:
    trainer = healthy_targets.built(arguments)
    trainer.optimizer = optimizer([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    return trainer


def secretive(**arguments: Any) -> Any:
    """A target whose optimizer cannot be made from its own groups."""

    class Needs(torch.optim.AdamW):
        def __init__(self, parameters: Any, secret: int) -> None:
            super().__init__(parameters, lr=1e-3 * secret)

    trainer = healthy_targets.built(arguments)
    trainer.optimizer = Needs([p for p in trainer.model.parameters() if p.requires_grad], 1)
    return trainer


def test_an_optimizer_that_cannot_be_made_again_is_not_replayed(run_cell: Callable[..., JudgedRun]) -> None:
    """The look says why, and the cell passes without it."""
    run = run_cell(f"{__name__}:secretive", looks=("replay",))
    assert run.verdict.passed, run.verdict.failures
    [look] = run.record.looks
    assert "Needs cannot be made a second time: TypeError" in look.inapplicable


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "one_cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=1e-3, total_steps=8),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-3, step_size_up=3, cycle_momentum=False),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "steps": lambda o: lr_scheduler.StepLR(o, 2),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 8)], [3]
    ),
    "chain": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "plateau": lr_scheduler.ReduceLROnPlateau,
}


def scheduled(**arguments: Any) -> Any:
    """A target with one of the schedulers, named in the run's name."""
    name = arguments.pop("run_name")
    trainer = healthy_targets.built(arguments)
    trainer.optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], lr=1e-3)
    trainer.lr_scheduler = SCHEDULERS[name](trainer.optimizer)
    return trainer


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_of_every_scheduler_are_known(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """A scheduler without a closed form is stepped as a copy; one that follows a metric is not evaluated."""
    verdict = run_cell(f"{__name__}:scheduled", training_arguments={"run_name": name}, steps=7).verdict
    assert verdict.passed, verdict.failures
    expected = Outcome.NOT_EVALUATED if name == "plateau" else Outcome.PASSED
    assert [f.outcome for f in verdict.of("lr_trace")] == [expected]


def scheduled_twice(**arguments: Any) -> Any:
    """A scheduler without a closed form that a callback steps as well."""
    trainer = scheduled(**arguments)
    return on(trainer, "on_step_end", lambda control: trainer.lr_scheduler.step(), None)


def rate_set_by_a_callback(**arguments: Any) -> Any:
    """A callback that halves the learning rate from the fourth step on, against the schedule."""
    trainer = healthy_targets.built(arguments)

    def halve() -> None:
        for group in trainer.optimizer.param_groups:
            group["lr"] /= 2

    return on(trainer, "on_pre_optimizer_step", halve)


@pytest.mark.parametrize(("target", "step"), [("scheduled_twice", 2), ("rate_set_by_a_callback", 4)])
def test_a_rate_beside_the_schedule_is_seen(run_cell: Callable[..., JudgedRun], target: str, step: int) -> None:
    """The finding names the first step whose rate is not that of the schedule."""
    arguments = {"run_name": "restarts"} if target == "scheduled_twice" else {}
    [finding] = run_cell(f"{__name__}:{target}", training_arguments=arguments).verdict.of("lr_trace")
    assert (finding.outcome, finding.step) == (Outcome.FAILED, step)


UNLISTED: dict[str, tuple[str, int | None]] = {
    "tests.targets.faulty:steps_without_a_gradient": ("gradient_present", 4),
    "tests.targets.faulty:constant_loss": ("gradient_present", 1),
    "tests.targets.faulty:log_laundered": ("log_honest", 1),
    "tests.targets.faulty:returned_loss_laundered": ("log_honest", 4),
    "tests.targets.faulty:nan_in_one_gradient": ("log_honest", 4),
    "tests.targets.faulty:gradients_enlarged": ("norm_honest", 1),
    "tests.targets.faulty:scheduler_steps_twice": ("lr_trace", 2),
    "tests.targets.tiny:gradients_zeroed_by_a_callback": ("log_honest", 1),
    f"{__name__}:clipped_under_the_scale": ("norm_honest", 1),
    f"{__name__}:gradients_scaled_after_clipping": ("norm_honest", 4),
}


def clipped_under_the_scale(**arguments: Any) -> Any:
    """Gradients that are divided by a thousand before clipping, with a logged norm that hides it."""
    trainer = healthy_targets.built(arguments)
    original = trainer.accelerator.clip_grad_norm_

    def clip(given: Any, *args: Any, **kwargs: Any) -> Any:
        given = list(given)
        for p in given:
            if p.grad is not None:
                p.grad.div_(1e3)
        return original(given, *args, **kwargs) * 1e3

    trainer.accelerator.clip_grad_norm_ = clip
    return trainer


def gradients_scaled_after_clipping(**arguments: Any) -> Any:
    """A callback that doubles the gradients of the fourth step after they were clipped."""
    trainer = healthy_targets.built(arguments)
    return on(trainer, "on_pre_optimizer_step", lambda: [p.grad.mul_(2) for p in parameters(trainer)])


@pytest.mark.parametrize("target", UNLISTED)
def test_an_unlisted_fault_is_seen(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The invariant for the fault fails, and names its step."""
    invariant, step = UNLISTED[target]
    findings = run_cell(target).verdict.of(invariant)
    assert (Outcome.FAILED, step) in {(f.outcome, f.step) for f in findings}, findings


@pytest.mark.parametrize("target", ["saved_lm_head", "tied_embeddings_saved", "bias_lora_only"])
def test_float16_tensors_beside_the_factors_are_seen(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Peft widens the factors, but leaves modules_to_save, biases and their Adam moments in float16."""
    run = run_cell(f"tests.targets.healthy:{target}", precision="fp16-true")
    [finding] = run.verdict.of("update_upper_bound")
    assert finding.outcome is Outcome.FAILED
    assert not re.search("lora_[AB]", message(finding))
