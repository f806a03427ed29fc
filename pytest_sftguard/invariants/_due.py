"""Which factors must be trained at a step: what a sound step may leave out, for all invariants alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from pytest_sftguard.records import RunRecord, StepRecord, TensorRecord
from pytest_sftguard.verdicts import Finding, General, Invariant


def without_tensors(invariant: Invariant, record: RunRecord) -> Finding | None:
    """The finding where a record of steps holds no trainable tensor: there was none, or none could be looked at."""
    if record.adapter:
        return None
    if record.adapter_out_of_reach:
        return invariant.not_evaluated(General.OUT_OF_REACH)
    return invariant.failed(General.NO_TRAINABLE, observed=0, limit="at least 1")


class Due:
    """Follows a training step by step.

    Where a factor starts at zero it shields the others of its layer, so that those are due from the second effective
    step on; where none does, all are due from the first. A layer that no token passed through in a step, or none that
    mattered, is not due there, and has its first step later.
    """

    def __init__(self, record: RunRecord) -> None:
        self._zero_start = {t.name for t in record.adapter if t.initial_norm == 0}
        self._tensors = record.adapter
        self._effective = 0
        self._silent, self._idle = Counter[str](), Counter[str]()

    def among(self, names: Iterable[str], step: StepRecord) -> list[str]:
        """Those of `names` that are factors, and due at `step`."""
        silent = silent_at(self._tensors, step)
        return [n for n in names if is_factor(n) and n not in silent and self._unshielded(n)]

    def effective(self, step: StepRecord) -> None:
        """`step` was an effective one; the next that is asked for comes after it."""
        self._effective += 1
        self._idle.update(step.idle.first)
        self._silent.update(silent_at(self._tensors, step))

    def over_the_run(self) -> Iterator[TensorRecord]:
        """The tensors, factors or not, that must have been trained by the end.

        An expert may be chosen for tokens alone that no loss depends on, as those of a prompt in the last layer, where
        the router gave others something to learn.
        """
        heard = {t.chosen_from for t in self._tensors if self._silent[t.name] < self._effective}
        for t in self._tensors:
            resting = self._silent if t.chosen_from and t.chosen_from in heard else self._idle
            uses = self._effective - resting[t.name]
            if uses > 1 or (uses and (t.initial_norm == 0 or not self._zero_start)):
                yield t

    def _unshielded(self, name: str) -> bool:
        return self._effective > self._silent[name] or not self._zero_start or name in self._zero_start


def silent_at(tensors: Iterable[TensorRecord], step: StepRecord) -> set[str]:
    """Tensors that a sound step may leave as they are: their layer, an expert perhaps, was given nothing to learn.

    No token passed through it, or none that the loss depends on, so that all its gradients are there and exactly zero.
    In AdaLoRA, the factors of a layer whose ranks are all taken away have no gradient, and the values between them do.
    """
    zero = set(step.zero_gradients.first)
    heard = {layer_of(t.name) for t in tensors if t.name not in zero}
    valued = {layer_of(t.name) for t in tensors if ".lora_E" in t.name}
    return {
        *step.idle.first,
        *(n for n in zero if layer_of(n) not in heard or (layer_of(n) in valued and "lora_E" not in n)),
    }


def at_rest(record: RunRecord) -> set[str]:
    """Names of the experts' layers that had nothing to learn in the whole run, up to their factors' names."""
    due = Due(record)
    for step in record.steps:
        if step.effect == "applied":
            due.effective(step)
    learning = {layer_of(t.name) for t in due.over_the_run()}
    return {layer_of(t.name) for t in record.adapter if t.chosen_from} - learning


def is_factor(name: str) -> bool:
    """Whether a tensor of this name is a low-rank factor of a linear layer."""
    return TensorRecord(name=name, dtype="", elements=0).is_factor


def layer_of(name: str) -> str:
    return name.partition(".lora_")[0]
