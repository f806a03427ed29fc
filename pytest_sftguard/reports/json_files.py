"""Records as JSON files, in a folder that git ignores by itself."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from pytest_sftguard.records import RunRecord, write_text


def write(folder: Path, nodeid: str, record: RunRecord) -> Path:
    """Write `record` of the test `nodeid` below `folder`, replacing that test's last one; OSError as it comes."""
    records = folder / "records"
    records.mkdir(parents=True, exist_ok=True)
    ignore = folder / ".gitignore"
    if not ignore.exists():
        write_text(ignore, "*\n")
    path = records / f"{_file_name(nodeid)}.json"
    record.write(path)
    return path


def _file_name(nodeid: str) -> str:
    """A file name that reads like the test's id, is short enough for any file system, and is its alone."""
    readable = re.sub(r"[^A-Za-z0-9.-]+", "_", nodeid.rpartition("/")[2]).strip("_")[-80:]
    return f"{readable}-{hashlib.sha256(nodeid.encode()).hexdigest()[:8]}"
