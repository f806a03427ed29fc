"""Studies: as many generated faults or trainings as asked for, and the rates of what was detected and explained."""

from __future__ import annotations

import itertools
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_sftguard.detection.processes import Task, run_all
from pytest_sftguard.detection.rates import bounds
from pytest_sftguard.detection.trials import Trial
from pytest_sftguard.detection.truth import is_right

Make = Callable[[int, int, Sequence[str]], Trial]
"""Makes the trial with a seed and a number, judged in these tiers."""


class TrailError(Exception):
    """A file of earlier trials that cannot be read; the message says what to do."""


MOST_DRAWS = 10
"""Draws for each one that is asked for, after which a study gives up finding more that can be judged."""
_MORE = 1.5


@dataclass(frozen=True, kw_only=True)
class Study:
    """Trials of one seed."""

    seed: int
    """The seed."""
    tiers: tuple[str, ...]
    """Tiers in which the guard judged them."""
    healthy: bool
    """Whether they are trainings without a fault."""
    trials: tuple[Trial, ...]
    """Every trial that was drawn, in the order of their numbers."""

    @property
    def judged(self) -> list[Trial]:
        """Those that were not discarded."""
        return [t for t in self.trials if not t.discarded]

    def reported(self, tier: str) -> list[Trial]:
        """Those of which something was reported in `tier`."""
        return [t for t in self.judged if t.detected(tier)]

    def missed(self, tier: str) -> list[Trial]:
        """Those of which nothing was reported in `tier`."""
        return [t for t in self.judged if t.detected(tier) is False]

    def broken(self, tier: str) -> list[Trial]:
        """Those that the guard could not judge in `tier`, as it raised an exception."""
        return [t for t in self.judged if tier in t.seen and t.seen[tier].error]

    def sound(self, at_least: float = 1.0) -> bool:
        """Whether there were trials, the guard judged each of them, and did so rightly.

        It reported no healthy training, or the share `at_least` of the faults in every tier.
        """
        if not self.judged or any(self.broken(t) for t in self.tiers):
            return False
        if self.healthy:
            return not any(self.reported(t) for t in self.tiers)
        return all(len(self.reported(t)) >= at_least * len(self.judged) for t in self.tiers)

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return {
            "seed": self.seed,
            "tiers": list(self.tiers),
            "healthy": self.healthy,
            "summary": self.summary(),
            "trials": [t.to_dict() for t in self.trials],
        }

    def summary(self) -> list[str]:
        """The rates, one a line."""
        noun = "trainings" if self.healthy else "faults"
        lines = [f"{len(self.trials)} {noun} drawn from seed {self.seed}, {len(self.judged)} judged"]
        reasons = Counter(t.discarded.partition(":")[0] for t in self.trials if t.discarded)
        lines += [f"{count} discarded: {reason}" for reason, count in reasons.most_common()]
        lines += [line for tier in self.tiers for line in self._rates(tier)]
        plain = [t.seconds for t in self.trials]
        if plain:
            lines.append(f"plain runs: {statistics.median(plain):.1f} s in the median")
        return lines

    def _rates(self, tier: str) -> Iterable[str]:
        found, missed, broken = self.reported(tier), self.missed(tier), self.broken(tier)
        count = len(found) + len(missed)
        what = "false alarms" if self.healthy else "detected"
        yield f"{tier}: {what} {rate(len(found), count)}"
        if not self.healthy and found:
            named = [t for t in found if t.seen[tier].named]
            right = [t for t in named if is_right(t.seen[tier].named[0], t)]
            yield f"{tier}: a cause was named for {rate(len(named), len(found))} of the detected ones"
            yield f"{tier}: the first cause was right for {rate(len(right), len(named))} of those"
        if broken:
            yield f"{tier}: {len(broken)} not judged, as the guard raised an exception"
        seconds = [t.seen[tier].seconds for t in self.judged if tier in t.seen]
        if seconds:
            yield f"{tier}: {statistics.median(seconds):.1f} s in the median, {max(seconds):.1f} s at most"


def rate(hits: int, trials: int) -> str:
    """`45 of 50 (90.0 %; 95 % bounds 78.2 to 96.7 %)`."""
    if not trials:
        return "0 of 0"
    low, high = bounds(hits, trials)
    return f"{hits} of {trials} ({hits / trials:.1%}; 95% bounds {low:.1%} to {high:.1%})"


def study(
    make: Make, wanted: int, seed: int, tiers: Sequence[str], jobs: int, *, healthy: bool, trail: Path | None = None
) -> Study:
    """Draw until `wanted` trials can be judged, in up to `jobs` processes, with a progress bar on stderr.

    Which ones they are depends on the seed alone. Each trial is added to the file `trail` as it ends, and those that
    the file already holds are not made again.
    """
    from tqdm import tqdm

    known = _known(trail, tiers)
    trials: list[Trial] = []
    with tqdm(total=wanted, unit="trial", disable=None, file=sys.stderr) as bar:
        while sum(not t.discarded for t in trials) < wanted and len(trials) < MOST_DRAWS * wanted:
            missing = wanted - sum(not t.discarded for t in trials)
            numbers = range(len(trials), len(trials) + math.ceil(_MORE * missing))
            ids = {n: f"{'healthy' if healthy else 'fault'}-{seed}-{n}" for n in numbers}
            tasks: list[Task[Trial]] = [(make, (seed, n, tuple(tiers))) for n in numbers if ids[n] not in known]

            def done(trial: Trial) -> None:
                known[trial.id] = trial
                bar.set_postfix_str(f"{trial.id} {trial.where} {trial.what}".strip(), refresh=False)
                bar.update(not trial.discarded)
                if trail is not None:
                    with trail.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(trial.to_dict()) + "\n")

            if tasks:
                run_all(tasks, min(jobs, len(tasks)), done)
            trials += [known[ids[n]] for n in numbers]
    kept = list(itertools.accumulate(not t.discarded for t in trials))
    # what was drawn beyond the last one that is wanted does not depend on the seed alone
    last = next((i for i, count in enumerate(kept, 1) if count == wanted), len(trials))
    return Study(seed=seed, tiers=tuple(tiers), healthy=healthy, trials=tuple(trials[:last]))


def _known(trail: Path | None, tiers: Sequence[str]) -> dict[str, Trial]:
    """The trials of the file `trail` by their id, but for those that were judged in fewer tiers."""
    if trail is None or not trail.exists():
        return {}
    try:
        lines = trail.read_text(encoding="utf-8").splitlines()
        found = [Trial.from_dict(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrailError(f"{trail} cannot be resumed from ({error}): name another file, or remove it") from None
    return {t.id: t for t in found if t.discarded or set(tiers) <= t.seen.keys()}
