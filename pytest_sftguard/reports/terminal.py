"""The terminal section: a line for each cell, what is wrong with the failed ones, and what was not evaluated."""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence

from pytest_sftguard.rendering import told
from pytest_sftguard.reports import failure
from pytest_sftguard.reports._headline import headline
from pytest_sftguard.reports._screen import Screen
from pytest_sftguard.verdicts import General, JudgedRun, Outcome

Run = tuple[str, JudgedRun, str]

_WORDS = {Outcome.PASSED: "ok", Outcome.FAILED: "FAILED", Outcome.NOT_EVALUATED: "not evaluated"}
_COLOURS = {Outcome.PASSED: "green", Outcome.FAILED: "red", Outcome.NOT_EVALUATED: "yellow"}
_HEADINGS = ("precision", "batch", "verdict", "grad_norm", "raw loss", "answers", "seconds")
_VERDICT = _HEADINGS.index("verdict")
_GAP = "  "


def section(runs: Sequence[Run], screen: Screen) -> list[str]:
    """The lines for every cell, in order."""
    devices = sorted({f"{r.record.device}, torch {r.record.versions.get('torch', '?')}" for _, r, _ in runs})
    return [
        *_table(runs, screen),
        *screen.wrap(f"on {'; '.join(devices)}"),
        *_reach(runs, screen),
        *_failures(runs, screen),
        *_open_questions(runs, screen),
    ]


def _table(runs: Sequence[Run], screen: Screen) -> Iterator[str]:
    """A row for each cell, below the name of its test where there are several."""
    rows = [_row(run) for _, run, _ in runs]
    # a column that is empty in every row says nothing
    kept = [i for i in range(len(_HEADINGS)) if i <= _VERDICT or any(row[i] != "-" for row in rows)]
    heading, *rows = [tuple(row[i] for i in kept) for row in (_HEADINGS, *rows)]
    tests: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for (name, run, _), row in zip(runs, rows, strict=True):
        tests.setdefault(_test(name), []).append((_COLOURS[run.verdict.outcome], row))
    margin = _GAP if len(tests) > 1 else ""
    widths = _fitted([heading, *rows], screen.width - len(margin))

    def printed(row: Sequence[str]) -> Iterator[list[str]]:
        for parts in itertools.zip_longest(*map(textwrap.wrap, row, widths), fillvalue=""):
            yield list(map(str.ljust, parts, widths))

    for cells in printed(heading):
        yield screen.paint(margin + _GAP.join(cells).rstrip(), bold=True)
    for test, own in tests.items():
        yield from screen.wrap(test) if margin else ()
        for colour, row in own:
            for cells in printed(row):
                cells[_VERDICT] = screen.paint(cells[_VERDICT], **{colour: True})
                yield margin + _GAP.join(cells).rstrip()


def _fitted(table: Sequence[Sequence[str]], width: int) -> list[int]:
    """Widths of the columns: each as wide as its widest cell, or narrower where that breaks the fewest cells."""
    columns = list(zip(*table, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(len(word) for cell in column for word in re.findall("[^ -]+-?", cell)) for column in columns]

    def harm(i: int) -> tuple[bool, int, int]:
        """How bad it is to take a character from column `i`: words broken, cells broken, and rather a wide one."""
        return widths[i] <= words[i], sum(len(cell) >= widths[i] for cell in columns[i]), -widths[i]

    while sum(widths) + len(_GAP) * (len(widths) - 1) > width:
        widths[min(range(len(widths)), key=harm)] -= 1
    return widths


def _reach(runs: Sequence[Run], screen: Screen) -> Iterator[str]:
    """What the adapter reaches in each family of layers, once for all cells with the same; only with details."""
    reached: dict[str, list[Run]] = {}
    for entry in runs if screen.details else ():
        wiring = entry[1].record.wiring
        if wiring is not None and wiring.families:
            reached.setdefault(", ".join(map(str, wiring.families)), []).append(entry)
    for families, cells in reached.items():
        yield from screen.wrap(f"adapted weights: {families} ({_named(cells, runs)})")


def _failures(runs: Sequence[Run], screen: Screen) -> Iterator[str]:
    """The text of each failed cell; where it is printed elsewhere, a line for each cause."""
    failed = [entry for entry in runs if entry[1].verdict.failures]
    if not screen.elsewhere:
        for name, run, rerun in failed:
            yield screen.paint(f" {name} ".center(screen.width, "_"), red=True, bold=True)
            yield from failure.message(run, rerun, screen).splitlines()
        return
    causes: dict[str, list[Run]] = {}
    for entry in failed:
        causes.setdefault(headline(entry[1]), []).append(entry)
    for cause, cells in causes.items():
        word = _WORDS[Outcome.FAILED]
        first, *others = screen.wrap(f"{word} {_named(cells, runs)}: {cause}")
        yield screen.paint(word, red=True) + first.removeprefix(word)
        yield from others
    if failed:
        yield from screen.wrap(f"findings, evidence and cures: {screen.elsewhere}")


def _open_questions(runs: Sequence[Run], screen: Screen) -> Iterator[str]:
    """What was not evaluated, once for each invariant and reason. A run that ended early goes without saying.

    What nothing required, and no user waived, fills one line, unless the details are asked for.
    """
    reasons: dict[str, dict[int, Run]] = {}
    folded: dict[str, dict[int, Run]] = {}
    higher: dict[str, None] = {}
    for number, entry in enumerate(runs):
        for finding in entry[1].verdict.not_evaluated:
            if entry[1].record.error is not None and not finding.because(General.GUARD_BROKE):
                continue
            if finding.because(General.NOT_ASKED):
                higher[finding.invariant] = None
            elif screen.details or finding.required or finding.waived or finding.guards_own:
                reason = f"{finding.invariant} not evaluated: {told(finding)}"
                reasons.setdefault(reason, {})[number] = entry
            else:
                folded.setdefault(finding.invariant, {})[number] = entry
    for reason, cells in reasons.items():
        yield from screen.wrap(f"{reason} ({_named(cells.values(), runs)})")
    if screen.details:
        yield from screen.wrap(f"left to a higher --sftguard-tier: {', '.join(higher)}") if higher else ()
        return
    names = [
        n if len(cells) == len(runs) else f"{n} ({len(cells)} of {len(runs)} cells)" for n, cells in folded.items()
    ]
    names += [f"{len(higher)} left to a higher --sftguard-tier"] if higher else []
    if names:
        *others, last = names
        listed = f"{', '.join(others)} and {last}" if others else last
        yield from screen.wrap(f"not evaluated: {listed} (nothing required them; -v says why)")


def _named(cells: Collection[Run], runs: Sequence[Run]) -> str:
    """The cells by name, or by test where there are several."""
    if len(cells) == len(runs) > 1:
        return "every cell"
    several = len({_test(name) for name, _, _ in runs}) > 1
    return ", ".join(dict.fromkeys(n.rpartition("::")[2] if several else r.record.cell for n, r, _ in cells))


def _test(nodeid: str) -> str:
    return nodeid.partition("[")[0]


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
    parts = [f"{min(finite):.3g} .. {max(finite):.3g}"] if finite else []
    if lost := len(values) - len(finite):
        parts.append(f"{lost} nan/inf")
    return ", ".join(parts)
