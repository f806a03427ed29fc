"""The labels of the rows: whether there are any, match the tokens, and supervise the answer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.data import padding
from pytest_sftguard.engine.data.examples import Examples
from pytest_sftguard.engine.data.rows import IGNORED, Row, micro_batches, sample
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import DefectRecord, SupervisionRecord

_ALIKE = 4
"""Fewest rows whose labels must be shifted alike to be called shifted."""
_ENDS_WITHIN = 2
"""Last labels of a row among which the end token must be: chat templates put a line break after it."""


class Supervision(Look[Started]):
    """Audits the first micro-batches as they were trained on, and rows of the data set."""

    def attach(self, started: Started) -> None:
        """Note at the first forward pass whether the model itself is given the labels, which it then shifts."""
        self._model_saw_labels: bool | None = None

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._hook.remove()
            self._model_saw_labels = kwargs.get("labels") is not None

        self._hook = started.trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Audit the rows that were trained on, and those of the data set."""
        trainer = reached.trainer
        self._hook.remove()
        facts = _Facts.of(trainer)
        if (alone := self._of_encoder(reached, facts)) is not None:
            return {"supervision": alone}
        require_causal_model(trainer.model)
        rows = _labelled(sample(trainer.train_dataset, facts.pad))
        trained = [(step, _labelled(batch)) for step, batch in micro_batches(reached.batches, facts.pad)]
        trained = [(step, batch) for step, batch in trained if batch]
        if not trained and not rows:
            raise InapplicableError("the rows have no labels of their own, one per token")
        examples = reached.examples
        own_shift = self._model_saw_labels is False and _own_loss(trainer)
        audit = _Audit(facts, examples, own_shift)
        padded = padding.defect(reached.batches, facts.separate_pad, padding.OWN_SHIFT if own_shift else padding.SHIFT)
        hidden = padding.hidden(reached.batches, facts.separate_pad)
        found = (*audit.of(trained), *(defect for defect in (padded, hidden) if defect is not None))
        rest = audit.of([(None, rows)])
        return {
            "supervision": SupervisionRecord(
                trained_rows=sum(len(batch) for _, batch in trained),
                dataset_rows=len(rows),
                micro_batches=len(trained),
                asks=examples is not None,
                answered_rows=audit.answered,
                trained_defects=found,
                dataset_defects=rest,
                **_strange([row for _, batch in trained for row in batch], rows, trainer.train_dataset),
            )
        }

    def _of_encoder(self, reached: Started, facts: _Facts) -> SupervisionRecord | None:
        """What can be told of a model that predicts each token in its own place; None for any other model.

        A decoder has a mask of its own, which is none of the inputs that are compared with the labels here.
        """
        model = reached.trainer.model
        config = getattr(forwards.inner(model), "config", None)
        if is_causal_model(model) or getattr(config, "is_encoder_decoder", False):
            return None
        seen = [b for b in reached.batches if padding.comparable(b)]
        if not seen:
            return None
        padded = padding.defect(seen, facts.separate_pad, padding.IN_PLACE)
        hidden = padding.hidden(seen, facts.separate_pad)
        return SupervisionRecord(
            trained_rows=sum(len(b["labels"]) for b in seen),
            dataset_rows=0,
            micro_batches=len(seen),
            asks=False,
            trained_defects=tuple(defect for defect in (padded, hidden) if defect is not None),
        )


def _strange(trained: Sequence[Row], rows: Sequence[Row], dataset: Any) -> dict[str, int]:
    """Count the rows as trained on whose tokens, or whose labels, are not those of the data set's rows."""
    if not rows or len(rows) < len(dataset):
        return {}
    known: dict[Any, set[Any]] = {}
    for row in rows:
        known.setdefault(tuple(row.ids), set()).add(tuple(row.labels or ()))
    held = [known.get(tuple(row.ids)) for row in trained]
    return {
        "strange_inputs": sum(labels is None for labels in held),
        "strange_labels": sum(
            labels is not None and tuple(row.labels or ()) not in labels
            for row, labels in zip(trained, held, strict=True)
        ),
    }


def is_causal_model(model: Any) -> bool:
    """Whether `model` predicts each token from those before it."""
    inner = forwards.inner(model)
    config, name = getattr(inner, "config", None), type(inner).__name__
    tasks = {getattr(c, "task_type", None) for c in getattr(model, "peft_config", {}).values()}
    causal = "CAUSAL_LM" in tasks or "CausalLM" in name or "LMHead" in name or "ConditionalGeneration" in name
    return causal and not getattr(config, "is_encoder_decoder", False)


