"""The program of each process of a `replicas` reference: it trains on its share of every batch.

    python -m pytest_sftguard.engine.replica CONFIG.json FOLDER

It writes its record to FOLDER, or why the target cannot be built in this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pytest_sftguard.engine import runner
from pytest_sftguard.engine.building.targets import TargetError
from pytest_sftguard.matrix import Cell, RunConfig


def main(config: str, folder: str) -> None:
    """Train as one of the processes."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_num_threads(1)
    data: dict[str, Any] = json.loads(Path(config).read_text(encoding="utf-8"))
    asked = RunConfig(**(data | {"cell": Cell(**data["cell"]), "looks": tuple(data["looks"])}))
    rank = os.environ["RANK"]
    try:
        runner.run(asked).write(Path(folder) / f"record-{rank}.json")
    except TargetError as error:
        (Path(folder) / f"refused-{rank}.txt").write_text(str(error), encoding="utf-8")
    sys.stdout.flush()
    # the other process may be gone already, and gloo would wait for it
    os._exit(0)


def _end_with(parent: int) -> None:
    """Exit when the process that started this one is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
