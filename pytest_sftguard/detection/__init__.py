"""Detection: whether the guard reports what the fault library injects, where it strikes, and why.

`python -m pytest_sftguard faults` runs it: one training for each fault, judged like any other.
"""

from pytest_sftguard.detection.attempts import HEALTHY, Attempt
from pytest_sftguard.detection.library import detect
from pytest_sftguard.detection.processes import run_all
from pytest_sftguard.detection.summary import Detection, beside
from pytest_sftguard.detection.trainings import attempt, healthy, reports, seen

__all__ = ["HEALTHY", "Attempt", "Detection", "attempt", "beside", "detect", "healthy", "reports", "run_all", "seen"]
