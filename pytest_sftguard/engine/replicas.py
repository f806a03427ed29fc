"""The same training in two processes on the CPU: fresh interpreters, joined by gloo, each with half of every batch.

Each process runs `replica.py`, which writes its record to a folder, or why the target cannot be built there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pytest_sftguard.engine.tensors.fingerprints import joined_texts
from pytest_sftguard.matrix import RunConfig
from pytest_sftguard.records import ErrorRecord, FirstStepRecord, RunRecord, StepRecord

_PROCESSES = 2
_MARK = "SFTGUARD_REPLICA"
_TIMEOUT_S = 900.0
_LINES = 3
"""Last lines of a process's output that its error quotes."""


def is_one() -> bool:
    """Return whether this process is one of several that train together."""
    return _MARK in os.environ


def run(config: RunConfig, record: RunRecord) -> RunRecord:
    """Train in two processes; return `record` with the mean of their losses and the rows of both."""
    with tempfile.TemporaryDirectory(prefix="sftguard-") as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)), encoding="utf-8")
        ended = _train_together(folder)
        refused = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("refused-*.txt"))]
        if refused:
            return dataclasses.replace(record, not_run=f"a fresh process cannot build it: {refused[0]}")
        paths = [folder / f"record-{rank}.json" for rank in range(_PROCESSES)]
        records = [RunRecord.read(p) for p in paths if p.exists()]
        error = next((r.error for r in records if r.error), None) or ended
        if error is not None or len(records) != _PROCESSES:
            error = error or ErrorRecord(stage="train", type="RuntimeError", message="a process left no record")
            return dataclasses.replace(records[0] if records else record, error=error)
    return _together(records)


def _together(records: list[RunRecord]) -> RunRecord:
    """Return one record of what all processes saw."""
    steps = tuple(map(_step_together, zip(*(r.steps for r in records), strict=False)))
    digests = tuple(r.adapter_digest for r in records)
    first = _first_together([r.first_step for r in records if r.first_step is not None])
    return dataclasses.replace(records[0], steps=steps, replica_digests=digests, first_step=first)


def _first_together(parts: list[FirstStepRecord]) -> FirstStepRecord | None:
    """Return the micro-batches of all processes as those of one step; None where a process saw none."""
    if len(parts) != _PROCESSES:
        return None
    tokens = tuple(n for p in parts for n in p.micro_tokens)
    losses = tuple(loss for p in parts for loss in p.micro_token_losses)
    labels = [p.labels for p in parts if p.labels is not None]
    known = len(labels) == len(parts) and bool(sum(tokens))
    return FirstStepRecord(
        random=max((p.random for p in parts), key=("", "adapter", "model").index),
        micro_tokens=tokens if known else (),
        micro_token_losses=losses if known else (),
        labels=sum(labels) if known else None,
        token_loss=math.fsum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens) if known else None,
        label_entropy=parts[0].label_entropy if known else None,
    )


def _step_together(parts: tuple[StepRecord, ...]) -> StepRecord:
    losses = [math.nan if p.loss is None else p.loss for p in parts]
    tokens = [p.supervised_tokens for p in parts if p.supervised_tokens is not None]
    return dataclasses.replace(
        parts[0],
        loss=sum(losses) / len(losses),
        micro_losses=tuple(sum(m) / len(m) for m in zip(*(p.micro_losses for p in parts), strict=False)),
        rows=joined_texts(p.rows for p in parts),
        supervised_tokens=sum(tokens) if len(tokens) == len(parts) else None,
    )


def _train_together(folder: Path) -> ErrorRecord | None:
    """Start the processes and wait for them; return an error where one failed or all took too long."""
    environment = os.environ | {
        _MARK: "1",
        "WORLD_SIZE": str(_PROCESSES),
        "LOCAL_WORLD_SIZE": str(_PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": _loopback(),
        # the error of a process that is killed quotes what it printed before
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
    }
    command = [sys.executable, "-m", "pytest_sftguard.engine.replica", str(folder / "config.json"), str(folder)]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(_PROCESSES):
            with open(folder / f"output-{rank}.txt", "wb") as output:
                process = subprocess.Popen(
                    command,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                running.append(process)
        return _waited_for(running, folder)
    finally:
        for process in running:
            _end(process)


def _waited_for(running: list[subprocess.Popen[bytes]], folder: Path) -> ErrorRecord | None:
    end = time.monotonic() + _TIMEOUT_S
    while time.monotonic() < end:
        codes = [p.poll() for p in running]
        broken = next((rank for rank, code in enumerate(codes) if code), None)
        if broken is not None:
            printed = _last_lines(folder / f"output-{broken}.txt")
            message = f"process {broken} of {len(running)} ended with status {codes[broken]}: {printed}"
            return ErrorRecord(stage="train", type="ReplicaError", message=message[:500])
        if None not in codes:
            return None
        time.sleep(0.05)
    printed = _last_lines(folder / "output-0.txt")
    message = f"still running after {_TIMEOUT_S:.0f} s: {printed}"
    return ErrorRecord(stage="train", type="TimeoutError", message=message[:500])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, and all that it started, if it is still running."""
    if process.poll() is None:
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _last_lines(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    return " | ".join(line.strip() for line in lines[-_LINES:] if line.strip())


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _loopback() -> str:
    """Return the name of the loopback interface: without it, gloo asks the resolver for this machine's name."""
    names = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    return next((n for n in ("lo", "lo0") if n in names), "lo")
