"""What the micro-batches held: a fingerprint of the rows of each step, and how many tokens its loss is taken of.

Nothing of it is needed before the training is over, so that it is worked out for dozens of micro-batches together. A
training step pushes all other code out of the processor's caches; the first call of anything after it takes five times
as long as the next ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.tensors import fingerprints
from pytest_sftguard.engine.tensors.reductions import to_host

_TOGETHER = 64
"""Micro-batches that wait, with copies of their integers: some hundred kilobytes."""
_COUNTED = ("input_ids", "attention_mask", "labels")
_NEITHER = -1.0
"""In the place of what a micro-batch lacks; fingerprints and counts are never negative."""


class Collated:
    """Takes the inputs of one micro-batch after the other, by the number of their step."""

    def __init__(self, padding: int | None = None) -> None:
        self._padding = padding
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []
        self._steps: list[int] = []
        self._rows: dict[int, list[float]] = defaultdict(list)
        self._tokens: dict[int, list[float]] = defaultdict(list)

    def add(self, step: int, inputs: Mapping[str, Any]) -> None:
        """Copy what is needed of a micro-batch: loops write the next one into the same memory."""
        there = {key: t.detach().clone() for key in _COUNTED if isinstance(t := inputs.get(key), Tensor)}
        self._waiting.append((step, there))

    def due(self) -> Tensor:
        """Numbers of the micro-batches that wait, shape (2 n,), where enough of them do; else shape (0,).

        They leave the device with whatever else does, and come back by `take`.
        """
        return self._worked_out() if len(self._waiting) >= _TOGETHER else torch.empty(0)

    def take(self, numbers: Sequence[float]) -> None:
        """What `due` gave, on the host."""
        pairs = zip(self._steps, numbers[::2], numbers[1::2], strict=True) if numbers else ()
        for step, rows, tokens in pairs:
            self._rows[step].append(rows)
            self._tokens[step].append(tokens)

    @torch.no_grad()
    def settle(self) -> None:
        """Work out whatever still waits."""
        if self._waiting:
            self.take(to_host([self._worked_out()])[0])

    def rows(self, step: int) -> str | None:
        """Fingerprint of the rows of a step that is settled; None where a micro-batch of it has none."""
        seen = self._rows.get(step)
        return None if not seen or _NEITHER in seen else fingerprints.joined(seen)

    def tokens(self, step: int) -> int | None:
        """Tokens that the loss of a step that is settled is taken of; None where no micro-batch of it has labels."""
        seen = [n for n in self._tokens.get(step, ()) if n != _NEITHER]
        return int(sum(seen)) if seen else None

    def _worked_out(self) -> Tensor:
        numbers: list[Tensor] = []
        batches = [inputs for _, inputs in self._waiting]
        for inputs, rows in zip(batches, fingerprints.fingerprints(batches, self._padding), strict=True):
            numbers += [_number(rows), _number(fingerprints.supervised(inputs))]
        device = next((n.device for n in numbers if n.device.type != "cpu"), torch.device("cpu"))
        self._steps = [step for step, _ in self._waiting]
        self._waiting = []
        return torch.stack([n.to(device) for n in numbers])


def _number(counted: Tensor | None) -> Tensor:
    return torch.tensor(_NEITHER, dtype=torch.float64) if counted is None else counted.double()
