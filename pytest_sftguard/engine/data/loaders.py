"""What a data loader tells: the rows of a micro-batch, its sampler, and the rows of its data set, one by one."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from pytest_sftguard.engine.tensors.fingerprints import content_fingerprints, row_fingerprints

_READ_ROWS = 8192
"""Rows of a data set that are read again: those of a usual test, in a second."""
_READ_SECONDS = 5.0
"""Time after which a slow data set is read no further."""


def torch_loader(loader: Any) -> Any:
    """The torch DataLoader in `loader`, which may be one or wrap one; None if there is none."""
    if isinstance(loader, DataLoader):
        return loader
    held = vars(loader).values() if hasattr(loader, "__dict__") else ()
    return next((v for v in held if isinstance(v, DataLoader)), None)


def rows_per_batch(loader: Any) -> int | None:
    """Number of rows that a DataLoader collates into one batch; None if it does not tell."""
    found = getattr(loader, "batch_size", None)
    if found is None:
        found = getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def length(dataset: Any) -> int | None:
    """Number of rows of a data set; None for a stream."""
    try:
        return None if is_stream(dataset) else len(dataset)
    except TypeError:
        return None


def is_stream(dataset: Any) -> bool:
    """Whether the rows of `dataset` come in an order of its own."""
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def may_repeat(loader: Any) -> str:
    """Why the sampler of a DataLoader may draw a row twice within an epoch; empty if it draws each row once."""
    if is_stream(loader.dataset):
        return ""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None) or getattr(loader, "sampler", None)
    if isinstance(sampler, RandomSampler):
        return "the sampler draws with replacement" if sampler.replacement else ""
    once = (SequentialSampler, SubsetRandomSampler, DistributedSampler)
    if isinstance(sampler, once) or type(sampler).__name__ in ("LengthGroupedSampler", "SeedableRandomSampler"):
        return ""
    return f"it is not known whether {type(sampler).__name__} draws a row twice"


def counted(loader: Any, rows: int, padding: int | None) -> tuple[Counter[int], int]:
    """How often each row is in the data set of a DataLoader, by its fingerprint, and how many rows were read.

    Reads at most `rows` rows of a stream, in this process, and 8,192 of any data set. Each is collated alone. Raises
    what the data set and the collator raise.
    """
    stream = is_stream(loader.dataset)
    items: Iterator[Any] = iter(loader.dataset) if stream else (loader.dataset[i] for i in range(len(loader.dataset)))
    found: Counter[int] = Counter()
    read, begun = 0, time.monotonic()
    for item in islice(items, min(rows, _READ_ROWS) if stream else _READ_ROWS):
        inputs = loader.collate_fn([item])
        numbers = row_fingerprints(inputs, padding)
        numbers = content_fingerprints(inputs) if numbers is None else numbers
        found.update([] if numbers is None else map(int, numbers.tolist()))
        read += 1
        if time.monotonic() - begun > _READ_SECONDS:
            break
    return found, read
