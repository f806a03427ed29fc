"""Records as JSON files, in a folder that git ignores by itself."""

from __future__ import annotations

import hashlib
import re
import tempfile
from pathlib import Path

from pytest_sftguard.records import RunRecord, write_text


def prepare(folder: Path) -> Path:
    """Make the folder of records below `folder`, and show that files can be written there; OSError where not."""
    records = folder / "records"
    records.mkdir(parents=True, exist_ok=True)
    if not (folder / ".gitignore").exists():
        write_text(folder / ".gitignore", "*\n")
    with tempfile.TemporaryFile(dir=records) as file:
        file.write(b"writable")
    return records


def write(folder: Path, nodeid: str, record: RunRecord) -> Path:
    """Write `record` of the test `nodeid` below `folder`, replacing that test's last one; OSError as it comes."""
    path = prepare(folder) / f"{_file_name(nodeid)}.json"
    record.write(path)
    return path


def _file_name(nodeid: str) -> str:
    """A file name that reads like the test's id, is short enough for any file system, and is its alone."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", nodeid.rpartition("/")[2]).strip("_")[-80:]
    return f"{readable}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"
