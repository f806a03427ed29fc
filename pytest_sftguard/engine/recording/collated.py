"""Contents of the micro-batches: a fingerprint of the rows of each step, and the number of tokens in its loss.

Nobody reads them before the training is over, so that they are computed for dozens of micro-batches together;
`gathering` says why that is faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.tensors import fingerprints
from pytest_sftguard.engine.tensors.reductions import to_host

_BATCHED = 64
"""Micro-batches that are computed together; copies of their integers take a few hundred kilobytes."""
_COPIED = ("input_ids", "attention_mask", "labels", "advantages")
_ABSENT = -1.0
"""Stands for what a micro-batch lacks; fingerprints and counts are never negative."""


class Collated:
    """Collects the inputs of micro-batches, each with the number of its step."""

    def __init__(self, padding: int | None = None) -> None:
        self._padding = padding
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []
        self._steps: list[int] = []
        self._rows: dict[int, list[float]] = defaultdict(list)
        self._tokens: dict[int, list[float]] = defaultdict(list)
        self._tied: dict[int, list[float]] = defaultdict(list)

    def add(self, step: int, inputs: Mapping[str, Any]) -> None:
        """Copy the relevant inputs of a micro-batch, because a loop may write the next one into the same memory."""
        copies = {key: t.detach().clone() for key in _COPIED if isinstance(t := inputs.get(key), Tensor)}
        self._waiting.append((step, copies))

    def due(self) -> Tensor:
        """Three numbers for each waiting micro-batch if there are enough of these, shape (3 n,), or else shape (0,).

        The caller transfers them to the host together with other numbers, and passes them to `take`.
        """
        return self._computed() if len(self._waiting) >= _BATCHED else torch.empty(0)

    def take(self, numbers: Sequence[float]) -> None:
        """Store the numbers from `due`, now on the host."""
        found = zip(self._steps, numbers[::3], numbers[1::3], numbers[2::3], strict=True) if numbers else ()
        for step, rows, tokens, tied in found:
            self._rows[step].append(rows)
            self._tokens[step].append(tokens)
            self._tied[step].append(tied)

    @torch.no_grad()
    def settle(self) -> None:
        """Compute the numbers of all micro-batches that still wait."""
        if self._waiting:
            self.take(to_host([self._computed()])[0])

    def rows(self, step: int) -> str | None:
        """Fingerprint of a settled step's rows; None if one of its micro-batches has none."""
        seen = self._rows.get(step)
        return None if not seen or _ABSENT in seen else fingerprints.joined(seen)

    def tokens(self, step: int) -> int | None:
        """Number of tokens in a settled step's loss; None if none of its micro-batches has labels."""
        seen = [n for n in self._tokens.get(step, ()) if n != _ABSENT]
        return int(sum(seen)) if seen else None

    def tied(self, step: int) -> bool:
        """Whether the advantages of all rows of a settled step are zero, because all rewards of each group tie."""
        seen = self._tied.get(step)
        return bool(seen) and all(n == 1.0 for n in seen)

    def _computed(self) -> Tensor:
        numbers: list[Tensor] = []
        batches = [inputs for _, inputs in self._waiting]
        for inputs, rows in zip(batches, fingerprints.fingerprints(batches, self._padding), strict=True):
            advantages = inputs.get("advantages")
            tied = None if advantages is None else (advantages == 0).all()
            numbers += [_number(rows), _number(fingerprints.supervised(inputs)), _number(tied)]
        device = next((n.device for n in numbers if n.device.type != "cpu"), torch.device("cpu"))
        self._steps = [step for step, _ in self._waiting]
        self._waiting = []
        return torch.stack([n.to(device) for n in numbers])


def _number(counted: Tensor | None) -> Tensor:
    return torch.tensor(_ABSENT, dtype=torch.float64) if counted is None else counted.double()
