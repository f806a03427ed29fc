"""Trainings: a target is trained with a fault in it, or as it is, and judged; that makes an attempt."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_sftguard import tiers
from pytest_sftguard.detection.attempts import HEALTHY, Attempt
from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.rendering import message
from pytest_sftguard.session import CannotRunError, Runs
from pytest_sftguard.verdicts import Finding, JudgedRun

if TYPE_CHECKING:
    from pytest_sftguard.engine.faults import Fault

LEARNED = 100
"""Optimizer steps after which the built-in target has learned to add."""


def attempt(name: str, target: str, device: str = "cpu") -> Attempt:
    """Train the target at the path `target` with the fault `name` in it, and judge it in the tier `standard`."""
    from pytest_sftguard.engine.building.targets import resolve
    from pytest_sftguard.engine.faults import NotApplicableError, fault_named
    from pytest_sftguard.engine.faults._injected import injected

    fault = fault_named(name)
    known = Attempt(fault=fault.id, source=fault.source, injects=fault.injects)
    if fault.asks and resolve(target).questions is None:
        return replace(known, skipped="the target asks no questions")
    try:
        with injected(fault.id, target) as path:
            run = _judged(fault, path, device)
    except NotApplicableError as reason:
        return replace(known, skipped=str(reason))
    return replace(
        known,
        **seen(run, fault.tensor),
        expected=fault.reported_by,
        step=fault.step,
        tensor=fault.tensor,
        mechanism=fault.mechanism,
        silent=fault.silent,
    )


def healthy(target: str, precision: str, trained: bool, device: str = "cpu") -> Attempt:
    """Train the target as it is, of which nothing may be reported; if `trained`, until its answers can be asked for."""
    from pytest_sftguard.engine.faults import Fault

    steps = LEARNED if trained else Fault.steps
    cell = Cell(precision, *Fault.batch)
    run = _judged(Fault(), target, device, cell=cell, steps=steps, questions=16 * trained)
    return Attempt(fault=HEALTHY, injects="nothing: the target as it is", **seen(run, ""))


def _judged(fault: Fault, path: str, device: str, **changes: Any) -> JudgedRun:
    """The run that shows `fault`, but for `changes` of its RunConfig."""
    from pytest_sftguard.engine.faults import NotApplicableError

    looks, references = tiers.asked("standard", fault.looks)
    config = RunConfig(
        cell=Cell(fault.precision, *fault.batch),
        target=path,
        steps=fault.steps,
        device=device,
        questions=16 * fault.asks,
        training_arguments=dict(fault.arguments),
        looks=looks,
    )
    try:
        return Runs().compared(replace(config, **changes), load_invariants(), references)
    except CannotRunError as error:
        # A fault may find out only while the Trainer is built
        if isinstance(error.__cause__, NotApplicableError):
            raise error.__cause__ from None
        raise RuntimeError(f"{fault.id or 'the target as it is'} cannot be tried: {error}") from error


def seen(run: JudgedRun, tensor: str) -> dict[str, Any]:
    """What the verdict on `run` says, as fields of an Attempt; `tensor` is a part of a tensor's name."""
    found = reports(run)
    record = run.record
    return {
        "cell": record.cell,
        "precision": record.precision,
        "reported": tuple(dict.fromkeys(f.invariant for f in found)),
        "seen_at": min((f.step for f in found if f.step is not None), default=None),
        "pointed": bool(tensor) and any(f.mentions(tensor) for f in found),
        "named": tuple(d.mechanism for d in diagnose(run)),
        "seconds": sum(r.seconds or 0.0 for r in (record, *run.references.values())),
        "message": f"{found[0].invariant}: {message(found[0])}" if found else "",
    }


def reports(run: JudgedRun) -> list[Finding]:
    """The findings that keep `run` from passing: failures, and what had to be evaluated and could not be."""
    return [f for f in run.verdict.findings if f.doubts]
