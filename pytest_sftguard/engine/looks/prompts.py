"""The prompts: whether generation is given the tokens that the training rows begin with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from pytest_sftguard.engine.data.examples import Example, Examples
from pytest_sftguard.engine.data.language import language
from pytest_sftguard.engine.data.rows import Row, micro_batches, sample
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.looks.supervision import require_causal_model
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import PromptsRecord

_FEW = 8
"""Fewer rows than this begin or end alike by chance."""
_TEXT = 8
"""This many tokens in common are not chance, but a text that was put before or after every question."""

_Prompts = list[list[int]]


class Prompts(Look[Started]):
    """Compares token by token where rows hold the target's questions, else by how prompts begin and end."""

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Compare the prompts of the rows with those of generation."""
        trainer, examples = reached.trainer, reached.examples
        require_causal_model(trainer.model)
        if examples is None:
            raise InapplicableError("the target asks no questions")
        pad = getattr(trainer.processing_class, "pad_token_id", None)
        every = list(dict.fromkeys(r for _, batch in micro_batches(reached.batches, pad) for r in batch))
        # the rows that were trained on count; the data set's are added where those are too few
        if len(_with_prompts(every)) < _FEW:
            every += sample(trainer.train_dataset, pad)
        rows = _with_prompts(every)
        held = [found for row in rows if (found := examples.example(row)) is not None]
        shared = {} if held else language(examples, every)
        if not rows and not shared:
            raise InapplicableError("every row supervises its prompt, or has none")
        record = _matched(examples, held) if held else _forms(examples, rows)
        return {"prompts": PromptsRecord(questions=len(examples.questions), rows=len(rows), **record, **shared)}


def _with_prompts(rows: Iterable[Row]) -> list[Row]:
    """Return those of `rows` that have labels, and tokens before them."""
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
    """Compare how prompts begin and end, where no row holds a question.

    What all prompts of the training share, such as a system prompt or the mark that begins an answer, must be in those
    of generation too, as far as these share anything.
    """
    prompts = [r.prompt for r in rows]
    asked = [q.ids for q in examples.questions]
    seeded = [q.given for q in examples.questions]
    if len(prompts) < _FEW or len(asked) < 2:
        return {}
    special = set(examples.tokenizer.all_special_ids)
    found: dict[str, Any] = {"forms": 0, "strange_forms": 0}
    for end, of_generation in (("begin", [asked]), ("end", [asked, seeded])):
        step = 1 if end == "begin" else -1
        trained, *generated = [[list(p[::step]) for p in some] for some in (prompts, *of_generation)]
        if not any(map(_common, (trained, *generated))):
            continue
        found["forms"] += 1
        if not any(_alike(trained, some, special, from_the_end=step < 0) for some in generated):
            found["strange_forms"] += 1
            in_training, in_generation = trained[0][:4][::step], list(seeded[0][::step][:4][::step])
            found["example"] = f"prompts {end} with {in_training} in training, and with {in_generation} in generation"
    return found


def _alike(some: _Prompts, others: _Prompts, special: set[int], *, from_the_end: bool) -> bool:
    """Return whether what all of `some` begin with has the same form in `others`.

    The form differs where the token before the answer does, where only one side has a special token, and where a longer
    text is missing. Two wordings of a question have the same form.
    """
    one, other = _common(some), _common(others)
    both = min(len(one), len(other))
    place = next((i for i in range(both) if one[i] != other[i]), both)
    if place < both:
        differing = {one[place], other[place]}
    elif len(one) == len(other):
        return True
    else:
        longer, rest = (one, others) if len(one) > both else (other, some)
        differing = {longer[place]}
        if any(prompt[place : place + 1] == [longer[place]] for prompt in rest):
            return True
    formal = (from_the_end and place == 0) or differing & special or max(len(one), len(other)) >= _TEXT
    return not formal


def _common(sequences: _Prompts) -> list[int]:
    """Return the tokens that all `sequences` begin with."""
    return [tokens[0] for tokens in takewhile(lambda t: len(set(t)) == 1, zip(*sequences, strict=False))]
