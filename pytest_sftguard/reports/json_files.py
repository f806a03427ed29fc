"""Records as JSON files, in a folder that git ignores."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

from pytest_sftguard.records import write_text
from pytest_sftguard.verdicts import JudgedRun


def prepare(folder: Path) -> None:
    """Make the folder of records, and write a file there."""
    records = folder / "records"
    records.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        write_text(folder / ".gitignore", "*\n")
    with tempfile.TemporaryFile(dir=records) as file:
        file.write(b"writable")


def write(folder: Path, nodeid: str, run: JudgedRun) -> None:
    """Write the record of `run`, replacing that of the test's last run."""
    prepare(folder)
    run.record.write(folder / "records" / f"{_file_name(nodeid)}.json")


def _file_name(nodeid: str) -> str:
    """A file name that reads like the test's id, fits any file system, and belongs to no other test."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", nodeid.rpartition("/")[2]).strip("_")[-80:]
    return f"{readable}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"
