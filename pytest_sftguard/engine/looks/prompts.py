"""The prompts: whether generation is given the tokens that the training rows begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.engine.looks._examples import Example, Examples
from pytest_sftguard.engine.looks._rows import Row, micro_batches, sample
from pytest_sftguard.engine.looks.supervision import examples_of, refuse_others
from pytest_sftguard.records import PromptsRecord

_FEW = 8
"""Fewer rows than this have ends in common by chance."""
_TEXT = 8
"""Tokens in common that are no matter of chance, but a text that was put before or behind every question."""


_Prompts = Sequence[Sequence[int]]


class Prompts(Look):
    """Compares token by token where a row holds one of the questions, and by their ends where none does."""

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """Compare."""
        trainer = scene.trainer
        assert trainer is not None
        refuse_others(trainer.model)
        examples = examples_of(scene)
        if examples is None:
            raise InapplicableError("the target asks no questions")
        pad = getattr(trainer.processing_class, "pad_token_id", None)
        batches = micro_batches(scene.watch.batches if scene.watch else [], pad)
        rows = _with_prompts(r for b in batches for r in b.rows)
        if len(rows) < _FEW:  # what was trained on counts, and the data set where that is too little to go by
            rows = _with_prompts([*rows, *sample(trainer.train_dataset, pad)])
        if not rows:
            raise InapplicableError("no row has a prompt that is not supervised")
        held = examples.examples(rows)
        record = _matched(examples, held) if held else _forms(examples, rows)
        return {"prompts": PromptsRecord(questions=len(examples.questions), rows=len(rows), **record)}


def _with_prompts(rows: Iterable[Row]) -> list[Row]:
    """Those of `rows` that have labels, and something before them."""
    return [r for r in dict.fromkeys(rows) if r.labels is not None and 0 < r.first_label < len(r.ids)]


def _matched(examples: Examples, held: list[Example]) -> dict[str, Any]:
    deviating = [e for e in held if e.row.ids[: len(e.question.given)] != e.question.given]
    short = [e for e in held if e not in deviating and len(e.question.given) < e.row.first_label]
    found: dict[str, Any] = {"matched": len(held), "deviating": len(deviating), "short": len(short)}
    if deviating or short:
        worst = (deviating or short)[0]
        found["example"] = _shown(examples, worst.row, worst.question.given)
    return found


def _shown(examples: Examples, row: Row, given: Sequence[int]) -> str:
    place = next((i for i, (a, b) in enumerate(zip(row.ids, given, strict=False)) if a != b), len(given))
    around = slice(max(0, place - 2), place + 3)
    trained, asked = list(row.ids[around]), list(given[around])
    return f"{examples.text(given)[-60:]!r}: from token {around.start} on {trained} in training, {asked} in generation"


def _forms(examples: Examples, rows: Sequence[Row]) -> dict[str, Any]:
    """Both ends of the prompts, where no question is among the rows.

    What all prompts of the training have in common, a system prompt or the mark that an answer begins, those of
    generation must have too, as far as they have anything in common themselves.
    """
    prompts = [r.prompt for r in rows]
    asked = [q.ids for q in examples.questions]
    seeded = [q.given for q in examples.questions]
    if len(prompts) < _FEW or len(asked) < 2:
        return {}
    special = set(examples.tokenizer.all_special_ids)
    found: dict[str, Any] = {"forms": 0, "strange_forms": 0}
    for end, of_generation in (("begin", [asked]), ("end", [asked, seeded])):
        backwards = end == "end"
        if not any(_common(some, backwards) for some in (prompts, *of_generation)):
            continue
        found["forms"] += 1
        if not any(_alike(prompts, some, special, backwards) for some in of_generation):
            found["strange_forms"] += 1
            shown = [list(some[0][-4:] if backwards else some[0][:4]) for some in (prompts, seeded)]
            found["example"] = f"prompts {end} as {shown[0]} does in training, and as {shown[1]} does in generation"
    return found


def _alike(some: _Prompts, others: _Prompts, special: set[int], backwards: bool) -> bool:
    """Whether what is common to all on one side is found on the other, as far as that is a matter of the form.

    It is, where the token before the answer differs, where a special token is on one side alone, or where a text of
    some length is missing. Two ways of wording a question are none.
    """
    one, other = _common(some, backwards), _common(others, backwards)
    both = min(len(one), len(other))
    place = next((i for i in range(both) if one[i] != other[i]), both)
    if place < both:
        differing = {one[place], other[place]}
    elif len(one) == len(other):
        return True
    else:
        longer, rest = (one, others) if len(one) > both else (other, some)
        differing = {longer[place]}
        if any(_at(prompt, place, backwards) == longer[place] for prompt in rest):
            return True
    formal = (backwards and place == 0) or differing & special or max(len(one), len(other)) >= _TEXT
    return not formal


def _common(sequences: _Prompts, backwards: bool) -> list[int]:
    """The tokens in which all begin, or end: those nearest to the end first."""
    turned = [s[::-1] if backwards else s for s in sequences]
    shared: list[int] = []
    for tokens in zip(*turned, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared


def _at(prompt: Sequence[int], place: int, backwards: bool) -> int | None:
    if place >= len(prompt):
        return None
    return prompt[-1 - place if backwards else place]
