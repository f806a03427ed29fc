"""The invariants, one file each: a frozen dataclass whose fields are its thresholds and whose `check` is pure."""

from __future__ import annotations

from collections.abc import Iterable

from pytest_sftguard import registry
from pytest_sftguard.verdicts import Checks


def load_invariants(extra: Iterable[str] = ()) -> list[Checks]:
    """Every invariant of this folder, and those at the dotted paths in `extra` (classes or instances).

    Raises registry.NotFoundError where a path leads nowhere, or to something that has no `check`.
    """
    found = [registry.load(name, __name__) for name in registry.names(__name__)]
    for path in extra:
        outsider = registry.load(path, __name__)
        if not callable(getattr(outsider, "check", None)):
            raise registry.NotFoundError(f"{path!r} is no invariant: it has no check(record, reference=None)")
        found.append(outsider)
    return [f() if isinstance(f, type) else f for f in found]
