"""Cases for the tables of test_invariants.py and test_verdicts.py, one file for each group of invariants.

A file may hold any of the tables below; they are added up.

    FAILURES       {invariant: {id: (record, pattern of the message) or (record, pattern, reference)}}
    NOT_EVALUATED  {invariant: {id: (record, part of the message) or (record, part, reference)}}
    MAY_BE_MISSING {id: (invariant, record, part of the message)}: not evaluated, and no gap in the evidence
    THRESHOLDS     {(invariant, field): (record on the edge, tightest value, step towards looser)
                    or (record, tightest, step, reference)}
    OPTIONAL       {place in a record: why a healthy record may lack it}
    FIELDS         a function of (cell, names of the trainable tensors) that gives further fields of a healthy record
    DERIVED        a function of the healthy record so far that gives further fields of it
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def gathered(table: str, own: dict[Any, Any] | None = None) -> dict[Any, Any]:
    """The table called `table` of all files, and `own`; cases of one invariant in several of them are added up."""
    found: dict[Any, Any] = {}
    for part in (own or {}, *(getattr(m, table, {}) for m in modules())):
        for name, cases in part.items():
            found[name] = found.get(name, {}) | cases if isinstance(cases, dict) else cases
    return found


def modules() -> list[Any]:
    """The files of this folder."""
    return [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
