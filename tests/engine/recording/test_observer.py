"""An Observer of users' own loops: healthy ones pass, and faulty ones fail at their step."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pytest_sftguard.engine.recording.observer import Observer
from pytest_sftguard.loops import judged
from pytest_sftguard.records import RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import loops

LOOPS = {"bare": loops.bare, "accelerate": loops.plain_accelerate}
Loop = Callable[..., Observer]


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Loop:
    """Each type of loop."""
    return LOOPS[request.param]


def run(observer: Observer) -> JudgedRun:
    """The judged record of a loop."""
    return judged(observer.record())


def failed(verdict: JudgedRun) -> dict[str, int | None]:
    """The invariants that failed, with their first step."""
    return {f.invariant: f.step for f in reversed(verdict.verdict.failures)}


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_healthy_loop_passes(loop: Loop, accumulation: int) -> None:
    """The record has every step with its micro-batches."""
    seen = run(loop(loops.model(), steps=4, accumulation=accumulation))
    assert seen.verdict.outcome is Outcome.PASSED, seen.verdict.failures
    assert [len(s.micro_losses) for s in seen.record.steps] == [accumulation] * 4
    assert seen.record.cell == f"fp32-b4x{accumulation}"


def test_the_founding_bug_fails_at_its_second_step(loop: Loop) -> None:
    """AdamW's eps is zero in float16, so that a float16 adapter is NaN from step 2 on."""
    seen = failed(run(loop(loops.model("float16", "float16"))))
    assert seen["raw_loss_finite"] == 2
    assert seen["gradients_finite"] == 2


def nan_in_a_gradient(at: int) -> loops.Spoil:
    """One NaN in one gradient of one step."""

    def spoil(model: nn.Module, step: int) -> None:
        first = loops.trainable(model)[1]
        if step == at:
            first.register_hook(lambda g: g * math.nan) if first.grad is None else first.grad.view(-1)[0].fill_(
                math.nan
            )

    return spoil


def test_clipping_spreads_one_nan_and_the_guard_names_its_tensor(loop: Loop) -> None:
    """clip_grad_norm_ makes every gradient NaN; the record has the gradients from before it."""
    seen = run(loop(loops.model(), spoil=nan_in_a_gradient(3), steps=4))
    assert failed(seen)["gradients_finite"] == 3
    [names] = [s.nonfinite_gradients for s in seen.record.steps if s.step == 3]
    assert names.count == 1
    assert failed(seen)["weights_and_moments_finite"] == 3


def scaler(scale: float = 1024.0, **more: Any) -> torch.amp.GradScaler:
    """A loss scaler on the CPU."""
    return torch.amp.GradScaler("cpu", init_scale=scale, **more)