def require_causal_model(model: Any) -> None:
    """Raise InapplicableError unless `model` predicts each token from those before it."""
    if not is_causal_model(model):
        name = type(forwards.inner(model)).__name__
        raise InapplicableError(f"{name} does not predict each token from those before it")


@dataclass(frozen=True)
class _Facts:
    """Which token ids there are, and what some of them mean; None where that is not known."""

    pad: int | None
    """The padding id."""
    bos: int | None
    """The id that begins a sequence, and nothing else."""
    eos: frozenset[int]
    """The ids that end a sequence."""
    embeddings: int | None
    """How many ids have an embedding."""
    vocabulary: int | None
    """How many ids the model gives a logit to."""

    @property
    def separate_pad(self) -> int | None:
        """The padding id where no sequence ends in it; None if that is not known."""
        return None if self.pad in self.eos or not self.eos else self.pad

    @classmethod
    def of(cls, trainer: Any) -> _Facts:
        """Read the tokenizer and the configuration of the model."""
        tokenizer, inner = trainer.processing_class, forwards.inner(trainer.model)
        sources = [tokenizer, getattr(inner, "generation_config", None), getattr(inner, "config", None)]

        def ids(name: str) -> list[int]:
            values: list[Any] = [getattr(s, name, None) for s in sources]
            flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
            return [v for v in flat if _is_id(v)]

        eos, pads, beginnings = frozenset(ids("eos_token_id")), ids("pad_token_id"), ids("bos_token_id")
        bos = beginnings[0] if beginnings and beginnings[0] not in {*eos, *pads[:1]} else None
        return cls(pads[0] if pads else None, bos, eos, _rows_of(inner, "input"), _vocabulary(inner))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rows_of(model: Any, side: str) -> int | None:
    weight = getattr(forwards.embeddings(model, side), "weight", None)
    return len(weight) if weight is not None and weight.dim() == 2 else None


def _vocabulary(model: Any) -> int | None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return _rows_of(model, "output") or (size if isinstance(size, int) else None)


def _own_loss(trainer: Any) -> bool:
    from transformers import Trainer

    return type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None


