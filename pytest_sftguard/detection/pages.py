"""Pages: a study as text for the terminal and as Markdown, with the sensitivity map."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

from pytest_sftguard.detection.rates import limit
from pytest_sftguard.detection.study import Study, rate
from pytest_sftguard.detection.trials import Trial
from pytest_sftguard.detection.truth import is_right

FEWEST = 4
"""Fewest faults of a class of which the map gives a limit."""
RATES = (0.5, 0.95)
"""Detection rates of which the map gives the smallest perturbation."""
REPLAY = "python -m pytest_sftguard faults --replay"


def text(study: Study) -> Iterator[str]:
    """Lines for the terminal: what was missed, or reported for nothing, with the command to see it; then the rates."""
    for tier in study.tiers:
        wrong = study.reported(tier) if study.healthy else study.missed(tier)
        for trial in (*wrong, *study.broken(tier)):
            yield from _told(trial, tier)
    if not study.healthy:
        for tier in study.tiers:
            for trial in study.reported(tier):
                named = trial.seen[tier].named
                if named and not is_right(named[0], trial):
                    yield f"{trial.id}, {tier}: the cause {named[0]} is not of {trial.where} {trial.what}"
    yield ""
    yield from study.summary()


def _told(trial: Trial, tier: str) -> Iterator[str]:
    yield f"{trial.training}: {trial.description}" if trial.where else trial.description
    if trial.effect is not None:
        yield f"    effect {trial.effect:.2g} on {trial.measure}, noise floor {trial.floor:.2g}"
    seen = trial.seen[tier]
    outcome = seen.error or (f"{', '.join(seen.reported)}: {seen.message}" if seen.reported else "nothing")
    yield f"    {tier}: {outcome}"
    yield f"    {REPLAY} {trial.id} --tier {tier}"


def markdown(study: Study) -> Iterator[str]:
    """Lines of a section of Markdown: the rates, the map of a study of faults, the axes of one of trainings."""
    option = "--healthy" if study.healthy else "--generate"
    yield f"## Generated {'trainings' if study.healthy else 'faults'}"
    yield ""
    tiers = ",".join(study.tiers)
    options = f"{option} {len(study.judged)} --seed {study.seed} --tier {tiers}"
    yield f"Made with `python -m pytest_sftguard faults {options}`."
    yield ""
    for line in study.summary():
        yield f"- {line}"
    yield ""
    yield from _axes(study) if study.healthy else _maps(study)


def _maps(study: Study) -> Iterator[str]:
    yield "Each pair is the smallest *perturbation* that was detected half of the time and 95 % of the time: a share of"
    yield "the entries, or a size relative to the value's root mean square. It is read off an isotonic fit of detection"
    yield "over size. `<=` stands before the smallest size that was tried, `>` before the largest. *Effect* is the"
    yield "relative distance of a plain run with the fault from one without, and *noise floor* how far two sound runs"
    yield "are apart, in the same measure, in the median. Stations of fewer than four faults have no limits."
    yield ""
    yield from _map(study, "station", lambda t: t.where, lambda t: t.effect or 0.0, "effect")
    yield ""
    yield from _map(study, "station and operation", lambda t: f"{t.where} {t.what}", lambda t: t.magnitude, "size")
    yield ""
    yield "Detected by the size of the effect, in noise floors:"
    yield ""
    yield f"| effect | {' | '.join(study.tiers)} |"
    yield f"|---|{'---|' * len(study.tiers)}"
    for name, trials in _decades(study.judged).items():
        yield f"| {name} | {' | '.join(_detected(trials, tier) for tier in study.tiers)} |"


def _map(
    study: Study, title: str, of: Callable[[Trial], str], size: Callable[[Trial], float], unit: str
) -> Iterator[str]:
    classes: dict[str, list[Trial]] = defaultdict(list)
    for trial in study.judged:
        classes[of(trial)].append(trial)
    heads = [h for tier in study.tiers for h in (f"{tier}", f"{tier}: {unit} at 50 %, 95 %")]
    yield f"| {title} | faults | noise floor | {' | '.join(heads)} |"
    yield f"|---|---|---|{'---|' * len(heads)}"
    few = [name for name, trials in classes.items() if len(trials) < FEWEST]
    for name, trials in sorted(classes.items()):
        if name in few and title != "station":
            continue
        cells = []
        for tier in study.tiers:
            points = [(size(t), hit) for t in trials if (hit := t.detected(tier)) is not None]
            cells += [_detected(trials, tier), ", ".join(_limit(points, r) for r in RATES)]
        floors = statistics.median(t.floor or 0.0 for t in trials)
        yield f"| {name} | {len(trials)} | {floors:.1g} | {' | '.join(cells)} |"
    if few and title != "station":
        yield ""
        yield f"{len(few)} further classes have fewer than {FEWEST} faults each."


def _limit(points: Sequence[tuple[float, bool]], at: float) -> str:
    if len(points) < FEWEST:
        return "-"
    found = limit(points, at)
    sizes = [size for size, _ in points]
    if found is None:
        return f"> {max(sizes):.2g}"
    return f"<= {found:.2g}" if found == min(sizes) else f"{found:.2g}"


def _detected(trials: Iterable[Trial], tier: str) -> str:
    hits = [hit for t in trials if (hit := t.detected(tier)) is not None]
    return f"{sum(hits)}/{len(hits)}"


def _decades(trials: Iterable[Trial]) -> dict[str, list[Trial]]:
    edges = (10.0, 100.0, 1e3, 1e4, 1e5)
    names = ["2 to 10", "10 to 100", "100 to 1000", "1000 to 1e4", "1e4 to 1e5", "above 1e5"]
    found: dict[str, list[Trial]] = {name: [] for name in names}
    for trial in trials:
        ratio = trial.ratio or 0.0
        found[names[sum(ratio > edge for edge in edges)]].append(trial)
    return {name: those for name, those in found.items() if those}


def _axes(study: Study) -> Iterator[str]:
    yield f"| axis | value: trainings (reported in {', '.join(study.tiers)}) |"
    yield "|---|---|"
    names = dict.fromkeys(axis for t in study.judged for axis in t.axes)
    for axis in names:
        values: dict[str, list[Trial]] = defaultdict(list)
        for trial in study.judged:
            values[trial.axes.get(axis, "-")].append(trial)
        told = (
            f"{value}: {len(trials)} ({', '.join(str(sum(bool(t.detected(r)) for t in trials)) for r in study.tiers)})"
            for value, trials in sorted(values.items())
        )
        yield f"| {axis} | {', '.join(told)} |"
    alarms = [(tier, t) for tier in study.tiers for t in (*study.reported(tier), *study.broken(tier))]
    if alarms:
        yield ""
        yield "Reported, or not judged:"
        yield ""
        for tier, trial in alarms:
            seen = trial.seen[tier]
            yield f"- `{REPLAY} {trial.id} --tier {tier}`: {trial.description}: {seen.error or seen.message}"


__all__ = ["markdown", "rate", "text"]
