"""A bundle: the records of a session in one file, to bring home from the machine that made them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pytest_sftguard.records import RecordError, RunRecord, write_text
from pytest_sftguard.records.encoding import read_json

SCHEMA = 1
"""Number of the bundle's own format; the records inside have one of their own."""


def collect(paths: Iterable[Path]) -> list[tuple[str, RunRecord]]:
    """Return name and record of everything in `paths`, in order: record files, bundles, and folders of them.

    A folder stands for its `*.json` files; one that the guard made, such as `.sftguard`, for those of its `records`.
    A name is that of the record's test, if the file's name contains it. Raises RecordError for a path that is missing,
    empty or broken.
    """
    return [item for path in paths for item in _read_path(path)]


def references(record: RunRecord, others: Iterable[RunRecord]) -> dict[str, RunRecord]:
    """Return those of `others` that `record` can be compared with, by type of reference.

    The float32 reference differs in precision only. The batch split has the same precision and effective batch, and the
    largest other micro-batch.
    """
    siblings = [o for o in others if o is not record and not o.variant and _request(o) == _request(record)]
    found = {}
    plain = [o for o in siblings if o.precision == "fp32" and _batch(o) == _batch(record)]
    if plain and record.precision != "fp32":
        found["fp32"] = plain[0]
    splits = [o for o in siblings if o.precision == record.precision and _batch(o) != _batch(record)]
    splits = [o for o in splits if math.prod(_batch(o)) == math.prod(_batch(record))]
    if splits:
        found["batch_split"] = max(splits, key=_batch)
    return found


def _request(record: RunRecord) -> tuple[Any, ...]:
    """Everything that a run was asked for apart from its cell."""
    return record.target, record.model, record.seed, record.max_steps, record.device.device_type, record.device.name


def _batch(record: RunRecord) -> tuple[int, int]:
    return record.per_device_train_batch_size, record.gradient_accumulation_steps


def write(path: Path, named: Sequence[tuple[str, RunRecord]]) -> None:
    """Write one file with all of `named`, completely or not at all. Raises OSError."""
    records = [{"name": name, "record": record.to_dict()} for name, record in named]
    data = {"bundle": SCHEMA, "sha256": _digest(records), "records": records}
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def _read_path(path: Path) -> list[tuple[str, RunRecord]]:
    if not path.is_dir():
        return _read_file(path)
    folder = path / "records" if (path / "records").is_dir() else path
    files = sorted(folder.glob("*.json"))
    if not files:
        raise RecordError(f"{path}: there is no record in this folder")
    return [item for file in files for item in _read_file(file)]


def _read_file(path: Path) -> list[tuple[str, RunRecord]]:
    def parse(data: Any) -> list[tuple[str, RunRecord]]:
        if isinstance(data, dict) and "bundle" in data:
            return _parse_bundle(data)
        record = RunRecord.from_dict(data)
        return [(_name(path.stem, record), record)]

    return read_json(path, parse)


def _parse_bundle(data: dict[str, Any]) -> list[tuple[str, RunRecord]]:
    if data["bundle"] != SCHEMA:
        raise RecordError(f"the bundle has schema {data['bundle']!r}, this version reads {SCHEMA}: make it again")
    records = data.get("records")
    if not isinstance(records, list) or not all(
        isinstance(r, dict) and r.keys() == {"name", "record"} for r in records
    ):
        raise RecordError("the bundle is corrupt: its records are not a list of names and records")
    if not records:
        raise RecordError("the bundle is empty")
    if data.get("sha256") != _digest(records):
        raise RecordError("the bundle is corrupt: its records changed after it was made (their sha256 differs)")
    return [(str(r["name"]), RunRecord.from_dict(r["record"])) for r in records]


def _digest(records: list[Any]) -> str:
    return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()


def _name(stem: str, record: RunRecord) -> str:
    """Return the test of a record file, whose name is the test's id and a digest of it."""
    test, found, _ = stem.rpartition(f"_{record.cell}-")
    return test if found else stem
