"""Generated trials in a process of their own: the plain measurement, then the guard's verdict in each tier."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sftguard import tiers
from pytest_sftguard.detection.trainings import reports
from pytest_sftguard.detection.trials import EFFECT, Seen, Trial
from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.rendering import message
from pytest_sftguard.reports import failure
from pytest_sftguard.reports._screen import Screen
from pytest_sftguard.session import Runs
from pytest_sftguard.verdicts import JudgedRun

if TYPE_CHECKING:
    from pytest_sftguard.engine.generated.axes import Healthy
    from pytest_sftguard.engine.generated.grammar import Draw, Setting

QUESTIONS = 16
"""Questions that a training is asked which is trained until its answers can be asked for."""


def fault_trial(seed: int, number: int, chosen: Sequence[str] = ()) -> Trial:
    """Compose the fault `number` of `seed`, measure its effect, and judge it in the tiers `chosen` if it has one."""
    from pytest_sftguard.engine.faults import NotApplicableError
    from pytest_sftguard.engine.faults._injected import injected
    from pytest_sftguard.engine.generated import plain
    from pytest_sftguard.engine.generated.faults import Generated, path_of
    from pytest_sftguard.engine.generated.grammar import compose

    draw = compose(seed, number)
    trial = Trial(
        id=f"fault-{draw.id}",
        where=draw.where,
        what=draw.what,
        magnitude=draw.magnitude,
        description=draw.describe(),
        training=draw.setting.name,
    )
    started = time.perf_counter()
    fault, resumed = Generated(draw), draw.where == "checkpoint"
    ask, reference, floors = _reference(draw.setting, resumed)
    with fault.inject(_target(draw.setting)) as faulty:
        outcome = plain.train(faulty, draw.setting, ask, resumed=resumed)
    trial = replace(trial, description=draw.describe(fault.subject), seconds=time.perf_counter() - started)
    if outcome.error:
        return replace(trial, discarded=f"the plain training ends in an exception: {outcome.error}")
    apart = plain.distances(outcome, reference)
    measure = max(apart, key=lambda m: apart[m] / floors[m])
    trial = replace(trial, measure=measure, effect=apart[measure], floor=floors[measure])
    if not apart[measure] > EFFECT * floors[measure]:
        return replace(trial, discarded="no effect above the noise")
    runs = Runs()
    for tier in chosen:
        known = _reported_as_it_is(draw.setting, tier)
        try:
            with injected(path_of(draw), draw.setting.target) as path:
                seen = _seen(runs, draw.setting, path, tier, known)
        except NotApplicableError as reason:
            return replace(trial, discarded=str(reason))
        trial = replace(trial, seen=trial.seen | {tier: seen})
    return trial


def replayed(healthy: bool, seed: int, number: int, chosen: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """What is known of one fault or training, and the guard's report in each tier: texts, and whether it passed."""
    trial = (healthy_trial if healthy else fault_trial)(seed, number, ())
    yield f"{trial.id} in {trial.training}: {trial.description}", True
    if trial.effect is not None:
        yield f"effect {trial.effect:.2g} on {trial.measure}, noise floor {trial.floor:.2g}", True
    if trial.discarded:
        yield f"a study discards it: {trial.discarded}", True
    for tier in chosen:
        run = healthy_run(seed, number, tier) if healthy else fault_run(compose_fault(seed, number), tier)
        outcome = run.verdict.outcome
        yield f"\n{tier}: {outcome.value}", True
        passed = not reports(run)
        yield failure.message(run, "", Screen()) if not passed else "nothing is reported", passed


def compose_fault(seed: int, number: int) -> Draw:
    """The draw with this number of the study with this seed."""
    from pytest_sftguard.engine.generated.grammar import compose

    return compose(seed, number)


