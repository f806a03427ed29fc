"""JUnit properties: scalars that a CI system can chart."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.verdicts import JudgedRun


def properties(run: JudgedRun) -> list[tuple[str, str]]:
    """Name and value of each property of a cell; a number that was not seen is left out."""
    record, verdict = run.record, run.verdict
    values: dict[str, object] = {
        "cell": record.cell,
        "verdict": verdict.outcome.value,
        "device": record.device.name,
        "failed": ",".join(dict.fromkeys(f.invariant for f in verdict.failures)),
        "steps": len(record.steps),
        "seconds": record.seconds,
    }
    if verdict.failures:
        values["cause"] = next((d.mechanism for d in diagnose(run)), "unknown")
    if record.steps:
        finite = [g for g in record.grad_norms if math.isfinite(g)]
        values |= {
            "grad_norm_min": min(finite, default=math.nan),
            "grad_norm_max": max(finite, default=math.nan),
            "grad_norm_nonfinite": len(record.grad_norms) - len(finite),
            "loss_first": record.losses[0],
            "loss_last": record.losses[-1],
        }
    if record.answers:
        values |= {"answers": len(record.answers), "answers_parsed": sum(a.is_number for a in record.answers)}
    return [(f"sftguard_{name}", str(value)) for name, value in values.items() if value is not None]