class _Audit:
    """Counts the defects of rows.

    `own_shift`: the target computes the loss itself, so that its labels may be shifted already.
    """

    def __init__(self, facts: _Facts, examples: Examples | None, own_shift: bool) -> None:
        self.facts, self.examples, self.own_shift = facts, examples, own_shift
        self.answered = 0

    def of(self, groups: Sequence[tuple[int | None, Sequence[Row]]]) -> tuple[DefectRecord, ...]:
        """Return the defects of all rows; each group of rows has its optimizer step, or None."""
        rows = [(step, row) for step, group in groups for row in group]
        found = [
            self._defect("unsupervised", rows, lambda r: not _supervised(r)),
            self._defect("mismatched", rows, self._mismatched([r for _, r in rows])),
            self._defect("unknown_id", rows, self._unknown_id),
            self._defect("unknown_label", rows, self._unknown_label),
            self._defect("doubled_bos", rows, self._doubled_bos),
            self._defect("truncated", rows, self._truncated([r for _, r in rows])),
            *self._of_questions(rows),
        ]
        barren = [step for step, group in groups if step and len(group) > 1 and not any(map(_supervised, group))]
        if barren:
            found.append(DefectRecord(name="barren", rows=len(barren), step=barren[0]))
        return tuple(f for f in found if f is not None)

    def _of_questions(self, rows: Sequence[tuple[int | None, Row]]) -> list[DefectRecord | None]:
        if self.examples is None:
            return []
        by_row = {id(row): self.examples.example(row) for _, row in rows}
        held = [(step, row) for step, row in rows if by_row[id(row)] is not None]
        others = [(step, row) for step, row in rows if by_row[id(row)] is None]
        self.answered += len(held)

        def wrong(row: Row) -> bool:
            found = by_row[id(row)]
            return found is not None and found.clear and _supervised(row) and not found.right

        def in_prompt(row: Row) -> bool:
            found = by_row[id(row)]
            if found is None or not _supervised(row):
                return False
            # a token that spans the end of the prompt is the prompt's defect, not the mask's
            prompt = len(found.question.ids) if row.ids[: len(found.question.ids)] == found.question.ids else 0
            return row.first_label < prompt or _all_supervised(row)

        return [
            self._defect("prompt_supervised", held, in_prompt),
            self._defect("prompt_supervised_unmatched", others, _all_supervised),
            self._defect("wrong_answer", held, wrong),
            self._defect("endless", held, lambda r: _supervised(r) and not self._ends(r)),
        ]

    def _defect(
        self, name: str, rows: Sequence[tuple[int | None, Row]], bad: Callable[[Row], bool]
    ) -> DefectRecord | None:
        hit = [(step, row) for step, row in rows if bad(row)]
        if not hit:
            return None
        step, row = hit[0]
        offset = _offset([r for _, r in hit]) if name == "mismatched" else None
        return DefectRecord(name=name, rows=len(hit), step=step, example=self._shown(row), offset=offset)

    def _shown(self, row: Row) -> str:
        labels = row.labels or ()
        supervised = [i for i, label in zip(row.ids, labels, strict=True) if label != IGNORED]
        if self.examples is None:
            return f"ids {_short(row.ids)}, supervised {_short(supervised)}"
        return f"{self.examples.text(row.ids)[:80]!r}, supervised {self.examples.text(supervised)[:60]!r}"

    def _mismatched(self, rows: Sequence[Row]) -> Callable[[Row], bool]:
        def shifted(row: Row) -> bool:
            return all(
                label in (IGNORED, following)
                for label, following in zip((row.labels or ())[:-1], row.ids[1:], strict=True)
            )

        if self.own_shift and all(map(shifted, rows)):
            return lambda row: False
        return lambda row: any(
            label not in (IGNORED, i) for label, i in zip((row.labels or ())[1:], row.ids[1:], strict=True)
        )

    def _unknown_id(self, row: Row) -> bool:
        return not all(_within(i, self.facts.embeddings) for i in row.ids)

    def _unknown_label(self, row: Row) -> bool:
        return not all(label == IGNORED or _within(label, self.facts.vocabulary) for label in (row.labels or ())[1:])

    def _doubled_bos(self, row: Row) -> bool:
        bos = self.facts.bos
        return bos is not None and any(row.ids[s : s + 2] == (bos, bos) for s in row.starts)

    def _ends(self, row: Row) -> bool:
        counted = [label for label in row.labels or () if label != IGNORED]
        return not self.facts.eos or bool(self.facts.eos.intersection(counted[-_ENDS_WITHIN:]))

    def _truncated(self, rows: Sequence[Row]) -> Callable[[Row], bool]:
        """Select the rows of the greatest length that do not end as most rows do."""
        learned = [r for r in rows if _supervised(r)]
        longest = max((len(r.ids) for r in rows), default=0)
        ended = sum(map(self._ends, learned))
        if not self.facts.eos or ended * 2 <= len(learned):
            return lambda row: False
        # a pack, which ends where it is full, has the ends of other texts within
        return lambda row: (
            len(row.ids) == longest
            and len(row.starts) == 1
            and _supervised(row)
            and not self.facts.eos.intersection(row.labels or ())
        )


def _offset(rows: Sequence[Row]) -> int | None:
    """The one shift, in places, that makes the labels of all `rows` their tokens; None where there is none."""
    # a few labels are those of a neighbour by chance
    if len(rows) < _ALIKE:
        return None
    for offset in (1, -1, 2, -2):
        pairs = [
            (label, row.ids[place + offset])
            for row in rows
            for place, label in enumerate(row.labels or ())
            if label != IGNORED and 0 <= place + offset < len(row.ids)
        ]
        if pairs and all(label == own for label, own in pairs):
            return offset
    return None


def _labelled(rows: list[Row]) -> list[Row]:
    return [r for r in rows if r.labels is not None]


def _supervised(row: Row) -> bool:
    """Return whether the shift leaves a label."""
    return any(label != IGNORED for label in (row.labels or ())[1:])


def _all_supervised(row: Row) -> bool:
    """Return whether every token that can be supervised is."""
    return len(row.ids) > 2 and all(label != IGNORED for label in (row.labels or ())[1:])


def _within(index: int, size: int | None) -> bool:
    return index >= 0 and (size is None or index < size)


def _short(ids: Iterable[int]) -> str:
    every = list(ids)
    return str(every[:12])[:-1] + (", ...]" if len(every) > 12 else "]")
