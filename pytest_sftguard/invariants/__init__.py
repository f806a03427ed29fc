"""The invariants, one file each: a frozen dataclass whose fields are its thresholds and whose `check` is pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pytest_sftguard import registry
from pytest_sftguard.verdicts import Checks


def load_invariants(extra: Iterable[str] = ()) -> list[Checks]:
    """Every invariant of this folder, and those at the dotted paths in `extra` (classes or instances).

    Raises registry.NotFoundError where a path leads nowhere, to something that has no `check`, or to a class that
    cannot be made without arguments.
    """
    found = [registry.load(name, __name__) for name in registry.names(__name__)]
    for path in extra:
        outsider = registry.load(path, __name__)
        if not callable(getattr(outsider, "check", None)):
            raise registry.NotFoundError(f"{path!r} is no invariant: it has no check(record, reference=None)")
        found.append(outsider if not isinstance(outsider, type) else _made(outsider, path))
    return [f() if isinstance(f, type) else f for f in found]


def _made(outsider: Any, path: str) -> Any:
    try:
        return outsider()
    except Exception as error:  # an outsider's class may raise anything
        raise registry.NotFoundError(
            f"{path!r} cannot be made: {type(error).__name__}: {error}; give every threshold a default,"
            " or name an instance instead"
        ) from error
