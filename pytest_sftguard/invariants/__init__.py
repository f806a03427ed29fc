"""The invariants, one file each: a frozen dataclass whose fields are its thresholds and whose `check` is pure."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pytest_sftguard import registry
from pytest_sftguard.records import RunRecord
from pytest_sftguard.verdicts import Checks, Finding, General, Outcome, general_finding, invariant_name


def load_invariants(extra: Iterable[str] = ()) -> list[Checks]:
    """Every invariant of this folder, and those at the dotted paths in `extra` (classes or instances).

    Raises registry.NotFoundError where a path leads nowhere, to something that has no `check`, or to a class that
    cannot be made without arguments.
    """
    built_in: list[Checks] = [registry.load(name, __name__)() for name in registry.names(__name__)]
    return [*built_in, *map(_outsider, extra)]


def told_last() -> set[str]:
    """Names of the built-in invariants whose findings stand after those of the others at the same step."""
    return {invariant_name(i) for i in load_invariants() if getattr(i, "told_last", False)}


def usable_invariants(extra: Iterable[str] = ()) -> list[Checks]:
    """The same for a session of tests: a path that cannot be used is an invariant that fails beside the others."""
    found = load_invariants()
    for path in extra:
        try:
            found.append(_outsider(path))
        except registry.NotFoundError as error:
            found.append(Unusable(path, str(error)))
    return found


def with_thresholds(invariants: Iterable[Checks], thresholds: Mapping[str, Any]) -> list[Checks]:
    """`invariants` with `thresholds`, by `invariant.field`; NotFoundError for one that there is not."""
    made, left = [], dict(thresholds)
    for invariant in invariants:
        name = invariant_name(invariant)
        own = {f.name: left.pop(f"{name}.{f.name}") for f in _fields(invariant) if f"{name}.{f.name}" in left}
        made.append(dataclasses.replace(invariant, **own) if own else invariant)  # type: ignore[type-var]
    if left:
        wrong = min(left)
        known = sorted(f"{invariant_name(i)}.{f.name}" for i in made for f in _fields(i))
        # those of the same invariant are what the user looks for
        near = [name for name in known if name.partition(".")[0] == wrong.partition(".")[0]]
        raise registry.NotFoundError(f"there is no threshold {wrong!r}: choose from {', '.join(near or known)}")
    return made


def _fields(invariant: Checks) -> tuple[Any, ...]:
    return dataclasses.fields(invariant) if dataclasses.is_dataclass(invariant) else ()


class Unusable:
    """Stands for a user's invariant that cannot be used, and fails under its name."""

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Say why it cannot be used."""
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", self.path.rpartition(":")[2]).lower()
        yield general_finding(name, Outcome.FAILED, General.UNUSABLE, why=self.reason)


def _outsider(path: str) -> Checks:
    found: Any = registry.load(path, __name__)
    if not callable(getattr(found, "check", None)):
        raise registry.NotFoundError(f"{path!r} is no invariant: it has no check(record, reference=None)")
    made: Checks = _made(found, path) if isinstance(found, type) else found
    return made


def _made(outsider: Any, path: str) -> Any:
    try:
        return outsider()
    # an outsider's class may raise anything
    except Exception as error:
        raise registry.NotFoundError(
            f"{path!r} cannot be made: {type(error).__name__}: {error}; give every threshold a default,"
            " or name an instance instead"
        ) from error
