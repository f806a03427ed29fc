"""Contents of the micro-batches: how many rows they have, a fingerprint of each, and the number of tokens in the loss.

Nobody reads them before the training is over, so that they are computed for dozens of micro-batches together;
`gathering` says why that is faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.tensors import fingerprints
from pytest_sftguard.engine.tensors.reductions import to_host

_BATCHED = 64
"""Micro-batches that are computed together; copies of their integers take a few hundred kilobytes."""
_COPIED = ("input_ids", "attention_mask", "labels", "advantages")
_CONTENTS = "contents"
"""Key for the fingerprints of pictures and sounds, which are not copied."""
_ABSENT = -1.0
"""Stands for what a micro-batch lacks; fingerprints and counts are never negative."""
_KEPT_ROWS = 1 << 16
"""Rows whose fingerprints are kept: two megabytes."""
_ROWS_IN = ("input_ids", "labels", "pixel_values", "input_features", "input_values")
"""Inputs whose first dimension counts the rows, the surest first."""
_PACKED_BY = ("position_ids", "cu_seq_lens_q", "cu_seqlens", "seq_idx", "sequence_ids", "packed_seq_lens")
"""Inputs that tell apart several sequences in one row."""


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch, as far as it can be told from the shapes of its inputs."""

    step: int
    """Number of its optimizer step, from 1."""
    rows: int | None
    """Number of its rows; None if no input tells."""
    packed: bool
    """Whether a row may hold several sequences."""


class Collated:
    """Collects the inputs of micro-batches, each with the number of its step."""

    def __init__(self, padding: int | None = None) -> None:
        self.padding = padding
        """The id of padding tokens; None if it is not known."""
        self.micro_batches: list[MicroBatch] = []
        """Every micro-batch, in order."""
        self.fingerprints: list[tuple[int, ...] | None] = []
        """Those of the rows of each settled micro-batch, in order, of at most 65,536 rows; None if it has none."""
        self._kept_rows = 0
        self._waiting: list[tuple[int, dict[str, Tensor]]] = []
        self._shapes: list[tuple[int, int, bool]] = []
        self._rows: dict[int, list[float]] = defaultdict(list)
        self._tokens: dict[int, list[float]] = defaultdict(list)
        self._tied: dict[int, list[float]] = defaultdict(list)

    def add(self, step: int, inputs: Any) -> None:
        """Copy the relevant inputs of a micro-batch, because a loop may write the next one into the same memory."""
        self.micro_batches.append(MicroBatch(step, rows_of(inputs), is_packed(inputs)))
        inputs = inputs if hasattr(inputs, "items") else {}
        copies = {key: t.detach().clone() for key in _COPIED if isinstance(t := inputs.get(key), Tensor)}
        contents = None if "input_ids" in copies else fingerprints.content_fingerprints(inputs)
        if contents is not None:
            copies[_CONTENTS] = contents
        self._waiting.append((step, copies))

    def due(self) -> Tensor:
        """Numbers for each waiting micro-batch if there are enough of these, or else shape (0,).

        The caller transfers them to the host together with other numbers, and passes them to `take`.
        """
        return self._computed() if len(self._waiting) >= _BATCHED else torch.empty(0)

    def take(self, numbers: Sequence[float]) -> None:
        """Store the numbers from `due`, now on the host."""
        start = 0
        for step, count, tokens in self._shapes if numbers else ():
            rows = tuple(map(int, numbers[start : start + count]))
            counted, tied = numbers[start + count : start + count + 2]
            start += count + 2
            self._rows[step].append(fingerprints.added(rows) if tokens else _ABSENT)
            self._tokens[step].append(counted)
            self._tied[step].append(tied)
            if self._kept_rows <= _KEPT_ROWS:
                self._kept_rows += count
                self.fingerprints.append(rows or None)

    @torch.no_grad()
    def settle(self) -> None:
        """Compute the numbers of all micro-batches that still wait."""
        if self._waiting:
            self.take(to_host([self._computed()])[0])

    def rows(self, step: int) -> str | None:
        """Fingerprint of a settled step's rows of token ids; None if one of its micro-batches has none."""
        seen = self._rows.get(step)
        return None if not seen or _ABSENT in seen else fingerprints.joined(seen)

    def tokens(self, step: int) -> int | None:
        """Number of tokens in a settled step's loss; None if none of its micro-batches has labels."""
        seen = [n for n in self._tokens.get(step, ()) if n != _ABSENT]
        return int(sum(seen)) if seen else None

    def tied(self, step: int) -> bool:
        """Whether the advantages of all rows of a settled step are zero, because all rewards of each group tie."""
        seen = self._tied.get(step, [])
        return bool(seen) and all(n == 1.0 for n in seen)

    def _computed(self) -> Tensor:
        numbers: list[Tensor] = []
        self._shapes = []
        batches = [inputs for _, inputs in self._waiting]
        every = fingerprints.fingerprints(batches, self.padding)
        for (step, inputs), of_tokens in zip(self._waiting, every, strict=True):
            rows = inputs.get(_CONTENTS) if of_tokens is None else of_tokens
            self._shapes.append((step, 0 if rows is None else len(rows), of_tokens is not None))
            numbers += [] if rows is None else [rows.double()]
            advantages = inputs.get("advantages")
            tied = None if advantages is None else (advantages == 0).all()
            numbers += [_number(fingerprints.supervised(inputs)), _number(tied)]
        device = next((n.device for n in numbers if n.device.type != "cpu"), torch.device("cpu"))
        self._waiting = []
        return torch.cat([n.to(device) for n in numbers])


def rows_of(inputs: Any) -> int | None:
    """Number of rows of a micro-batch, the first dimension of its inputs; None if none of them tells.

    A list has a row in each element, unless these are tensors, such as the columns of a pair.
    """
    if isinstance(inputs, (list, tuple)) and not any(isinstance(x, Tensor) for x in inputs):
        return len(inputs)
    columns = dict(enumerate(inputs)) if isinstance(inputs, (list, tuple)) else inputs
    if not hasattr(columns, "items"):
        return None
    tensors = {str(k): v for k, v in columns.items() if isinstance(v, Tensor) and v.dim()}
    ids = [k for k in tensors if k.endswith("_ids")]
    named = next((k for k in (*_ROWS_IN, *ids) if k in tensors), None)
    if named is not None:
        return len(tensors[named])
    # nothing that has a usual name: what all of them have
    lengths = {len(t) for t in tensors.values()}
    return lengths.pop() if len(lengths) == 1 else None


def is_packed(inputs: Any) -> bool:
    """Whether a row of a micro-batch may hold several sequences: something tells them apart."""
    if not hasattr(inputs, "get"):
        return False
    mask = inputs.get("attention_mask")
    return any(name in inputs for name in _PACKED_BY) or (isinstance(mask, Tensor) and mask.dim() > 2)


def _number(counted: Tensor | None) -> Tensor:
    return torch.full((1,), _ABSENT, dtype=torch.float64) if counted is None else counted.double().reshape(1)
