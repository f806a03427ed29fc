"""Whether rows and questions come from one tokenizer: the pairs of tokens that they share, as they are and shifted."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from pytest_sftguard.engine.data.examples import Examples
from pytest_sftguard.engine.data.rows import Row

_PAIRS = 256
"""Pairs of the questions that are looked for."""
_FEWEST = 8
"""Fewer pairs than this may be missing by chance."""
_LARGEST_OFFSET = 64
"""Largest distance of ids that is tried; a list of special tokens that was put in front moves ids by a few."""
_ROWS = 32
"""Rows that are decoded and read again."""


def language(examples: Examples, rows: Sequence[Row]) -> dict[str, Any]:
    """Fields of a PromptsRecord: the share of the questions' pairs of tokens that rows hold, and what explains none.

    A question need not be in the rows, but rows that were made with its tokenizer hold some pair of its tokens: of its
    template, of its words, of its punctuation. Where they hold none, the ids may be shifted, or another tokenizer's.
    """
    special = set(examples.tokenizer.all_special_ids)
    asked = list(dict.fromkeys(p for q in examples.questions for p in _pairs(q.given, special)))[:_PAIRS]
    held = {p for row in rows for p in _pairs(row.ids, special)}
    if len(asked) < _FEWEST or len(held) < _FEWEST:
        return {}
    share = _share(asked, held, 0)
    found: dict[str, Any] = {"pairs": len(asked), "shared_pairs": share}
    offsets = {d: _share(asked, held, d) for d in range(-_LARGEST_OFFSET, _LARGEST_OFFSET + 1) if d}
    offset = max(offsets, key=lambda d: (offsets[d], -abs(d)))
    found |= {"offset": offset, "offset_pairs": offsets[offset]}
    # what is shared needs no explanation
    if share == 0:
        found["rows_reread"] = _reread(examples.tokenizer, [r.ids for r in rows])
        found["questions_reread"] = _reread(examples.tokenizer, [q.ids for q in examples.questions])
    return found


def _pairs(ids: Iterable[int], special: set[int]) -> Iterable[tuple[int, int]]:
    return itertools.pairwise(i for i in ids if i not in special)


def _share(asked: list[tuple[int, int]], held: set[tuple[int, int]], offset: int) -> float:
    return sum((a + offset, b + offset) in held for a, b in asked) / len(asked)


def _reread(tokenizer: Any, sequences: Sequence[Sequence[int]]) -> float:
    """Share of the ids that come back when their text is read again: nearly all of those that a tokenizer made."""
    size, ratios = len(tokenizer), []
    for ids in sequences[:_ROWS]:
        known = [i for i in ids if 0 <= i < size]
        again = tokenizer(tokenizer.decode(known), add_special_tokens=False)["input_ids"]
        ratios.append(difflib.SequenceMatcher(None, known, list(again), autojunk=False).ratio() if known else 0.0)
    return sum(ratios) / len(ratios) if ratios else 0.0
