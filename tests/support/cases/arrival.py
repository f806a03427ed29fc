"""Cases of rows that reach the model otherwise than the data set has them."""

from __future__ import annotations

import dataclasses
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import ArrivalRecord, DeviationRecord, LookRecord, RunRecord


def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802 - a table that needs the cell
    """What a healthy record holds of it."""
    return {"arrival": ArrivalRecord(micro_batches=4, arrived_rows=4 * cell.per_device_train_batch_size)}


def _arrived(*names: str, arrived: int = 7, unknown: int = 0, rows: int = 1) -> RunRecord:
    """A record of rows that deviate in these things."""
    from tests.support.canned import healthy

    deviations = tuple(
        DeviationRecord(name=n, rows=rows, step=2, row=1, place=5, places=3, compared=9, found=0, expected=1)
        for n in names
    )
    seen = ArrivalRecord(micro_batches=4, arrived_rows=arrived, unknown_rows=unknown, deviations=deviations)
    return dataclasses.replace(healthy(), arrival=seen)


def _lost() -> RunRecord:
    from tests.support.canned import healthy

    record = healthy()
    looks = tuple(x if x.name != "arrival" else LookRecord(name="arrival") for x in record.looks)
    return dataclasses.replace(record, looks=looks, arrival=None)


FAILURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "rows_arrive": {
        "ids": (
            _arrived("ids"),
            "step 2, row 1 of its micro-batch: 3 of 9 tokens are not those .* place 5: 0, .* has 1; 1 row of 8 differ",
        ),
        "all-rows": (_arrived("ids", arrived=0, rows=8), "3 of 9 tokens .*; 8 rows of 8 differ so"),
        "replaced": (_arrived("replaced"), "it has other tokens than the data set's row, which has as many"),
        "mask": (_arrived("mask"), "the attention mask is wrong at 3 of the row's 9 tokens"),
        "padding": (_arrived("padding"), "the attention mask lets in 3 of 9 places of padding"),
        "labels": (_arrived("labels"), "3 of 9 labels are not those of the data set's row"),
    }
}
NOT_EVALUATED: dict[str, dict[str, tuple[Any, ...]]] = {
    "rows_arrive": {"lost": (_lost(), "left nothing to judge by")},
}
MAY_BE_MISSING: dict[str, tuple[Any, ...]] = {
    "rows_arrive-none-found": (
        "rows_arrive",
        _arrived(arrived=0, unknown=8),
        "the collator makes rows of its own: none of 8 was found",
    ),
    "rows_arrive-most-replaced": (
        "rows_arrive",
        _arrived("replaced", arrived=1, rows=7),
        "the collator makes rows of its own",
    ),
}
