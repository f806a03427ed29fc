"""Rendering: the sentence that a finding's reason makes of its evidence. Nothing else reads a finding's message."""

from __future__ import annotations

import contextlib
import re
import string
from collections.abc import Mapping
from typing import Any

from pytest_sftguard.verdicts import Finding

_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)


def message(finding: Finding) -> str:
    """Return what the finding says, its evidence filled in; the bare sentence where the evidence does not fit it.

    In the sentence of a reason `{name}` is a piece of evidence, or `step`, `observed` or `limit`, with Python's format
    specs. `{n:# batch}` counts: `1 batch`, `2 batches`. A part in double brackets, `[[ (first: step {step})]]`, is
    left out where one of its values is missing or empty. A message without a reason is printed as it is.
    """
    text = finding.message
    if finding.reason:
        values = {"step": finding.step, "observed": finding.observed, "limit": finding.limit, **finding.evidence}
        with contextlib.suppress(LookupError, ValueError, AttributeError, TypeError):
            text = _filled(finding.message, values)
    return f"waived by the user: {text}" if finding.waived else text


def told(evidence: str | Finding) -> str:
    """Return a piece of evidence as a sentence."""
    return evidence if isinstance(evidence, str) else message(evidence)


def _filled(sentence: str, values: Mapping[str, Any]) -> str:
    """Fill the fields of a sentence; every other part of the split is an optional one."""
    parts = enumerate(_OPTIONAL.split(sentence))
    return "".join(_FORMATTER.vformat(p, (), values) for i, p in parts if i % 2 == 0 or _is_complete(p, values))


def _is_complete(part: str, values: Mapping[str, Any]) -> bool:
    names = [name for _, name, _, _ in _FORMATTER.parse(part) if name]
    # 0 is a value like any other; nothing, an empty text and no names at all are not
    return all(bool(value := values.get(name)) or value == 0 for name in names)


class _Formatter(string.Formatter):
    """Formats lists and counts beside what Python formats; what a format spec does not fit is printed plainly."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec.startswith("# "):
            return f"{value} {_plural(format_spec[2:]) if value != 1 else format_spec[2:]}"
        if isinstance(value, (list, tuple)):
            return ", ".join(map(str, value))
        # a number that is not finite is a string after its way through JSON, and is formatted as the number
        for convert in (lambda x: x, float):
            with contextlib.suppress(ValueError, TypeError):
                return format(convert(value), format_spec)
        return str(value)


_FORMATTER = _Formatter()


def _plural(noun: str) -> str:
    if re.search(r"(s|x|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"
