"""The cross-entropy of a few steps' logits with their labels, for a loss that no output of the model holds.

The first step has it in any case. Where somebody's own code computes the loss from the logits, three more steps tell a
loss that is multiplied from another loss. Nothing waits for the device, and nothing is kept of logits or graph.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.recording.first_step import FirstStep, logits_of
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.records import EntropyRecord

_LAST = 4
"""The last step that is looked at: with the first one, four losses that differ. One would do for no rule, three do."""
_IGNORED = -100
_TOKENS = 256
"""Rows of logits that are widened to float32 together: 150 MB for a vocabulary of 150,000."""


class Entropies:
    """Computes the cross-entropy of micro-batches of `model`, if `first` has found that nobody else tells it."""

    def __init__(self, first: FirstStep, model: nn.Module) -> None:
        self._first, self._model = first, model
        self._seen: dict[int, list[tuple[Tensor, Tensor] | None]] = defaultdict(list)

    @contextlib.contextmanager
    def watching(self, step: int, inputs: Any) -> Iterator[None]:
        """Observe the computation of the loss of `inputs`, which may pop the labels, in the optimizer step `step`."""
        if step > _LAST or not self._first.told_by_logits_alone:
            yield
            return
        labels = inputs.get("labels") if hasattr(inputs, "get") and "shift_labels" not in inputs else None
        outputs: list[Any] = []
        hook = self._model.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            yield
        finally:
            hook.remove()
        with own_work:
            self._seen[step].append(self._of(outputs, labels))

    def _of(self, outputs: list[Any], labels: Any) -> tuple[Tensor, Tensor] | None:
        logits = logits_of(outputs[0]) if len(outputs) == 1 else None
        if isinstance(labels, Tensor) and logits is not None and logits.shape[:-1] == labels.shape:
            return self._summed(logits, labels)
        return None

    @own_work
    def records(self) -> tuple[EntropyRecord, ...]:
        """Records of the steps of which every micro-batch is known, without the first step."""
        found = []
        for step, seen in sorted(self._seen.items()):
            pairs = [(float(total), int(count)) for total, count in (s for s in seen if s is not None)]
            if len(pairs) == len(seen) and all(count for _, count in pairs):
                means = tuple(total / count for total, count in pairs)
                found.append(EntropyRecord(step=step, micro=means, tokens=tuple(count for _, count in pairs)))
        return tuple(found)

    @torch.no_grad()
    def _summed(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the labels that count, and their number, as tensors on the device of the logits."""
        labels = labels.to(logits.device, non_blocking=True)
        if self._first.shifts:
            logits, labels = logits[:, :-1], labels[:, 1:]
        # an index that is out of range would lose the device
        wanted = torch.where((labels >= 0) & (labels < logits.shape[-1]), labels, _IGNORED)
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        with torch.autocast(logits.device.type, enabled=False):
            for row, marks in zip(logits.detach(), wanted, strict=True):
                for part, chosen in zip(*(torch.split(t, _TOKENS) for t in (row, marks)), strict=True):
                    total += self._first.cross_entropy(part.float(), chosen)
        return total, (wanted != _IGNORED).sum()
