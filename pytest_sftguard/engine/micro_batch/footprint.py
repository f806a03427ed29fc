"""The gradient of the loss with respect to the last hidden state: at which places it is, and where it points.

A loss over tokens has a gradient where a label is, one place earlier if the model predicts the next token, and none
elsewhere. It needs no logits, so that fused and chunked losses are looked at too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.data.rows import IGNORED
from pytest_sftguard.engine.micro_batch.repeated import Repeated, UnaskedError
from pytest_sftguard.records import AimRecord, FootprintRecord

_SILENT = 1e-7
"""Share of the largest gradient below which a place has none."""
_KNOWN = 1e-5
"""A label whose probability is within this of 1 has no gradient in float32."""
_UNSURE = 0.5
"""Places whose label has a higher probability are not asked for their aim: label smoothing rightly pulls it down."""
_PLACES = 512
_NEXT, _SAME = 0.9, 0.5
"""Share of labels that equal their own input token from which on the next token is predicted, and up to which not."""
_OF_THE_MODEL = {"input_ids", "labels", "attention_mask", "position_ids", "token_type_ids", "shift_labels"}


@dataclass
class Labels:
    """The token labels of a micro-batch."""

    values: Tensor
    """Labels of shape (rows, places)."""
    shift: int
    """1 if a place predicts the next token, 0 if it is labelled itself."""

    @classmethod
    def of(cls, inputs: Any) -> Labels:
        """Return the labels of `inputs`. Raises UnaskedError where there are none for single tokens."""
        labels = inputs.get("labels") if isinstance(inputs, Mapping) or hasattr(inputs, "get") else None
        if not isinstance(labels, Tensor) or labels.ndim != 2 or labels.is_floating_point():
            raise UnaskedError("the batch has no `labels` for single tokens")
        supervised = labels != IGNORED
        if not bool(supervised.any()):
            raise UnaskedError("no token of the micro-batch has a label")
        equal = equal_to_inputs(inputs, labels)
        if equal is None or equal <= _SAME:
            return cls(labels, 0)
        if equal < _NEXT:
            raise UnaskedError(f"{equal:.0%} of the labels are the token at their own place, which fits no usual loss")
        return cls(labels, 1)

    def places(self, shift: int | None = None) -> Tensor:
        """Return which places have a label, of shape (rows, places), with another `shift` if one is given."""
        return _moved(self.values != IGNORED, self.shift if shift is None else shift)

    @property
    def targets(self) -> Tensor:
        """The label that each place predicts, of shape (rows, places)."""
        return _moved(self.values, self.shift, IGNORED)


def equal_to_inputs(inputs: Any, labels: Tensor) -> float | None:
    """Return the share of labels that equal the token at their own place; None without tokens of the same shape."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return None
    supervised = labels != IGNORED
    return float((ids == labels)[supervised].float().mean())


def footprint(repeated: Repeated) -> FootprintRecord:
    """Compare where the gradient is with where the labels are. Raises UnaskedError where neither is known."""
    labels = Labels.of(repeated.inputs)
    sizes = _gradient(repeated, labels).float().norm(dim=-1)
    if not bool(sizes.isfinite().all()):
        raise UnaskedError("the gradient of the last hidden state is not finite")
    inside = labels.places()
    largest = float(sizes.max())
    if not largest > 0:
        return FootprintRecord(places=int(inside.sum()), silent=int(inside.sum()), silent_rows=_rows(inside, inside))
    silent = inside & (sizes <= _SILENT * largest)
    if bool(silent.any()):
        silent &= ~_known(repeated, labels, silent)
    told = _told(repeated.inputs, labels, silent) if bool(silent.any()) else ""
    if told:
        inside, silent = inside & ~silent, torch.zeros_like(silent)
    within = float(sizes[inside].max()) if bool(inside.any()) else 0.0
    beside = torch.where(inside, 0.0, sizes)
    padding = _padding(repeated.inputs, labels)
    return FootprintRecord(
        places=int(inside.sum()),
        shift=labels.shift,
        silent=int(silent.sum()),
        silent_rows=_rows(silent, inside),
        first_silent=_where(silent),
        outside=_share(beside, within),
        first_outside=_where(beside > 0.5 * within),
        padding=_share(torch.where(padding, sizes, 0.0), within),
        first_padding=_where(padding & (sizes > 0.2 * within)),
        other_shift=_other(sizes > _SILENT * largest, labels),
        told_by=told,
    )


