"""The terminal section: one line for each cell, then each finding."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pytest_sftguard.rendering import told
from pytest_sftguard.reports import failure
from pytest_sftguard.verdicts import General, JudgedRun, Outcome

_WORDS = {Outcome.PASSED: "ok", Outcome.FAILED: "FAILED", Outcome.NOT_EVALUATED: "not evaluated"}
_HEADINGS = ("precision", "batch", "verdict", "grad_norm", "raw loss", "answers", "seconds")


def section(runs: Sequence[tuple[str, JudgedRun, str]]) -> list[str]:
    """The lines for every cell, in order."""
    rows = [_HEADINGS, *(_row(run) for _, run, _ in runs)]
    if len({name for name, _, _ in runs}) > 1:
        rows = [("test", *rows[0]), *((name, *row) for (name, _, _), row in zip(runs, rows[1:], strict=True))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    made = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    devices = sorted({f"{r.record.device}, torch {r.record.versions.get('torch', '?')}" for _, r, _ in runs})
    made.append(f"on {'; '.join(devices)}")
    for _, run, rerun in runs:
        if run.verdict.failures:
            made.append("")
            made += failure.message(run, rerun).splitlines()
    for text in dict.fromkeys(_open_questions(runs)):
        made.append(text)
    return made


def _open_questions(runs: Sequence[tuple[str, JudgedRun, str]]) -> list[str]:
    """What was not evaluated, once for each invariant and reason; a run that ended early goes without saying.

    What a higher tier would have looked at fills one line.
    """
    reasons: dict[str, list[str]] = {}
    unasked: dict[str, None] = {}
    for run in (run for _, run, _ in runs if run.record.error is None):
        for finding in run.verdict.not_evaluated:
            if finding.because(General.NOT_ASKED):
                unasked[finding.invariant] = None
            else:
                reason = f"{finding.invariant}: not evaluated -- {told(finding)}"
                reasons.setdefault(reason, []).append(run.record.cell)
    made = [f"{reason} ({_cells(cells, len(runs))})" for reason, cells in reasons.items()]
    return [*made, f"left to a higher --sftguard-tier: {', '.join(unasked)}"] if unasked else made


def _cells(cells: list[str], total: int) -> str:
    return "every cell" if len(cells) == total and total > 1 else ", ".join(cells)


def _row(run: JudgedRun) -> tuple[str, ...]:
    record = run.record
    batch = f"{record.per_device_train_batch_size}x{record.gradient_accumulation_steps}"
    parsed = sum(a.is_number for a in record.answers)
    return (
        record.precision,
        batch,
        _WORDS[run.verdict.outcome],
        _range(record.grad_norms),
        f"{record.losses[0]:.4f} -> {record.losses[-1]:.4f}" if record.losses else "-",
        f"{parsed}/{len(record.answers)}" if record.answers else "-",
        "-" if record.seconds is None else f"{record.seconds:.1f}",
    )


def _range(values: list[float]) -> str:
    if not values:
        return "-"
    finite = [v for v in values if math.isfinite(v)]
    lost = len(values) - len(finite)
    text = f"{min(finite):.3g} .. {max(finite):.3g}" if finite else ""
    return f"{text}{' and ' if text else ''}{lost} not finite" if lost else text