def healthy_trial(seed: int, number: int, chosen: Sequence[str] = ()) -> Trial:
    """Compose the healthy training `number` of `seed`, see whether it learns, and judge it in the tiers `chosen`."""
    from pytest_sftguard.engine.generated import axes, learning

    training = axes.compose(seed, number)
    started = time.perf_counter()
    trial = Trial(
        id=f"healthy-{training.id}",
        training=training.architecture,
        description=training.describe(),
        axes=training.axes(),
        # of the tiers, only thorough resumes anything
        discarded=learning.not_healthy(training) or ("thorough" in chosen and learning.not_resumable(training)) or "",
        seconds=0.0,
    )
    trial = replace(trial, seconds=time.perf_counter() - started)
    if trial.discarded:
        return trial
    runs = Runs()
    return replace(trial, seen={tier: _seen(runs, *_healthy(training), tier, frozenset()) for tier in chosen})


def healthy_run(seed: int, number: int, tier: str) -> JudgedRun:
    """The judged run of one healthy training."""
    from pytest_sftguard.engine.generated import axes

    return _judged(Runs(), *_healthy(axes.compose(seed, number)), tier)


def _healthy(training: Healthy) -> tuple[Setting, str]:
    """What the guard is asked to run of `training`, and its path."""
    from pytest_sftguard.engine.generated.grammar import Setting
    from pytest_sftguard.engine.generated.trainings import path_of

    path = path_of(training)
    setting = Setting(
        name=training.id, target=path, precision=training.precision, batch=training.batch, steps=training.steps
    )
    return setting, path


def fault_run(draw: Draw, tier: str) -> JudgedRun:
    """The judged run of one draw, for the guard's full report."""
    from pytest_sftguard.engine.faults._injected import injected
    from pytest_sftguard.engine.generated.faults import path_of

    with injected(path_of(draw), draw.setting.target) as path:
        return _judged(Runs(), draw.setting, path, tier)


def _target(setting: Setting) -> Any:
    from pytest_sftguard.engine.building.targets import resolve

    return resolve(setting.target)


@functools.cache
def _reference(setting: Setting, resumed: bool) -> tuple[Any, Any, dict[str, float]]:
    """What is asked of a plain run of `setting`, the run without a fault, and the noise floors."""
    from pytest_sftguard.engine.generated import plain

    target = _target(setting)
    ask = plain.asked(target, setting)
    reference = plain.train(target, setting, ask, resumed=resumed)
    if reference.error:
        raise RuntimeError(f"the plain training of {setting.name!r} failed: {reference.error}")
    return ask, reference, plain.floor(target, setting, ask, reference)


@functools.cache
def _reported_as_it_is(setting: Setting, tier: str) -> frozenset[str]:
    """Invariants that report something of the training without a fault; they detect none."""
    return frozenset(_seen(Runs(), setting, setting.target, tier, frozenset()).reported)


def _seen(runs: Runs, setting: Setting, path: str, tier: str, known: frozenset[str]) -> Seen:
    """What the guard says of the training at `path` in `tier`, beyond what it says of it without a fault."""
    started = time.perf_counter()
    try:
        run = _judged(runs, setting, path, tier)
    # reported, so that the study goes on
    except Exception as error:
        logging.getLogger(__name__).debug("%s in %s", path, tier, exc_info=True)
        return Seen(error=f"{type(error).__name__}: {error}"[:300], seconds=time.perf_counter() - started)
    return seen(run, known, time.perf_counter() - started)


def seen(run: JudgedRun, known: frozenset[str], seconds: float) -> Seen:
    """What a verdict says, without the invariants `known` to report the training as it is."""
    found = [f for f in reports(run) if f.invariant not in known]
    return Seen(
        reported=tuple(dict.fromkeys(f.invariant for f in found)),
        named=tuple(d.mechanism for d in diagnose(run)) if found else (),
        message=f"{found[0].invariant}: {message(found[0])}" if found else "",
        seconds=seconds,
    )


def _judged(runs: Runs, setting: Setting, path: str, tier: str) -> JudgedRun:
    looks, references = tiers.asked(tier)
    config = RunConfig(
        cell=Cell(setting.precision, *setting.batch),
        target=path,
        steps=setting.steps,
        device="cpu",
        questions=QUESTIONS * setting.asks,
        training_arguments=dict(setting.arguments),
        looks=looks,
    )
    return runs.compared(config, load_invariants(), references)