def aim(repeated: Repeated) -> AimRecord:
    """Compare the gradient with that of cross-entropy at the places with labels.

    At the logits where the loss uses them, else at the last hidden state. Raises UnaskedError where nothing can be
    compared.
    """
    labels = Labels.of(repeated.inputs)
    targets, hidden = labels.targets, repeated.hidden
    state_gradient = _gradient(repeated, labels)
    asked = (targets != IGNORED) & (state_gradient.float().norm(dim=-1) > 0)
    rows, places = asked.nonzero(as_tuple=True)
    if not len(rows):
        raise UnaskedError("no place with a label has a gradient")
    spread = torch.linspace(0, len(rows) - 1, min(_PLACES, len(rows))).long()
    rows, places = rows[spread], places[spread]
    wanted = targets[rows, places]
    if hidden.logits is not None and hidden.logits_gradient is not None:
        at = "logits"
        scores, got = hidden.logits[rows, places].float(), hidden.logits_gradient[rows, places].float()
        reference = _cross_entropy(scores, wanted)
    else:
        at = "last hidden state"
        assert hidden.state is not None
        state = hidden.state[rows, places].requires_grad_()
        with torch.enable_grad():
            scores = _scores(repeated, state)
            reference = torch.autograd.grad(scores, state, _cross_entropy(scores.detach(), wanted))[0].float()
        got = state_gradient[rows, places].float()
    unsure = scores.detach().softmax(-1).gather(-1, wanted[:, None])[:, 0] < _UNSURE
    if not bool(unsure.any()):
        raise UnaskedError("the model already knows every label of the micro-batch")
    got, reference = got[unsure], reference[unsure]
    each = torch.nn.functional.cosine_similarity(got, reference, dim=-1)
    return AimRecord(
        at=at,
        places=int(unsure.sum()),
        cosine=float(each.mean()),
        joint_cosine=float((got * reference).sum() / (got.norm() * reference.norm()).clamp_min(1e-30)),
        against=int((each < 0).sum()),
    )


def _gradient(repeated: Repeated, labels: Labels) -> Tensor:
    hidden = repeated.hidden
    if hidden.passes != 1:
        raise UnaskedError(f"the loss made {hidden.passes} forward passes whose last hidden state can be seen")
    if hidden.state is None or hidden.state.shape[:2] != labels.values.shape:
        raise UnaskedError("the last hidden state does not have one place for each label")
    if hidden.gradient is None:
        raise UnaskedError("the loss has no gradient with respect to the last hidden state that was seen")
    return hidden.gradient


def _scores(repeated: Repeated, state: Tensor) -> Tensor:
    head = repeated.hidden.head
    if head is None:
        raise UnaskedError("the model has neither logits nor an output embedding")
    scores: Tensor = head(state)
    return scores


def _cross_entropy(scores: Tensor, wanted: Tensor) -> Tensor:
    """Return softmax minus one-hot, the gradient of the cross-entropy with respect to `scores`."""
    if int(wanted.max()) >= scores.shape[-1] or int(wanted.min()) < 0:
        raise UnaskedError("labels are no indices of the logits")
    away = scores.float().softmax(-1)
    away[torch.arange(len(wanted)), wanted] -= 1
    return away.to(scores.dtype)


def _known(repeated: Repeated, labels: Labels, silent: Tensor) -> Tensor:
    """Return which of the silent places predict their label with a probability of 1."""
    known = torch.zeros_like(silent)
    rows, places = silent.nonzero(as_tuple=True)
    wanted = labels.targets[rows, places]
    if repeated.hidden.logits is not None:
        scores = repeated.hidden.logits[rows, places]
    elif repeated.hidden.head is not None and repeated.hidden.state is not None:
        with torch.no_grad():
            scores = _scores(repeated, repeated.hidden.state[rows, places])
    else:
        return known
    if int(wanted.max()) < scores.shape[-1] and int(wanted.min()) >= 0:
        known[rows, places] = scores.float().softmax(-1).gather(-1, wanted[:, None])[:, 0] > 1 - _KNOWN
    return known


def _told(inputs: Any, labels: Labels, silent: Tensor) -> str:
    """Return the name of a mask or of weights in the batch that are zero at all silent places; empty without one."""
    for name in inputs:
        value = inputs[name]
        if name in _OF_THE_MODEL or not isinstance(value, Tensor) or value.shape != labels.values.shape:
            continue
        if any(bool((_moved(value == 0, shift)[silent]).all()) for shift in (0, 1)):
            return str(name)
    return ""


def _padding(inputs: Any, labels: Labels) -> Tensor:
    """Return which places predict a token that the attention mask hides."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.values.shape or labels.shift == 0:
        return torch.zeros_like(labels.values, dtype=torch.bool)
    return _moved(mask == 0, 1)


def _other(support: Tensor, labels: Labels) -> int | None:
    """Return another shift with which the gradient is exactly where the labels are; None if there is none."""
    if bool((support == labels.places()).all()):
        return None
    fitting = (s for s in (0, 1, 2, -1) if s != labels.shift and bool((support == labels.places(s)).all()))
    return next(fitting, None)


def _moved(values: Tensor, shift: int, fill: int = 0) -> Tensor:
    """Move each row `shift` places to the left, and fill up."""
    if not shift:
        return values
    made = torch.full_like(values, fill)
    if shift > 0:
        made[:, :-shift] = values[:, shift:]
    else:
        made[:, -shift:] = values[:, :shift]
    return made


def _rows(silent: Tensor, inside: Tensor) -> int:
    return int((inside.any(-1) & (silent == inside).all(-1)).sum())


def _share(sizes: Tensor, within: float) -> float:
    largest = float(sizes.max())
    return largest / within if within else float(largest > 0) * 1e9


def _where(places: Tensor) -> str:
    found = places.nonzero()
    return f"row {int(found[0, 0])}, place {int(found[0, 1])}" if len(found) else ""
