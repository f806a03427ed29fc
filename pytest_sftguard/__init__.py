"""pytest-sftguard: judges the numbers of LoRA fine-tunings in pytest.

What is named here is public, and all that the documentation uses. Each name is imported when it is first used, so that
importing the package costs neither torch nor pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_sftguard.engine.machine.simulate import simulated_hardware
    from pytest_sftguard.engine.recording.observer import Observer, observe_accelerate
    from pytest_sftguard.hardware import FailedQuery, HardwareProfile
    from pytest_sftguard.loops import judged
    from pytest_sftguard.records import RunRecord
    from pytest_sftguard.strategies import hardware_profiles
    from pytest_sftguard.verdicts import Finding, Invariant, Outcome, Reason

__version__ = "0.1.0"

__all__ = [
    "FailedQuery",
    "Finding",
    "HardwareProfile",
    "Invariant",
    "Observer",
    "Outcome",
    "Reason",
    "RunRecord",
    "__version__",
    "hardware_profiles",
    "judged",
    "observe_accelerate",
    "simulated_hardware",
]

_MODULES = {
    "FailedQuery": "hardware",
    "Finding": "verdicts",
    "HardwareProfile": "hardware",
    "Invariant": "verdicts",
    "Observer": "engine.recording.observer",
    "Outcome": "verdicts",
    "Reason": "verdicts",
    "RunRecord": "records",
    "hardware_profiles": "strategies",
    "judged": "loops",
    "observe_accelerate": "engine.recording.observer",
    "simulated_hardware": "engine.machine.simulate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
