"""Detection: whether the guard reports what the fault library injects, where it strikes, and why it happens.

One attempt is one training with a fault in it, judged as any other. What is counted is a finding of one of the
invariants that must report the fault, and that does not stand against the target without it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_sftguard import tiers
from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.session import CannotRunError, CellTest, Runs
from pytest_sftguard.verdicts import Finding, JudgedRun

if TYPE_CHECKING:
    from pytest_sftguard.engine.faults import Fault

LEARNED = 100
"""Optimizer steps after which the built-in target has learned to add."""

HEALTHY = "(none)"
"""What stands in the place of a fault's name where the target is tried as it is."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One fault, and what the guard said of it."""

    fault: str
    """Its id; HEALTHY for the target as it is."""
    source: str = ""
    """Where people met it."""
    injects: str = ""
    """What was wrong."""
    cell: str = ""
    """The cell that it was tried in."""
    precision: str = ""
    """Its precision."""
    expected: tuple[str, ...] = ()
    """Invariants of which one at least must report it; empty where nothing may be reported."""
    reported: tuple[str, ...] = ()
    """Invariants that reported something."""
    step: int | None = None
    """Optimizer step at which it struck; None where it is no matter of a step."""
    seen_at: int | None = None
    """First step that a finding names."""
    tensor: str = ""
    """Part of the tensor's name that had to be pointed at."""
    pointed: bool = False
    """Whether a finding names such a tensor."""
    mechanism: str = ""
    """The diagnosis that must come first."""
    named: tuple[str, ...] = ()
    """The diagnoses that were given, the most probable first."""
    silent: bool = False
    """Whether the log showed nothing."""
    seconds: float = 0.0
    """Wall time of all runs that it took."""
    message: str = ""
    """The first finding."""
    skipped: str = ""
    """Why it could not be tried on this target; empty where it was."""

    @property
    def is_control(self) -> bool:
        """Whether this is a healthy training, of which nothing may be reported."""
        return not self.expected

    @property
    def caught(self) -> bool:
        """Whether one of the invariants that must report it did."""
        return bool(set(self.expected) & set(self.reported))

    @property
    def false_alarm(self) -> bool:
        """Whether something was reported of a healthy training."""
        return self.is_control and bool(self.reported)

    @property
    def late(self) -> int | None:
        """Steps between its striking and the first finding; None where either is unknown."""
        return None if self.step is None or self.seen_at is None else self.seen_at - self.step

    @property
    def located(self) -> bool | None:
        """Whether step (within one) and tensor were found; None where there is neither."""
        if self.step is None and not self.tensor:
            return None
        in_time = self.step is None or (self.late is not None and 0 <= self.late <= 1)
        return in_time and (not self.tensor or self.pointed)

    @property
    def explained(self) -> bool | None:
        """Whether the right mechanism came first; None where there is none to name."""
        return self.named[:1] == (self.mechanism,) if self.mechanism else None

    def to_dict(self) -> dict[str, Any]:
        """As plain types, with what follows from them."""
        derived = {n: getattr(self, n) for n in ("caught", "false_alarm", "late", "located", "explained")}
        return asdict(self) | derived


def names() -> list[str]:
    """The ids of the faults of the library."""
    from pytest_sftguard.engine.faults import load_faults

    return [fault.id for fault in load_faults()]


def fault_named(name: str) -> Fault:
    """The fault called `name`; raises registry.NotFoundError, which lists the ids, if there is none."""
    from pytest_sftguard.engine import faults

    return faults.fault_named(name)


def attempt(name: str, target: str, device: str = "cpu") -> Attempt:
    """Train `target` with the fault `name` in it, and see what is said of it."""
    from pytest_sftguard.engine.building.targets import resolve
    from pytest_sftguard.engine.faults import NotApplicableError
    from pytest_sftguard.engine.faults._injected import injected

    fault = fault_named(name)
    known: dict[str, Any] = {"fault": fault.id, "source": fault.source, "injects": fault.injects}
    if fault.asks and resolve(target).questions is None:
        return Attempt(**known, skipped="the target asks no questions")
    try:
        with injected(fault.id, target) as path:
            run = _judged(fault, path, device)
    except NotApplicableError as reason:
        return Attempt(**known, skipped=str(reason))
    return Attempt(
        **known, **seen(run, fault.tensor), expected=fault.reported_by, step=fault.step, tensor=fault.tensor,
        mechanism=fault.mechanism, silent=fault.silent,
    )  # fmt: skip