@pytest.mark.parametrize("unscaled_first", [False, True])
def test_gradients_are_seen_without_their_scale(unscaled_first: bool) -> None:
    """An earlier `unscale_` makes no difference."""
    plain = run(loops.bare(loops.model(), steps=2)).record
    scaled = run(loops.bare(loops.model(), steps=2, scaler=scaler(), unscaled_first=unscaled_first))
    assert scaled.verdict.outcome is Outcome.PASSED, scaled.verdict.failures
    assert scaled.record.grad_norms[0] == pytest.approx(plain.grad_norms[0], rel=1e-2)
    assert scaled.record.precision == "fp16-mixed"
    assert [s.loss_scale for s in scaled.record.steps] == [1024.0, 1024.0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_healthy(fused: bool) -> None:
    """A scale that overflows at first is halved until it fits, which is no failure."""
    model = loops.model()
    seen = run(loops.bare(model, steps=6, scaler=scaler(2.0**19), optimizer=loops.adam(model, fused=fused)))
    effects = [s.effect for s in seen.record.steps]
    assert effects[0] == "skipped_by_scaler"
    assert effects[-1] == "applied"
    assert seen.verdict.outcome is Outcome.PASSED, seen.verdict.failures


def test_a_forgotten_zero_grad_fails() -> None:
    """Gradients of the previous step still exist when the next backward pass begins."""
    assert failed(run(loops.bare(loops.model(), clear=False)))["effective_steps"] == 2


def test_gradients_may_be_cleared_right_before_the_backward_pass() -> None:
    """Clearing between the loss and its backward pass is common, and no fault."""
    model = loops.model()
    optimizer, feed = loops.adam(model), iter(loops.batches())
    with Observer(model, optimizer) as observer:
        for _ in range(3):
            loss = model(**next(feed)).loss
            observer.micro_batch(loss)
            optimizer.zero_grad()
            loss.backward()
            observer.before_step()
            optimizer.step()
            observer.after_step()
    assert run(observer).verdict.outcome is Outcome.PASSED


def test_an_optimizer_of_other_parameters_fails() -> None:
    """The optimizer must own exactly the trainable parameters."""
    model = loops.model()
    half = torch.optim.AdamW(loops.trainable(model)[:4], lr=1e-2)
    assert "optimizer_owns_trainables" in failed(run(loops.bare(model, optimizer=half)))


def test_a_learning_rate_of_zero_fails() -> None:
    """No step changes anything."""
    model = loops.model()
    assert "effective_steps" in failed(run(loops.bare(model, optimizer=loops.adam(model, lr=0.0))))


def test_a_loop_that_takes_too_few_steps_fails() -> None:
    """The loop must take the number of steps that it states."""
    model = loops.model()
    with Observer(model, loops.adam(model), steps=3) as observer:
        pass
    assert "evidence_complete" in failed(run(observer))


def test_a_loop_that_takes_no_step_does_not_pass() -> None:
    """A training without a step does not pass."""
    model = loops.model()
    with Observer(model, loops.adam(model)) as observer:
        pass
    assert not run(observer).verdict.passed


def test_a_precision_that_was_named_is_held_to_what_happened() -> None:
    """A loop without autocast is not bf16-mixed."""
    seen = run(loops.bare(loops.model(), precision="bf16-mixed"))
    assert seen.verdict.outcome is Outcome.NOT_EVALUATED
    assert [f.invariant for f in seen.verdict.not_evaluated if f.required] == ["precision_is_real"] * 2


def test_the_adapter_goes_through_a_file_where_a_fresh_model_can_be_built(loop: Loop) -> None:
    """The round trip passes, and leaves the model in training mode."""
    model = loops.model()
    seen = run(loop(model, fresh=loops.model))
    assert seen.verdict.outcome is Outcome.PASSED, seen.verdict.failures
    assert [f.outcome for f in seen.verdict.of("round_trip")] == [Outcome.PASSED]
    assert model.training


def test_a_file_without_the_adapter_fails(loop: Loop) -> None:
    """Tensors that `save` leaves out are missing."""

    def empty(folder: str) -> None:
        model.save_pretrained(folder, state_dict={})  # type: ignore[operator]

    model = loops.model()
    assert "round_trip" in failed(run(loop(model, fresh=loops.model, save=empty)))


def test_an_exception_of_saving_is_told() -> None:
    """The record has the exception as its error."""

    def broken(folder: str) -> None:
        raise OSError("the disk is full")

    [finding] = [
        f
        for f in run(loops.bare(loops.model(), fresh=loops.model, save=broken)).verdict.failures
        if f.invariant == "evidence_complete"
    ]
    assert "round_trip: OSError: the disk is full" in message(finding)


def test_an_exception_of_the_loop_is_told_and_passed_on() -> None:
    """The record has the steps before it."""

    def broken(model: nn.Module, step: int) -> None:
        if step == 3:
            raise ValueError("mine")

    model, seen = loops.model(), []
    made = Observer.__init__

    def remembered(self: Observer, *args: Any, **kwargs: Any) -> None:
        seen.append(self)
        made(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Observer, "__init__", remembered)
        with pytest.raises(ValueError, match="mine"):
            loops.bare(model, spoil=broken)
    record = seen[0].record()
    assert (len(record.steps), record.error.type, record.error.stage) == (2, "ValueError", "train")


def test_a_loop_that_loses_its_device_keeps_what_is_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps its steps; the tensors of a lost device cannot be read."""
    observer = loops.bare(loops.model(), steps=3)
    monkeypatch.setattr("pytest_sftguard.engine.recording.observer.devices.answers", lambda device_type: False)
    monkeypatch.setattr(observer.recorder, "adapter", lambda: pytest.fail("a tensor was looked at"))
    record = observer.record()
    assert len(record.steps) == 3
    assert record.adapter == ()
    assert judged(record).verdict.outcome is not Outcome.PASSED


@pytest.mark.parametrize("accumulation", [1, 2])
def test_observing_changes_nothing(loop: Loop, accumulation: int) -> None:
    """The trained bits are the same without an observer."""
    observed, alone = loops.model(), loops.model()
    loop(observed, steps=3, accumulation=accumulation, fresh=loops.model).record()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("micro_batch", "before_step", "after_step"):
            patch.setattr(Observer, name, lambda self, *args, **kwargs: None)
        loop(alone, steps=3, accumulation=accumulation)
    assert all(map(torch.equal, observed.state_dict().values(), alone.state_dict().values()))


def test_everything_is_put_back(loop: Loop) -> None:
    """No hook stays on the model or the optimizer, no method stays wrapped."""
    model = loops.model()
    optimizer = loops.adam(model)
    with Observer(model, optimizer):
        pass
    hooks = [m._forward_hooks | m._forward_pre_hooks for m in model.modules()]
    assert not any(hooks)
    assert not optimizer._optimizer_step_pre_hooks
    loop(model, steps=1)
    assert not any(m._forward_hooks | m._forward_pre_hooks for m in model.modules())


def test_a_model_may_be_moved_after_it_was_given() -> None:
    """Many loops call `model.to(...)` late."""
    model = loops.model()
    optimizer, feed = loops.adam(model), iter(loops.batches())
    with Observer(model, optimizer) as observer:
        model.to(torch.bfloat16)
        for _ in range(2):
            loss = model(**next(feed)).loss
            observer.micro_batch(loss)
            loss.backward()
            observer.before_step()
            optimizer.step()
            observer.after_step()
            optimizer.zero_grad()
    assert observer.record().precision == "bf16-true"
    assert [s.effect for s in observer.record().steps] == ["applied", "applied"]


def test_the_record_survives_its_file(loop: Loop, tmp_path: Path) -> None:
    """The record equals the one that is read back."""
    record = loop(loops.model(), steps=2, fresh=loops.model).record()
    record.write(tmp_path / "record.json")
    assert RunRecord.read(tmp_path / "record.json") == record
