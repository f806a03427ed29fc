"""The labels of the rows: whether there are any, whether they fit, and whether they are the answer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.engine.looks._examples import Examples
from pytest_sftguard.engine.looks._rows import IGNORED, MicroBatch, Row, micro_batches, sample
from pytest_sftguard.records import DefectRecord, SupervisionRecord

_QUESTIONS = 1024
_ENDS_WITHIN = 2
"""Labels at the end among which the end token must be: chat templates put a line break after it."""


class Supervision(Look):
    """Audits the first micro-batches as they were trained on, and rows of the data set."""

    def __init__(self) -> None:
        self._model_saw_labels: bool | None = None
        self._hook: Any = None

    def attach(self, scene: Scene) -> None:
        """Note of the first forward pass whether the model itself is given the labels, which it then shifts."""
        assert scene.trainer is not None

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._hook.remove()
            self._model_saw_labels = kwargs.get("labels") is not None

        self._hook = scene.trainer.model.register_forward_pre_hook(note, with_kwargs=True)

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """Audit what was trained on."""
        trainer = scene.trainer
        assert trainer is not None
        if self._hook is not None:
            self._hook.remove()
        refuse_others(trainer.model)
        facts = _Facts.of(trainer)
        batches = micro_batches(scene.watch.batches if scene.watch else [], facts.pad)
        rows = [r for r in sample(trainer.train_dataset, facts.pad) if r.labels is not None]
        trained = [MicroBatch(b.step, tuple(r for r in b.rows if r.labels is not None)) for b in batches]
        trained = [b for b in trained if b.rows]
        if not trained and not rows:
            raise InapplicableError("the rows hold no labels of their own, one for each token")
        examples = examples_of(scene)
        audit = _Audit(facts, examples, own_shift=self._model_saw_labels is False and _own_loss(trainer))
        found = audit.of([(b.step, b.rows) for b in trained])
        rest = audit.of([(None, rows)])
        return {
            "supervision": SupervisionRecord(
                trained_rows=sum(len(b.rows) for b in trained),
                dataset_rows=len(rows),
                micro_batches=len(trained),
                asks=examples is not None,
                answered_rows=audit.answered,
                trained_defects=found,
                dataset_defects=rest,
            )
        }


def refuse_others(model: Any) -> None:
    """Raise InapplicableError for a model that does not predict each token from those before."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, kind = getattr(inner, "config", None), type(inner).__name__
    tasks = {getattr(c, "task_type", None) for c in getattr(model, "peft_config", {}).values()}
    causal = "CAUSAL_LM" in tasks or "CausalLM" in kind or "LMHead" in kind or "ConditionalGeneration" in kind
    if not causal or getattr(config, "is_encoder_decoder", False):
        raise InapplicableError(f"{kind} does not predict each token from those before it")


def examples_of(scene: Scene) -> Examples | None:
    """The questions of the target; None where it asks none, or has no tokenizer to ask them with."""
    assert scene.trainer is not None
    tokenizer = scene.trainer.processing_class
    if scene.target.questions is None or tokenizer is None or not callable(tokenizer):
        return None
    if scene.examples is None:
        scene.examples = Examples(scene.target, tokenizer, _QUESTIONS)
    return scene.examples if scene.examples.questions else None


@dataclass(frozen=True)
class _Facts:
    """What ids there are, and what some of them mean."""

    pad: int | None
    bos: int | None
    eos: frozenset[int]
    embeddings: int | None
    vocabulary: int | None

    @classmethod
    def of(cls, trainer: Any) -> _Facts:
        model, tokenizer = trainer.model, trainer.processing_class
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        sources = [tokenizer, getattr(inner, "generation_config", None), getattr(inner, "config", None)]

        def ids(name: str) -> list[int]:
            values: list[Any] = [getattr(s, name, None) for s in sources]
            flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
            return [v for v in flat if _is_id(v)]

        eos, pads, beginnings = frozenset(ids("eos_token_id")), ids("pad_token_id"), ids("bos_token_id")
        bos = beginnings[0] if beginnings and beginnings[0] not in {*eos, *pads[:1]} else None
        return cls(pads[0] if pads else None, bos, eos, _rows_of(inner, "get_input_embeddings"), _vocabulary(inner))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _rows_of(model: Any, getter: str) -> int | None:
    module = getattr(model, getter)() if hasattr(model, getter) else None
    weight = getattr(module, "weight", None)
    return len(weight) if weight is not None and weight.dim() == 2 else None


def _vocabulary(model: Any) -> int | None:
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    return _rows_of(model, "get_output_embeddings") or (size if isinstance(size, int) else None)


def _own_loss(trainer: Any) -> bool:
    from transformers import Trainer

    return type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None


class _Audit:
    """Counts what is wrong with rows."""

    def __init__(self, facts: _Facts, examples: Examples | None, own_shift: bool) -> None:
        self.facts, self.examples, self.own_shift = facts, examples, own_shift
        self.answered = 0

    def of(self, groups: Sequence[tuple[int | None, Sequence[Row]]]) -> tuple[DefectRecord, ...]:
        """The defects of the rows of all groups, each group with its step."""
        rows = [(step, row) for step, group in groups for row in group]
        found = [
            self._defect("unsupervised", rows, lambda r: not _supervised(r)),
            self._defect("mismatched", rows, self._mismatched([r for _, r in rows])),
            self._defect("unknown_id", rows, self._unknown_id),
            self._defect("unknown_label", rows, self._unknown_label),
            self._defect("doubled_bos", rows, self._doubled_bos),
            self._defect("truncated", rows, self._cut([r for _, r in rows])),
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
            # a token that spans the seam is no matter of the mask, but of the prompt
            prompt = len(found.question.ids) if row.ids[: len(found.question.ids)] == found.question.ids else 0
            return row.first_label < prompt or _wholly(row)

        return [
            self._defect("prompt_supervised", held, in_prompt),
            self._defect("prompt_supervised_unmatched", others, _wholly),
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
        return DefectRecord(name=name, rows=len(hit), step=step, example=self._shown(row))

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
            return lambda row: False  # the loss is the target's own, and expects labels that are shifted already
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

    def _cut(self, rows: Sequence[Row]) -> Callable[[Row], bool]:
        """Rows of the greatest length that do not end as most rows do."""
        learned = [r for r in rows if _supervised(r)]
        longest = max((len(r.ids) for r in rows), default=0)
        ended = sum(map(self._ends, learned))
        if not self.facts.eos or ended * 2 <= len(learned):
            return lambda row: False
        return lambda row: len(row.ids) == longest and len(row.starts) == 1 and _supervised(row) and not self._ends(row)


def _supervised(row: Row) -> bool:
    """Whether a label is left after the shift."""
    return any(label != IGNORED for label in (row.labels or ())[1:])


def _wholly(row: Row) -> bool:
    """Whether everything is supervised, from the first token that can be."""
    return len(row.ids) > 2 and all(label != IGNORED for label in (row.labels or ())[1:])


def _within(index: int, size: int | None) -> bool:
    return index >= 0 and (size is None or index < size)


def _short(ids: Iterable[int]) -> str:
    every = list(ids)
    return str(every[:12])[:-1] + (", ...]" if len(every) > 12 else "]")
