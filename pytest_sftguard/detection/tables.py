"""Tables: a detection as text for the terminal, and as a page of Markdown."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_sftguard.detection.attempts import Attempt
from pytest_sftguard.detection.summary import Detection

HEADINGS = ("fault", "cell", "verdict", "by", "step", "late", "mechanism", "seconds")
"""Headings of the columns."""


def row(a: Attempt) -> tuple[str, ...]:
    """One attempt as a row of the table."""
    by = [n for n in a.reported if n in a.expected] or list(a.reported)
    return (
        a.fault,
        a.cell or "-",
        _verdict(a),
        a.skipped or ", ".join(by) or "-",
        "-" if a.seen_at is None else str(a.seen_at),
        "-" if a.late is None else str(a.late),
        _mechanism(a),
        f"{a.seconds:.1f}",
    )


def _verdict(a: Attempt) -> str:
    if a.skipped:
        return "not tried"
    if a.is_control:
        return "FALSE ALARM" if a.false_alarm else "green"
    return "caught" if a.caught else "MISSED"


def _mechanism(a: Attempt) -> str:
    if a.explained is None:
        return "-"
    return a.mechanism if a.explained else f"{a.named[0] if a.named else 'none'}, not {a.mechanism}"


def text(detection: Detection) -> Iterator[str]:
    """Lines for the terminal: the table, what was missed or reported for nothing, and the rates."""
    rows = [HEADINGS, *map(row, detection.attempts)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
    for a in (*detection.missed, *detection.false_alarms):
        yield ""
        yield f"{a.fault}: {a.injects}"
        yield f"    expected {', '.join(a.expected) or 'nothing'}"
        yield f"    reported {', '.join(a.reported) or 'nothing'}" + (f": {a.message}" if a.message else "")
    yield ""
    yield from detection.summary()


def markdown(detection: Detection) -> Iterator[str]:
    """Lines of a page of Markdown: the rates, and the table."""
    from pytest_sftguard.engine.machine.profiles import device_profile, versions

    installed = ", ".join(f"{name} {version}" for name, version in versions().items())
    where, option = "", ""
    if detection.device != "cpu":
        where, option = f"trained on {device_profile(detection.device).name}, ", f"--device {detection.device} "
    yield "# Detection"
    yield ""
    yield f"What the guard reports when the faults of the library are injected into `{detection.target}`,"
    yield f"{where}in fresh processes of one thread each, with {installed}. Made with"
    yield f"`python -m pytest_sftguard faults {option}--json FILE --markdown PAGE`."
    yield ""
    for line in detection.summary():
        yield f"- {' '.join(line.split())}"
    yield ""
    yield "*Step* is the first that a finding names, *late* the number of steps to it from the first affected one. A"
    yield "fault is caught if one of the invariants that must report it does, and does not report the target as it is,"
    yield "`(none)`."
    yield ""
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"|{'---|' * len(HEADINGS)}"
    for a in detection.attempts:
        fault, *others = row(a)
        yield f"| {f'[{fault}]({a.source})' if a.source else fault} | {' | '.join(others)} |"
