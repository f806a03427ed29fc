"""The runs of a pytest session: each cell is trained once, judged, and handed to the reports."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sftguard import registry, reports, tiers
from pytest_sftguard.invariants import usable_invariants, with_thresholds
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Checks, Finding, JudgedRun, Verdict, judge

if TYPE_CHECKING:
    from pytest_sftguard.matrix import RunConfig
    from pytest_sftguard.reports._screen import Screen
    from pytest_sftguard.settings import Settings


class CannotRunError(Exception):
    """A run or its reports are impossible for a reason that the user can remove; the message says which."""


@dataclass(frozen=True)
class CellTest:
    """What a marked test asks for in one of its cells."""

    config: RunConfig
    """The cell, and how to run it."""
    settings: Settings
    """How to judge it."""
    folder: Path
    """Where the reports write."""

    def __str__(self) -> str:
        return str(self.config.cell)


def _unseen(doing: str) -> None:
    """Nobody watches."""


class Runs:
    """The runs of a session. Tests that ask for the same run share it, as a run depends on its config alone."""

    def __init__(self) -> None:
        self._records: dict[str, RunRecord] = {}

    def judged(
        self,
        test: CellTest,
        nodeid: str,
        progress: Callable[[str], None] = _unseen,
        session: Sequence[RunConfig] = (),
    ) -> JudgedRun:
        """Train the cell (or take it from an earlier test), judge it, and let the reports write.

        `progress` is called with what is being done, in a few words.
        It is compared with its siblings among `session`, the runs of all tests, and with the references that `test`
        asks for.

        Raises CannotRunError for a target, threshold, device or folder that cannot be used.
        """
        invariants = invariants_of(test.settings)
        # before the training, which a full disk would make useless
        report("prepare", test.folder)
        asked = test.settings.references
        strict = test.settings.fails_unevaluated
        run = self.compared(test.config, invariants, asked, test.settings.waive, progress, session, strict=strict)
        report("write", test.folder, nodeid, run)
        return run

    def compared(
        self,
        config: RunConfig,
        invariants: Sequence[Checks],
        references: Collection[str] = (),
        waived: Iterable[str] = (),
        progress: Callable[[str], None] = _unseen,
        session: Sequence[RunConfig] = (),
        *,
        strict: bool = False,
    ) -> JudgedRun:
        """The run of `config`, judged beside those of its references that are in `session` or in `references`.

        A reference that the cell cannot have is left out.
        """
        record = self._record(config, progress)
        found = {}
        for name in tiers.REFERENCES if record.not_run is None else ():
            try:
                other = tiers.reference_config(config, name, session)
            except tiers.NoReferenceError:
                continue
            if not other.variant or name in references:
                found[name] = self._record(other, functools.partial(_reference, progress, name))
        return JudgedRun(record, judge(record, invariants, found, waived, strict=strict), found)

    def _record(self, config: RunConfig, progress: Callable[[str], None]) -> RunRecord:
        def step_done(step: int) -> None:
            progress(f"step {step}/{config.steps}" if step < config.steps else "looking at what was trained")

        key = json.dumps(asdict(config), sort_keys=True, default=repr)
        if key not in self._records:
            progress("importing torch")
            try:
                with warnings.catch_warnings():
                    # bitsandbytes, which peft imports where it is there, has torch import what torch itself deprecates
                    warnings.filterwarnings("ignore", "`torch.jit.script_method` is deprecated", DeprecationWarning)
                    from pytest_sftguard.engine import runner
                    from pytest_sftguard.engine.building import targets
            except ImportError as error:
                raise CannotRunError(
                    f"training needs torch, transformers, accelerate and peft, and one is missing: {error}; "
                    "pip install torch transformers accelerate peft"
                ) from error
            progress("building")
            try:
                self._records[key] = runner.run(config, step_done)
            except targets.TargetError as error:
                raise CannotRunError(str(error)) from error
        return self._records[key]


def _reference(progress: Callable[[str], None], name: str, doing: str) -> None:
    progress(f"{name} reference, {doing}")


def invariants_of(settings: Settings) -> list[Checks]:
    """The invariants that a test with `settings` is held to. CannotRunError for a threshold that does not exist."""
    try:
        return with_thresholds(usable_invariants(settings.invariants), settings.thresholds)
    except registry.NotFoundError as error:
        raise CannotRunError(str(error)) from None


def report(hook: reports.Hook, folder: Path, *arguments: Any) -> None:
    """Let all reports `prepare` or `write` below `folder`. Raises CannotRunError where that is impossible."""
    try:
        reports.call(hook, folder, *arguments)
    except OSError as error:
        raise CannotRunError(
            f"reports cannot be written below {folder}: {error.strerror or error}; "
            "name another folder with --sftguard-dir"
        ) from error


def pack(run: JudgedRun, nodeid: str, rerun: str) -> dict[str, Any]:
    """A judged run as plain types, to travel with pytest's report between processes."""
    findings = [f.to_dict() for f in run.verdict.findings]
    # the cause of a failure is looked for once more, with them
    references = {name: r.to_dict() for name, r in run.references.items()} if run.verdict.failures else {}
    return {"record": run.record.to_dict(), "findings": findings, "references": references, "test": (nodeid, rerun)}


def unpack(data: dict[str, Any]) -> tuple[str, JudgedRun, str]:
    """The test's id, its judged run and its rerun command, from what `pack` made."""
    verdict = Verdict(tuple(map(Finding.from_dict, data["findings"])))
    references = {name: RunRecord.from_dict(r) for name, r in data["references"].items()}
    nodeid, rerun = data["test"]
    return nodeid, JudgedRun(RunRecord.from_dict(data["record"]), verdict, references), rerun


def message(run: JudgedRun, rerun: str, screen: Screen, own: BaseException | None = None) -> str:
    """What the reports say of a run that did not pass, and of the exception that the test itself raised."""
    text = "\n\n".join(reports.call("message", run, rerun, screen))
    if own is not None:
        raised = ": ".join([type(own).__name__, *str(own).splitlines()[:1]])
        text += "\n\n" + "\n".join(screen.wrap(f"The test itself raised {raised}"))
    return text
