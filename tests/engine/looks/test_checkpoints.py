"""A checkpoint that is saved and loaded: what it does not give back is seen, and nothing is left behind."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.engine.looks import checkpoints
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import ends

TARGET = "tests.targets.ends"
SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
SEEN = {
    "moment_in_half_precision": (r"changes 1 of 90 state tensors of AdamW, .*:exp_avg_sq the most", True),
    "moments_exchanged": (r"changes 2 of 90 state tensors of AdamW, .*:exp_avg the most", True),
    "step_forgotten": (r"changes 30 of 90 state tensors .*:step the most: by 1 of its norm, 0 in place of 4", True),
    "rate_overwritten": (r"changes lr of group 0: the first is 0\.005, and was 0\.0", False),
    "schedule_not_saved": (r"does not give back 90 states of AdamW", True),
    "loading_left_out": (r"does not give back 90 states of AdamW", True),
}
HEALTHY = ("lion", "own_scheduler", "parameter_groups", "lora_plus", "evaluated_early_stopping", "streamed")
OPTIMIZERS = ("sgd", "adafactor", "rmsprop", "adagrad")


def looked(run_cell: Callable[..., JudgedRun], target: str, **config: object) -> JudgedRun:
    """A short run of `target` with the looks at checkpoints."""
    looks = ("checkpoints", "large_checkpoints")
    return run_cell(target, **{"looks": looks, "steps": 4, "questions": 0} | config)


def wrong(run: JudgedRun) -> list[str]:
    """What the invariant fails for."""
    return [message(f) for f in run.verdict.of("checkpoint_round_trip") if f.outcome is Outcome.FAILED]


@pytest.mark.parametrize("name", SEEN)
def test_what_is_not_given_back_is_seen(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """Bits of one tensor, an exchange, options and whole states; a state that changes has its cause."""
    pattern, named = SEEN[name]
    run = looked(run_cell, f"{TARGET}:{name}")
    assert any(re.search(pattern, m) for m in wrong(run)), wrong(run)
    causes = {d.mechanism for d in diagnose(run)}
    assert bool(causes & {"checkpoint_changes_state", "resume_loses_state"}) is named


@pytest.mark.parametrize("target", HEALTHY)
def test_a_sound_checkpoint_is_passed(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Whatever the optimizer, the schedule and the groups are."""
    run = looked(run_cell, f"tests.targets.healthy:{target}")
    assert wrong(run) == []
    assert run.record.checkpoint is not None
    assert run.record.checkpoint.values


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", ["fp16-mixed", "bf16-true"])
def test_any_optimizer_is_given_back(run_cell: Callable[..., JudgedRun], optimizer: str, precision: str) -> None:
    """Its states may have other types than the weights, or none at all."""
    run = looked(run_cell, SUMS, precision=precision, training_arguments={"optim": optimizer})
    assert wrong(run) == []
    assert [look.error for look in run.record.looks] == ["", ""]


def test_what_was_in_memory_is_put_back(run_cell: Callable[..., JudgedRun]) -> None:
    """Every state and option has the value that it had before the look."""
    run = looked(run_cell, f"{TARGET}:watched", precision="fp16-mixed")
    assert wrong(run) == []
    trainer, (optimizer, schedule) = ends.HELD["trainer"], ends.HELD["saved"]
    torch.testing.assert_close(trainer.optimizer.state_dict(), optimizer, rtol=0, atol=0)
    assert trainer.lr_scheduler.state_dict() == schedule
    assert trainer.accelerator.scaler.state_dict() == ends.HELD["scaler"]


def test_the_look_changes_nothing(run_cell: Callable[..., JudgedRun]) -> None:
    """The trained adapter is the same bits with and without the look."""
    plain, seen = (looked(run_cell, SUMS, looks=looks).record for looks in ((), ("checkpoints",)))
    assert plain.adapter_digest == seen.adapter_digest
    assert plain.losses == seen.losses


def test_an_exception_while_loading_is_no_verdict(run_cell: Callable[..., JudgedRun]) -> None:
    """An override may need what the guard did not save."""
    [finding] = looked(run_cell, f"{TARGET}:loading_raises").verdict.of("checkpoint_round_trip")
    assert finding.outcome is Outcome.NOT_EVALUATED
    assert finding.guards_own


def test_a_large_state_is_left_to_standard(run_cell: Callable[..., JudgedRun], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other look saves and loads it."""
    monkeypatch.setattr(checkpoints, "LARGEST", 1000)
    [finding] = looked(run_cell, SUMS, looks=("checkpoints",)).verdict.of("checkpoint_round_trip")
    assert finding.outcome is Outcome.NOT_EVALUATED
    assert "`large_checkpoints` of the tier standard" in message(finding)


def test_a_training_that_saves_the_model_alone_has_none(run_cell: Callable[..., JudgedRun]) -> None:
    """With save_only_model there is no state to give back."""
    run = looked(run_cell, SUMS, training_arguments={"save_only_model": True})
    [finding] = run.verdict.of("checkpoint_round_trip")
    assert "save_only_model" in message(finding)
