"""Measures what the plugin costs a session that trains nothing; writes a table of docs/performance.md.

    python -m tools.benchmarks.silence_cost --write   (half a minute)

The plugin is imported in fresh processes in which pytest stands ready, as it does when pytest loads it. Sessions of
pytest over a file of plain tests, with the plugin and without, take turns in one process, and in processes of their
own. An audit hook of Python counts the processes that a session starts.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tools.benchmarks.pages import publish, where

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "performance.md"
PLUGIN = "pytest_sftguard.plugin"
TESTS = "import pytest\n\n\n@pytest.mark.parametrize('i', range(50))\ndef test_plain(i):\n    assert i >= 0\n"
HEAVY = ("torch", "transformers", "peft", "accelerate", "numpy")

IMPORT = f"""
import time, pytest
began = time.perf_counter()
import {PLUGIN}
print(time.perf_counter() - began)
"""
"""What a fresh process is asked: the seconds of the import alone."""

WATCHED = f"""
import json, os, sys
started = []
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system")
sys.addaudithook(lambda event, args: started.append(event) if event in STARTS else None)
import pytest
code = pytest.main(sys.argv[1:])
print(json.dumps({{"code": int(code), "started": started, "heavy": [n for n in {HEAVY!r} if n in sys.modules],
                   "plugin": "{PLUGIN}" in sys.modules}}))
"""
"""A session that tells afterwards which processes it started, and what it imported."""


def options(folder: Path, plugin: bool) -> list[str]:
    """The arguments of a session; other people's plugins stay out of it."""
    return [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        "-c",
        os.devnull,
        *(["-p", PLUGIN] if plugin else []),
        str(folder),
    ]


def imported() -> float:
    """Seconds of the import in a fresh process."""
    return float(subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, check=True, capture_output=True).stdout)


def session(folder: Path, plugin: bool) -> float:
    """Seconds of a session within this process."""
    gc.collect()
    began = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main(options(folder, plugin))
    seconds = time.perf_counter() - began
    if code:
        raise SystemExit(f"the session ended with {code!r}")
    return seconds


def process(folder: Path, plugin: bool) -> float:
    """Seconds of a process with one session."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "pytest", *options(folder, plugin)], check=True, capture_output=True)
    return time.perf_counter() - began


def seen(folder: Path) -> str:
    """What a session with the plugin starts and imports."""
    command = [sys.executable, "-c", WATCHED, *options(folder, True)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    if told["code"] or not told["plugin"]:
        raise SystemExit(f"the session did not run as it should: {told}")
    return (
        f"Processes started by a session with the plugin: {len(told['started'])}. Of {', '.join(HEAVY)} it imported"
        f" {', '.join(told['heavy']) or 'none'}."
    )


def row(name: str, seconds: list[float], to: list[float] | None = None) -> str:
    """A line of the table, milliseconds."""
    low, middle, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
    ratio = f"{middle / 1e3 / statistics.median(to):.3f}" if to else ""
    return f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} | {ratio} |"


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="runs of each (default 30)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    asked = parser.parse_args()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.environ["PYTHONPATH"] = str(ROOT)
    found: dict[str, list[float]] = {k: [] for k in ("import", "with", "without", "process with", "process without")}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_plain.py").write_text(TESTS)
        # whatever the disk must read first
        for plugin in (True, False):
            session(folder, plugin), process(folder, plugin), imported()
        for number in range(asked.rounds):
            found["import"].append(imported())
            for plugin in (True, False) if number % 2 else (False, True):
                found["with" if plugin else "without"].append(session(folder, plugin))
                found["process with" if plugin else "process without"].append(process(folder, plugin))
        told = seen(folder)
    lines = [
        "| | median (ms) | quartiles | with / without |",
        "|---|---|---|---|",
        row("import of the plugin, pytest imported before", found["import"]),
        row("session of 50 plain tests in a running process, without the plugin", found["without"]),
        row("the same with the plugin", found["with"], found["without"]),
        row("process with that session, without the plugin", found["process without"]),
        row("the same with the plugin", found["process with"], found["process without"]),
        "",
        f"{told} {where()}; {asked.rounds} runs of each, in turns.",
    ]
    made = "\n".join(lines)
    publish(PAGE, "silence", made, write=asked.write)


if __name__ == "__main__":
    main()