def healthy(target: str, precision: str, trained: bool, device: str = "cpu") -> Attempt:
    """Train `target` as it is: nothing may be reported. Where it is `trained` long enough, it is asked, too."""
    from pytest_sftguard.engine.faults import Fault

    class AsItIs(Fault):
        """No fault at all."""

    AsItIs.id = ""
    AsItIs.precision, AsItIs.asks, AsItIs.steps = precision, trained, LEARNED if trained else Fault.steps
    run = _judged(AsItIs(), target, device)
    return Attempt(fault=HEALTHY, injects="the target as it is", **seen(run, ""))


def _judged(fault: Fault, path: str, device: str) -> JudgedRun:
    looks, references = tiers.asked("standard", fault.looks)
    config = RunConfig(
        cell=Cell(fault.precision, *fault.batch), target=path, steps=fault.steps, device=device,
        questions=16 * fault.asks,
        training_arguments=dict(fault.arguments), looks=looks,
    )  # fmt: skip
    try:
        return Runs().compared(CellTest(config=config, references=references), load_invariants())
    except CannotRunError as error:
        from pytest_sftguard.engine.faults import NotApplicableError

        if isinstance(error.__cause__, NotApplicableError):  # found out while the Trainer was built
            raise error.__cause__ from None
        raise RuntimeError(f"{fault.id or 'the target as it is'} cannot be tried: {error}") from error


def seen(run: JudgedRun, tensor: str) -> dict[str, Any]:
    """What the verdict on `run` says, as fields of an Attempt."""
    found = reports(run)
    steps = [f.step for f in found if f.step is not None]
    record = run.record
    return {
        "cell": record.cell,
        "precision": record.precision,
        "reported": tuple(dict.fromkeys(f.invariant for f in found)),
        "seen_at": min(steps, default=None),
        "pointed": bool(tensor) and any(tensor in f.message for f in found),
        "named": tuple(d.mechanism for d in diagnose(run)),
        "seconds": sum(r.seconds or 0.0 for r in (record, *run.references.values())),
        "message": f"{found[0].invariant}: {found[0].message}" if found else "",
    }


def reports(run: JudgedRun) -> list[Finding]:
    """The findings that keep `run` from passing: what failed, and what had to be evaluated and could not be."""
    return [f for f in run.verdict.findings if f.doubts]


def beside(attempts: Sequence[Attempt], plain: Sequence[Attempt]) -> list[Attempt]:
    """`attempts` without what is reported of the target as it is, of `plain`, in the same precision."""
    known: dict[str, set[str]] = {}
    for a in plain:
        known.setdefault(a.precision, set()).update(a.reported)
    return [replace(a, reported=tuple(n for n in a.reported if n not in known.get(a.precision, ()))) for a in attempts]


@dataclass(frozen=True)
class Detection:
    """All attempts on one target."""

    target: str
    """Its dotted path."""
    attempts: tuple[Attempt, ...]
    """In the order of the library."""
    device: str = "cpu"
    """Kind of the device that they trained on."""

    @property
    def faults(self) -> list[Attempt]:
        """The attempts with a fault that must be reported."""
        return [a for a in self.attempts if not a.is_control and not a.skipped]

    @property
    def missed(self) -> list[Attempt]:
        """Those that were not."""
        return [a for a in self.faults if not a.caught]

    @property
    def false_alarms(self) -> list[Attempt]:
        """Healthy trainings of which something was reported."""
        return [a for a in self.attempts if a.false_alarm and not a.skipped]

    @property
    def sound(self) -> bool:
        """Whether every fault was caught, and nothing else reported."""
        return bool(self.faults) and not self.missed and not self.false_alarms

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return {"target": self.target, "summary": self.summary(), "attempts": [a.to_dict() for a in self.attempts]}

    def summary(self) -> list[str]:
        """The rates, a line each."""
        controls = [a for a in self.attempts if a.is_control and not a.skipped]
        silent = [a for a in self.faults if a.silent]
        lines = [
            f"detection      {_rate(a.caught for a in self.faults)}",
            f"silent ones    {_rate(a.caught for a in silent)}",
            f"localisation   {_rate(a.located for a in self.faults if a.located is not None)}: step within one, tensor",
            f"mechanism      {_rate(a.explained for a in self.faults if a.explained is not None)} named first",
            f"false alarms   {len(self.false_alarms)} of {len(controls)} healthy trainings",
        ]
        if self.attempts:
            times = [a.seconds for a in self.attempts if not a.skipped] or [0.0]
            lines.append(f"seconds        {statistics.median(times):.1f} in the median, {max(times):.1f} at most")
        skipped = [a for a in self.attempts if a.skipped]
        if skipped:
            lines.append(f"not tried      {len(skipped)}: {', '.join(a.fault for a in skipped)}")
        return lines


