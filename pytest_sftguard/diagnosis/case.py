"""What a diagnosis is made from: a judged run, read with an eye to causes, and the clues found in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pytest_sftguard.records import ErrorRecord, RunRecord, StepRecord
from pytest_sftguard.verdicts import Finding, General, Reason, Verdict

_OURS = (General.LOOK_BROKE, General.REFERENCE_BROKE, General.BROKEN, General.UNUSABLE)
"""Reasons that speak of the guard or of a user's invariant, and never of the training."""


@dataclass(frozen=True)
class Clue:
    """One thing that speaks for a mechanism, or against it."""

    text: str | Finding
    """What was seen: a sentence, or the finding that says it."""
    weight: int
    """How much it says; negative where it speaks against."""
    discriminates: bool = True
    """Whether it tells the mechanism from others, so that it counts towards naming it."""


def decisive(text: str | Finding) -> Clue:
    """A clue that no other mechanism explains."""
    return Clue(text, 9)


def sign(text: str | Finding) -> Clue:
    """A clue that few other mechanisms explain; two that do not follow from each other are enough."""
    return Clue(text, 4)


def hint(text: str | Finding) -> Clue:
    """A clue that agrees with the mechanism, and with others: it is shown, and names nothing."""
    return Clue(text, 1, discriminates=False)


def against(text: str | Finding) -> Clue:
    """A clue that the mechanism does not explain."""
    return Clue(text, -4)


@dataclass(frozen=True)
class Case:
    """A judged run with what a search for causes asks of it."""

    record: RunRecord
    """The run."""
    verdict: Verdict
    """What was said of it."""
    references: Mapping[str, RunRecord]
    """The other runs that it was compared with."""

    def failed(self, *what: str | Reason) -> list[Finding]:
        """Failed findings of an invariant, by its name, or with one of the reasons `what`.

        What the guard says of itself, such as a look that broke, is none of them.
        """
        reasons = [w for w in what if isinstance(w, Reason)]
        found = [f for f in self.verdict.failures if f.invariant in what or f.because(*reasons)]
        return [f for f in found if not f.because(*_OURS)]

    def doubted(self, invariant: str) -> list[Finding]:
        """The findings of `invariant` that failed, or that could not be decided and had to be."""
        return [f for f in self.verdict.of(invariant) if f.doubts and not f.because(*_OURS)]

    def first(self, condition: Callable[[StepRecord], bool]) -> StepRecord | None:
        """The first step of which `condition` holds."""
        return next((s for s in self.record.steps if condition(s)), None)

    def step(self, number: int | None) -> StepRecord | None:
        """The step with this number; None if there is none."""
        return self.first(lambda s: s.step == number)

    @property
    def error(self) -> ErrorRecord | None:
        """The exception that ended the run; None also where the guard raised it."""
        error = self.record.error
        return None if error is None or error.guards_own else error

    @property
    def lost(self) -> StepRecord | None:
        """The first step whose raw loss, in any micro-batch, is not finite."""
        return self.first(lambda s: not all(map(math.isfinite, s.micro_losses)))

    @property
    def poisoned(self) -> StepRecord | None:
        """The first step that left a weight or a moment that is not finite."""
        return self.first(lambda s: s.effect == "poisoned")

    @property
    def sound_until_lost(self) -> bool:
        """Whether every weight was finite when the loss was lost."""
        lost, poisoned = self.lost, self.poisoned
        return lost is not None and (poisoned is None or poisoned.step >= lost.step)

    @property
    def finite(self) -> bool:
        """Whether no loss, gradient of a step that was taken, weight or moment of the run was NaN or infinite."""
        taken = self.record.taken_steps
        return self.lost is None and self.poisoned is None and all(s.gradients_finite for s in taken)

    def trainables_are(self, *dtypes: str) -> bool:
        """Whether a trainable tensor has one of these types."""
        return any(t.dtype in dtypes for t in self.record.adapter)

    @property
    def half_trainables(self) -> bool:
        """Whether a trainable tensor or a state of the optimizer is in half precision."""
        optimizer = self.record.optimizer
        states = optimizer.state_dtypes if optimizer is not None else ()
        return self.trainables_are("float16", "bfloat16") or any(d in ("float16", "bfloat16") for d in states)

    @property
    def no_effect(self) -> bool:
        """Whether there were steps, and none of them changed a parameter."""
        return bool(self.record.steps) and not any(s.changed for s in self.record.steps)

    @property
    def repeats(self) -> bool:
        """Whether nothing says that a forward pass in evaluation mode gives other numbers the second time."""
        return self.record.decoding is None or self.record.decoding.repeated


def shown_by(*what: str | Reason, clue: Callable[[Finding], Clue] = decisive) -> Callable[[Case], list[Clue]]:
    """A mechanism's search for the first failure with a reason which says by itself what happens."""
    return lambda case: [clue(f) for f in case.failed(*what)[:1]]
