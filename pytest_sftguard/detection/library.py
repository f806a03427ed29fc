"""Library: every fault on one target, beside the target as it is."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_sftguard.detection.attempts import Attempt
from pytest_sftguard.detection.processes import Task, run_all
from pytest_sftguard.detection.summary import Detection, beside
from pytest_sftguard.detection.trainings import attempt, healthy

if TYPE_CHECKING:
    from pytest_sftguard.engine.faults import Fault


def detect(target: str, faults: Sequence[Fault], device: str, jobs: int) -> Detection:
    """Try `faults` on the target at the path `target` in up to `jobs` processes, with a progress bar on stderr.

    The target is also trained as it is in each of their precisions, and what is reported of that catches no fault.
    """
    from tqdm import tqdm

    settings = sorted({(f.precision, f.asks) for f in faults})
    tasks: list[Task[Attempt]] = [(healthy, (target, precision, asks, device)) for precision, asks in settings]
    tasks += [(attempt, (fault.id, target, device)) for fault in faults]
    with tqdm(total=len(tasks), unit="fault", disable=None, file=sys.stderr) as bar:

        def done(attempt: Attempt) -> None:
            bar.set_postfix_str(attempt.fault, refresh=False)
            bar.update()

        attempts = run_all(tasks, min(jobs, len(tasks)), done)
    plain, faulty = attempts[: len(settings)], attempts[len(settings) :]
    return Detection(target, (*plain, *beside(faulty, plain)), device)