HEADINGS = ("fault", "cell", "verdict", "by", "step", "late", "mechanism", "seconds")
"""Headings of the table."""


def row(a: Attempt) -> tuple[str, ...]:
    """One attempt as a row of the table."""
    verdict = "not tried" if a.skipped else _verdict(a)
    by = [n for n in a.reported if n in a.expected] or list(a.reported)
    return (
        a.fault,
        a.cell or "-",
        verdict,
        a.skipped or ", ".join(by) or "-",
        "-" if a.seen_at is None else str(a.seen_at),
        "-" if a.late is None else str(a.late),
        _mechanism(a),
        f"{a.seconds:.1f}",
    )


def _verdict(a: Attempt) -> str:
    if a.is_control:
        return "FALSE ALARM" if a.false_alarm else "green"
    return "caught" if a.caught else "MISSED"


def _mechanism(a: Attempt) -> str:
    if a.explained is None:
        return "-"
    return a.mechanism if a.explained else f"{a.named[0] if a.named else 'none'}, not {a.mechanism}"


def markdown(detection: Detection) -> Iterator[str]:
    """A page of Markdown, line by line: the rates, and the table of all attempts."""
    from pytest_sftguard.engine.machine.profiles import probe, versions

    seen = ", ".join(f"{name} {version}" for name, version in versions().items())
    yield "# Detection"
    yield ""
    where, option = "", ""
    if detection.device != "cpu":
        where, option = f"trained on {probe(detection.device).name}, ", f"--device {detection.device} "
    yield f"What the guard made of the fault library on `{detection.target}`,"
    yield f"{where}in fresh processes of one thread each, with {seen}. Made with"
    yield f"`python -m pytest_sftguard faults {option}--json FILE --markdown PAGE`."
    yield ""
    for line in detection.summary():
        yield f"- {' '.join(line.split())}"
    yield ""
    yield "*Step* is the first that a finding names, *late* how many steps after the fault struck. A fault counts as"
    yield "caught if one of the invariants that must report it does, and does not of the target as it is, `(none)`."
    yield ""
    yield f"| {' | '.join(HEADINGS)} |"
    yield f"|{'---|' * len(HEADINGS)}"
    for a in detection.attempts:
        fault, *others = row(a)
        yield f"| {f'[{fault}]({a.source})' if a.source else fault} | {' | '.join(others)} |"


def _rate(outcomes: Iterable[bool | None]) -> str:
    every = list(outcomes)
    return f"{sum(map(bool, every))} of {len(every)}" + (
        f" ({sum(map(bool, every)) / len(every):.1%})" if every else ""
    )


def run_all(
    tasks: Sequence[tuple[Callable[..., Attempt], tuple[Any, ...]]],
    jobs: int,
    done: Callable[[Attempt], None],
) -> list[Attempt]:
    """All of `tasks` in `jobs` fresh processes of one thread each; `done` is told of each as it ends.

    What the trainings print goes to a file, so that the terminal stays readable. The attempts come in the order of
    `tasks`. An exception of one ends all. A process that lost its CUDA device to one of them hands the others on, to
    new processes.
    """
    found: dict[int, Attempt] = {}
    while len(found) < len(tasks):
        left = {place: task for place, task in enumerate(tasks) if place not in found}
        found |= _run_some(left, min(jobs, len(left)), done)
    return [found[place] for place in range(len(tasks))]


def _run_some(
    tasks: dict[int, tuple[Callable[..., Attempt], tuple[Any, ...]]], jobs: int, done: Callable[[Attempt], None]
) -> dict[int, Attempt]:
    """The attempts of those `tasks` that were given to a process with a device; at least one for each process."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, as_completed

    found: dict[int, Attempt] = {}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_quiet) as pool:
        futures = {pool.submit(_unless_lost, function, arguments): p for p, (function, arguments) in tasks.items()}
        try:
            for future in as_completed(futures):
                attempt = future.result()
                if attempt is not None:
                    found[futures[future]] = attempt
                    done(attempt)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _unless_lost(function: Callable[..., Attempt], arguments: tuple[Any, ...]) -> Attempt | None:
    """One attempt; None in a process that has no device for it any more."""
    from pytest_sftguard.engine.surroundings import devices

    return function(*arguments) if devices.answers("cuda") else None


def _quiet() -> None:
    """Set up a process for attempts: one thread, and nothing on the terminal."""
    import os
    import tempfile
    import warnings

    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    warnings.simplefilter("ignore")
