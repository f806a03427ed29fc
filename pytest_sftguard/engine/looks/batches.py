"""The micro-batches: whether they have the rows that the cell names, and each row as often as the data set has it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pytest_sftguard.engine.data import loaders
from pytest_sftguard.engine.looks import Look
from pytest_sftguard.engine.recording.collated import MicroBatch
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.records import BatchesRecord

_KEPT = 4096
"""Micro-batches whose number of rows is kept."""

_Epoch = list[tuple[MicroBatch, tuple[int, ...]]]
"""Micro-batches, each with the fingerprints of its rows."""


class Batches(Look[Started]):
    """Counts the rows of the micro-batches, and how often each came."""

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Count; read the data set again only where a row came twice within an epoch."""
        seen, loader = reached.recorder.seen_batches, loaders.torch_loader(reached.watch.loader)
        dataset = reached.trainer.train_dataset if loader is None else loader.dataset
        rows = [m.rows for m in seen.micro_batches[:_KEPT]]
        counts = [n for n in rows if n is not None]
        return {
            "batches": BatchesRecord(
                rows=tuple(counts) if len(counts) == len(rows) else (),
                packed=any(m.packed for m in seen.micro_batches),
                loader_rows=loaders.rows_per_batch(loader),
                dataset_rows=loaders.length(dataset),
                **self._repeats(reached, loader),
            )
        }

    def _repeats(self, reached: Started, loader: Any) -> dict[str, Any]:
        seen, per_epoch = reached.recorder.seen_batches, reached.watch.micro_batches_per_epoch
        pairs = list(zip(seen.micro_batches, seen.fingerprints, strict=False))
        known: _Epoch = [(batch, rows) for batch, rows in pairs if rows]
        if not known or len(known) < len(pairs):
            return {"uncounted": "the micro-batches have rows that cannot be told apart"}
        total = sum(len(rows) for _, rows in known)
        if loader is None:
            return {"uncounted": "the rows do not come out of a DataLoader"}
        stream = loaders.is_stream(loader.dataset)
        epochs = [known] if stream or not per_epoch else list(_split(known, per_epoch))
        if not any(_twice(epoch) for epoch in epochs):
            return {"compared_rows": total}
        if reason := loaders.may_repeat(loader):
            return {"uncounted": reason}
        try:
            held, read = loaders.counted(loader, total, seen.padding)
            again, _ = loaders.counted(loader, total, seen.padding)
        # a user's data set and collator may raise anything, as where a row cannot be collated alone
        except Exception as error:
            return {
                "uncounted": f"the data set cannot be read again: {type(error).__name__}: {first_line(error)[:150]}"
            }
        if held != again:
            return {"uncounted": "the data set and its collator make other rows each time"}
        # without an epoch's end, one pass is as long as the data set
        whole = [_first(known, read)] if stream or not per_epoch else epochs
        return {"compared_rows": total} | _too_often(whole, held)


def _split(batches: _Epoch, size: int) -> Iterator[_Epoch]:
    for start in range(0, len(batches), size):
        yield batches[start : start + size]


def _first(batches: _Epoch, rows: int) -> _Epoch:
    """The micro-batches with the first `rows` rows, a last one that ends beyond them left out."""
    found, count = [], 0
    for batch, prints in batches:
        count += len(prints)
        if count > rows:
            break
        found.append((batch, prints))
    return found


def _twice(epoch: _Epoch) -> bool:
    every = [row for _, rows in epoch for row in rows]
    return len(set(every)) < len(every)


def _too_often(epochs: Sequence[_Epoch], held: Counter[int]) -> dict[str, Any]:
    """The rows that came more often than `held` says, or why that is not known."""
    repeated: dict[int, tuple[int, int]] = {}
    unknown = 0
    for epoch in epochs:
        counts: Counter[int] = Counter()
        for batch, rows in epoch:
            counts.update(rows)
            for row in set(rows):
                unknown += counts[row] > 1 and not held[row]
                if held[row] and counts[row] > held[row] and row not in repeated:
                    repeated[row] = counts[row], batch.step
    if not repeated:
        return {"uncounted": "rows that came twice are not in the data set as they came"} if unknown else {}
    first, (_, step) = next(iter(repeated.items()))
    times = max(sum(rows.count(first) for _, rows in epoch) for epoch in epochs)
    return {"repeated_rows": len(repeated), "times": times, "allowed": held[first], "step": step}
