"""Series: what a training's log holds, as plain numbers, whatever its format was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a log: what was logged at one step."""

    place: int
    """Its place in the log, from 1."""
    step: int | None = None
    """Optimizer steps taken when it was logged. None: the log does not say."""
    values: Mapping[str, float] = field(default_factory=dict)
    """Every number under the Trainer's name for it, such as `grad_norm`, NaN and infinity among them."""
    empty: tuple[str, ...] = ()
    """Names that stand in the log with null."""
    rounded: bool = False
    """Whether its numbers are texts of four significant digits, as transformers 5 prints them."""

    @property
    def loss(self) -> float | None:
        """The training loss."""
        return self.values.get("loss")

    @property
    def grad_norm(self) -> float | None:
        """The norm of the gradients before clipping, as the Trainer logs it."""
        return self.values.get("grad_norm")

    @property
    def learning_rate(self) -> float | None:
        """The learning rate of the first group of parameters."""
        return self.values.get("learning_rate")

    @property
    def is_training(self) -> bool:
        """Whether it is about training steps, and no evaluation or summary."""
        return bool({"loss", "grad_norm"} & {*self.values, *self.empty})


@dataclass(frozen=True, kw_only=True)
class Log:
    """A log: its entries, and what its file holds beside them."""

    source: str
    """The file that it was read from."""
    form: str
    """Its format, in words."""
    entries: tuple[Entry, ...] = ()
    """Its entries, in their order."""
    global_step: int | None = None
    """Optimizer steps that the training had taken."""
    max_steps: int | None = None
    """Optimizer steps that it was to take."""
    logging_steps: float | None = None
    """Optimizer steps between two entries; below 1 a share of all steps."""
    crash: str = ""
    """Last line of the last traceback in it. Empty: there is none."""

    @property
    def trainings(self) -> tuple[tuple[Entry, ...], ...]:
        """The entries about training steps, of each training apart: a step or an epoch that falls begins another."""
        parts: list[list[Entry]] = []
        for entry in self.entries:
            if not entry.is_training:
                continue
            if not parts or _falls(parts[-1][-1], entry):
                parts.append([])
            parts[-1].append(entry)
        return tuple(map(tuple, parts))


def _falls(before: Entry, after: Entry) -> bool:
    """Whether `after` is of another training than `before`."""
    if before.step is not None and after.step is not None:
        return after.step < before.step
    return after.values.get("epoch", 0.0) < before.values.get("epoch", 0.0)
