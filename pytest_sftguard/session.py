"""One pytest session's runs: each cell is trained once, judged, written down, and handed on to the reports."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_sftguard import registry, tiers
from pytest_sftguard.invariants import usable_invariants, with_thresholds
from pytest_sftguard.records import RunRecord
from pytest_sftguard.reports import failure, json_files
from pytest_sftguard.verdicts import Checks, Finding, JudgedRun, Verdict, judge

if TYPE_CHECKING:
    from pytest_sftguard.matrix import RunConfig


class CannotRunError(Exception):
    """A cell cannot be run for a reason that the user can mend; the message says which, in a line or two."""


@dataclass(frozen=True)
class CellTest:
    """What a marked test asks for in one of its cells."""

    config: RunConfig
    """The cell, and how to run it."""
    invariants: tuple[str, ...] = ()
    """Dotted paths of invariants beside the built-in ones."""
    strict: bool = False
    """Whether the test fails where the cell is not evaluated."""
    thresholds: dict[str, Any] = field(default_factory=dict)
    """Thresholds by `invariant.field`, in the place of their defaults."""
    references: tuple[str, ...] = ()
    """Kinds of runs to compare with, beside the session's own cells."""
    waived: tuple[str, ...] = ()
    """Invariants that the user knows not to hold."""
    folder: Path = Path(".sftguard")
    """Where the record goes."""

    def __str__(self) -> str:
        return str(self.config.cell)


class Runs:
    """The runs of a session. Two tests that ask for the same run share it: a run is a pure function of its config."""

    def __init__(self) -> None:
        self._records: dict[str, RunRecord] = {}

    def judged(
        self,
        test: CellTest,
        nodeid: str,
        progress: Callable[[int], None] | None = None,
        session: Sequence[RunConfig] = (),
    ) -> JudgedRun:
        """Train the cell (or take it from an earlier test), judge it, and write its record.

        It is compared with its siblings among `session`, the runs of all tests, and with the references that `test`
        asks for.

        Raises CannotRunError for a target, threshold, device or folder that cannot be used.
        """
        try:
            invariants = with_thresholds(usable_invariants(test.invariants), test.thresholds)
        except registry.NotFoundError as error:
            raise CannotRunError(str(error)) from None
        with writing(test.folder):
            json_files.prepare(test.folder)  # before the training, which a full disk would make useless
        run = self.compared(test, invariants, progress, session)
        with writing(test.folder):
            json_files.write(test.folder, nodeid, run.record)
        return run

    def compared(
        self,
        test: CellTest,
        invariants: Sequence[Checks],
        progress: Callable[[int], None] | None = None,
        session: Sequence[RunConfig] = (),
    ) -> JudgedRun:
        """The run of `test`, judged beside its references; a reference that there cannot be is left out."""
        record = self._record(test.config, progress)
        references = {}
        for kind in tiers.REFERENCES if record.not_run is None else ():
            try:
                config = tiers.reference_config(test.config, kind, session)
            except tiers.NoReferenceError:
                continue
            if not config.variant or kind in test.references:
                references[kind] = self._record(config, None)
        return JudgedRun(record, judge(record, invariants, references, test.waived), references)

    def _record(self, config: RunConfig, progress: Callable[[int], None] | None) -> RunRecord:
        key = json.dumps(asdict(config), sort_keys=True, default=repr)
        if key not in self._records:
            try:
                from pytest_sftguard.engine import runner
                from pytest_sftguard.engine.building import targets
            except ImportError as error:
                raise CannotRunError(
                    f"training needs torch, transformers, accelerate and peft, and one is missing: {error}; "
                    "pip install torch transformers accelerate peft"
                ) from error
            try:
                self._records[key] = runner.run(config, progress)
            except targets.TargetError as error:
                raise CannotRunError(str(error)) from error
        return self._records[key]


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an OSError into a CannotRunError that names `folder` and the option."""
    try:
        yield
    except OSError as error:
        raise CannotRunError(
            f"the record cannot be written below {folder}: {error.strerror or error}; "
            "name another folder with --sftguard-dir"
        ) from error


def pack(run: JudgedRun, name: str, rerun: str) -> dict[str, Any]:
    """A judged run as plain types, to travel with pytest's report between processes."""
    findings = [f.to_dict() for f in run.verdict.findings]
    return {"record": run.record.to_dict(), "findings": findings, "name": name, "rerun": rerun}


def unpack(data: dict[str, Any]) -> tuple[str, JudgedRun, str]:
    """The test's name, its judged run and its rerun command, from what `pack` made."""
    findings = tuple(map(Finding.from_dict, data["findings"]))
    return data["name"], JudgedRun(RunRecord.from_dict(data["record"]), Verdict(findings)), data["rerun"]


def failure_text(run: JudgedRun, rerun: str, own: BaseException | None) -> str:
    """The text of a failed cell, and of the test's own exception where it raised one too."""
    text = failure.text(run, rerun)
    if own is not None:
        lines = str(own).splitlines() or [""]
        text += f"\n\nThe test's own {type(own).__name__} beside it: {lines[0]}"
    return text
