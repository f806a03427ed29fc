"""The rows that the collator was given, found again in the micro-batches that the model was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.data import loaders
from pytest_sftguard.engine.data.arriving import NO_ID, Comparison, Deviation, Facts, Feature, Given, compared
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.looks.supervision import is_causal_model
from pytest_sftguard.engine.recording.drawing import Generators
from pytest_sftguard.engine.recording.watching import wrapped
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import ArrivalRecord, DeviationRecord

_FIRST, _EVERY = 8, 8
"""The first steps are looked at, and then each of so many: a fault that comes later is there more than once."""
_KEPT_TOKENS = 1 << 20
"""Token ids that are kept, padding included: with masks and labels, 24 megabytes."""


@dataclass(frozen=True)
class _Collated:
    """What the collator was given for one micro-batch."""

    features: list[Feature] | None
    """A copy of the rows; None if one of them is no sequence of token ids."""
    drew: bool
    """Whether the collator drew random numbers."""


class Arrival(Look[Started]):
    """Copies the rows before they are collated, and the micro-batches when their loss is computed."""

    def attach(self, started: Started) -> None:
        """Wrap the computation of the loss, and the collator when the training begins and the data loader is known."""
        self._recorder, self._accumulation = started.recorder, started.trainer.args.gradient_accumulation_steps
        self._loader: Any = None
        self._collate: Any = None
        self._shift_seen: bool | None = None
        self._not_watched = "the training did not begin"
        started.trainer.add_callback(_Beginning(self))
        started.trainer.training_step = wrapped(started.trainer.training_step, self._training_step)
        started.trainer.compute_loss = wrapped(started.trainer.compute_loss, self._compute_loss)
        self._hook = started.trainer.model.register_forward_pre_hook(self._note_labels, with_kwargs=True)
        self._reset()

    def begin(self, loader: Any, *, resumed: bool) -> None:
        """Watch the collator of `loader`, if its rows are collated in this process and in the order of the training."""
        self._reset()
        inner = _innermost(loader)
        self._not_watched = _not_watchable(inner, resumed=resumed)
        if not self._not_watched:
            self._loader, self._collate = inner, inner.collate_fn
            self._generators = Generators(inner.collate_fn)
            inner.collate_fn = wrapped(inner.collate_fn, self._collated)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Compare the rows with the micro-batches."""
        self._hook.remove()
        if self._loader is not None:
            self._loader.collate_fn = self._collate
        facts = _facts(reached.trainer)
        if self._not_watched:
            raise InapplicableError(self._not_watched)
        if self._trained > self._collations:
            raise InapplicableError("the training does not take its micro-batches from the data loader one by one")
        pairs = [(step, self._rows[n], given) for n, (step, given) in self._given.items() if n in self._rows]
        copied = [(step, rows.features, _on_host(given)) for step, rows, given in pairs if rows.features]
        held = [(s, f, given) for s, f, given in copied if any(len(x.ids) > 0 for x in f) == (given.ids.shape[1] > 0)]
        if not held:
            raise InapplicableError("the rows of the data set are no token ids, or the micro-batches hold none of them")
        record = self._record([(s, compared(f, g, facts)) for s, f, g in held], reached.trainer)
        if record.deviations and any(rows.drew for _, rows, _ in pairs):
            raise InapplicableError("the collator draws random numbers, so that its rows need not be the data set's")
        return {"arrival": record}

    def _record(self, steps: Sequence[tuple[int, Comparison]], trainer: Any) -> ArrivalRecord:
        own_shift = self._shift_seen is False and _own_loss(trainer)
        # where the training shifts itself, labels are those of the next token throughout
        shifted = own_shift and not any(c.shifted for _, c in steps)
        found: dict[str, list[tuple[int, Deviation]]] = {}
        for step, comparison in steps:
            for deviation in comparison.deviations:
                if not (shifted and deviation.name == "labels"):
                    found.setdefault(deviation.name, []).append((step, deviation))
        for step, deviation in _classes([(step, d) for step, c in steps for d in c.classes]):
            found.setdefault(deviation.name, []).append((step, deviation))
        return ArrivalRecord(
            micro_batches=len(steps),
            arrived_rows=sum(c.arrived for _, c in steps),
            unknown_rows=sum(c.unknown for _, c in steps),
            deviations=tuple(map(_deviation, found.values())),
        )

    def _reset(self) -> None:
        self._rows: dict[int, _Collated] = {}
        self._given: dict[int, tuple[int, dict[str, Tensor]]] = {}
        self._collations = self._trained = self._tokens = 0
        self._open = False

    def _wanted(self, number: int) -> bool:
        """Whether the micro-batch with this number, from 0, is looked at."""
        step = number // self._accumulation + 1
        return (step <= _FIRST or step % _EVERY == 0) and self._tokens < _KEPT_TOKENS

    def _collated(self, original: Callable[..., Any], features: Any, *args: Any, **kwargs: Any) -> Any:
        number = self._collations
        self._collations += 1
        if not self._wanted(number):
            return original(features, *args, **kwargs)
        with self.aside():
            listed = features if isinstance(features, (list, tuple)) else ()
            copies = [Feature.of(item) for item in listed]
            rows = [c for c in copies if c is not None]
            before = self._generators.states()
        made = original(features, *args, **kwargs)
        with self.aside():
            whole = rows if len(rows) == len(copies) else None
            self._rows[number] = _Collated(whole, self._generators.moved(before))
        return made

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._open = True
        try:
            return original(*args, **kwargs)
        finally:
            self._open = False

    def _compute_loss(self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # an evaluation, or a further loss of the same micro-batch
        if self._open:
            self._open = False
            if self._trained in self._rows and hasattr(inputs, "get"):
                with self.aside():
                    self._keep(inputs)
            self._trained += 1
        return original(model, inputs, *args, **kwargs)

    def _keep(self, inputs: Any) -> None:
        ids, keys = inputs.get("input_ids"), ("input_ids", "attention_mask", "labels")
        if ids is not None and (not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point()):
            return
        copies = {k: t.detach().clone() for k in keys if isinstance(t := inputs.get(k), Tensor)}
        self._tokens += max((t.numel() for t in copies.values()), default=0)
        self._given[self._trained] = self._recorder.taken + 1, copies

    def _note_labels(self, module: Any, args: Any, kwargs: Any) -> None:
        """Note at the first forward pass whether the model is given the labels, which it then shifts."""
        self._hook.remove()
        self._shift_seen = kwargs.get("labels") is not None


# transformers types its callbacks as Any
class _Beginning(TrainerCallback):  # type: ignore[misc]
    """Tells the look that the training begins."""

    def __init__(self, look: Arrival) -> None:
        self._look = look

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The data loader has been prepared, and nothing has been read from it."""
        with self._look.aside():
            self._look.begin(kwargs.get("train_dataloader"), resumed=state.global_step > 0)


def _innermost(loader: Any) -> Any:
    """The DataLoader that collates the rows: accelerate's holds the one that it reads from. None if there is none."""
    found, inner = None, loaders.torch_loader(loader)
    while inner is not None and inner is not found:
        found = inner
        inner = next((v for v in vars(found).values() if isinstance(v, DataLoader)), None)
    return found


def _not_watchable(loader: Any, *, resumed: bool) -> str:
    """Why the rows of a DataLoader cannot be told from its micro-batches; empty if they can."""
    if loader is None:
        return "the micro-batches do not come out of a DataLoader"
    if resumed:
        return "the training is resumed, and passes by rows that it has been trained on"
    if getattr(loader, "num_workers", 0):
        return "worker processes collate the rows"
    return "" if loaders.rows_per_batch(loader) else "the data set makes its micro-batches itself"


def _facts(trainer: Any) -> Facts:
    """What the comparison must know. Raises InapplicableError for a model that may be given other tokens."""
    model, tokenizer = trainer.model, trainer.processing_class
    inner = forwards.inner(model)
    config, name = getattr(inner, "config", None), type(inner).__name__
    causal, decodes = is_causal_model(model), bool(getattr(config, "is_encoder_decoder", False))
    if not (causal or decodes or "Classification" in name):
        raise InapplicableError(f"{name} may be given other tokens than those of its rows")
    pads = _ids("pad_token_id", tokenizer, config)
    others = {
        i
        for key in ("eos_token_id", "bos_token_id", "sep_token_id", "cls_token_id")
        for i in _ids(key, tokenizer, getattr(inner, "generation_config", None), config)
    }
    listed = getattr(tokenizer, "all_special_ids", None)
    special = others | {i for i in (listed if isinstance(listed, list) else []) if isinstance(i, int)}
    pad = pads[0] if pads else NO_ID
    unknown = _ids("unk_token_id", tokenizer)
    separate = bool(pads) and bool(others) and pad not in others and pad not in unknown
    return Facts(pad, separate, frozenset(special - {pad} if separate else special | {pad}), causal, decodes)


def _ids(key: str, *sources: Any) -> list[int]:
    values = [getattr(source, key, None) for source in sources]
    flat = [v for value in values for v in (value if isinstance(value, list) else [value])]
    return [v for v in flat if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _own_loss(trainer: Any) -> bool:
    return type(trainer).compute_loss is not Trainer.compute_loss or trainer.compute_loss_func is not None


def _classes(listed: Sequence[tuple[int, Deviation]]) -> list[tuple[int, Deviation]]:
    """The rows with another class than in the data set, unless the collator gives each class another number."""
    numbers = {(d.expected, d.found) for _, d in listed}
    if len(numbers) == len({a for a, _ in numbers}) == len({b for _, b in numbers}) > 1:
        return []
    return [(step, d) for step, d in listed if d.found != d.expected]


def _on_host(tensors: dict[str, Tensor]) -> Given:
    """The inputs as arrays, without those that are no whole numbers."""

    def whole(key: str) -> Any:
        tensor = tensors.get(key)
        if tensor is None:
            return None
        numbers = tensor.cpu().to(torch.int64)
        # numbers to be added to scores, and labels of a regression
        fractions = tensor.is_floating_point() and not torch.equal(numbers.to(tensor), tensor.cpu())
        return None if fractions else numbers.numpy()

    ids, mask, labels = whole("input_ids"), whole("attention_mask"), whole("labels")
    ids = np.empty((0, 0), np.int64) if ids is None else np.ascontiguousarray(ids)
    return Given(
        ids,
        mask if mask is not None and mask.shape == ids.shape else None,
        labels if labels is not None and labels.ndim in (1, 2) else None,
    )


def _deviation(listed: Sequence[tuple[int, Deviation]]) -> DeviationRecord:
    step, first = listed[0]
    return DeviationRecord(rows=len(listed), step=step, **asdict(first))
