"""Bundles: they lose nothing, and a broken one is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_sftguard import bundles
from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.records import RecordError, RunRecord
from pytest_sftguard.reports import json_files
from pytest_sftguard.verdicts import JudgedRun, Verdict

RECORD = RunRecord(
    cell="fp32-b2x4",
    precision="fp32",
    per_device_train_batch_size=2,
    gradient_accumulation_steps=4,
    max_steps=8,
    seed=0,
    target="a:b",
    device=HardwareProfile(device_type="cuda", name="A device"),
    not_run="needs 23.1 GiB",
)
OTHER = dataclasses.replace(RECORD, cell="bf16-mixed-b8x1", precision="bf16-mixed", max_grad_norm=float("nan"))


def test_a_bundle_holds_what_it_was_made_of(tmp_path: Path) -> None:
    """Names and records survive in their order, with numbers that are not finite."""
    bundles.write(tmp_path / "bundle.json", [("one", RECORD), ("two", OTHER)])
    found = bundles.collect([tmp_path / "bundle.json"])
    assert repr(found) == repr([("one", RECORD), ("two", OTHER)])


@pytest.mark.parametrize("below", ["", "records"])
def test_a_folder_gives_its_records_by_test(tmp_path: Path, below: str) -> None:
    """The guard's folder and its `records` give the same records, each under the name of its test."""
    for record in (RECORD, OTHER):
        run = JudgedRun(record, Verdict(()))
        json_files.write(tmp_path, f"tests/test_it.py::test_trains[{record.cell}]", run)
    found = bundles.collect([tmp_path / below])
    assert sorted((name, r.cell) for name, r in found) == [
        ("test_it.py_test_trains", "bf16-mixed-b8x1"),
        ("test_it.py_test_trains", "fp32-b2x4"),
    ]


def test_a_bundle_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the last step fails, the old bundle stays, without a temporary file."""
    bundles.write(tmp_path / "bundle.json", [("one", RECORD)])
    before = (tmp_path / "bundle.json").read_bytes()
    monkeypatch.setattr("os.replace", _no_space)
    with pytest.raises(OSError, match="No space left"):
        bundles.write(tmp_path / "bundle.json", [("two", OTHER)])
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d | {"bundle": 2}, "the bundle has schema 2, this version reads 1: make it again"),
        (lambda d: d | {"sha256": "0"}, "sha256 differs"),
        (lambda d: {"bundle": 1}, "its records are not a list of names and records"),
        (lambda d: d | {"records": [{"name": "one"}]}, "its records are not a list of names and records"),
        (lambda d: d | {"records": []}, "the bundle is empty"),
        (lambda d: _with_record(d, schema=99), "the record has schema 99, this version reads 2"),
        (lambda d: _with_record(d, seed="zero"), "record.seed: expected a value of type int, found 'zero'"),
        (lambda d: [d], "not an object with a schema number"),
    ],
)
def test_a_broken_bundle_is_refused(tmp_path: Path, spoil: Callable[[Any], Any], message: str) -> None:
    """The error names the file and the reason."""
    path = tmp_path / "bundle.json"
    bundles.write(path, [("one", RECORD)])
    path.write_text(json.dumps(spoil(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    with pytest.raises(RecordError, match=r"bundle\.json: ") as caught:
        bundles.collect([path])
    assert message in str(caught.value)


def test_every_truncated_bundle_is_refused(tmp_path: Path) -> None:
    """An incomplete transfer is never read as a smaller bundle."""
    path = tmp_path / "bundle.json"
    bundles.write(path, [("one", RECORD), ("two", OTHER)])
    whole = path.read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(RecordError, match=r"bundle\.json: cannot be read"):
            bundles.collect([path])


@pytest.mark.parametrize("made", [None, "folder"])
def test_nothing_to_read_is_an_error(tmp_path: Path, made: str | None) -> None:
    """A missing path and a folder without records raise RecordError."""
    if made:
        (tmp_path / "there").mkdir()
    with pytest.raises(RecordError, match=r"there is no (such file or folder|record in this folder)"):
        bundles.collect([tmp_path / "there"])


def _no_space(*_: object) -> None:
    raise OSError("No space left on device")


def _with_record(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    records = [{"name": "one", "record": data["records"][0]["record"] | changes}]
    return {"bundle": 1, "sha256": bundles._digest(records), "records": records}
