"""Tokens that come later, and other rows: the last hidden state of a token must not change with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.data.rows import IGNORED
from pytest_sftguard.engine.micro_batch.footprint import Labels
from pytest_sftguard.engine.micro_batch.repeated import Repeated, UnaskedError, copied
from pytest_sftguard.records import FutureRecord


def future(repeated: Repeated) -> FutureRecord:
    """Change one token in every second row, and look at the tokens before it and at the other rows.

    Raises UnaskedError where the model does not predict tokens from those before them.
    """
    changed, shift = _changeable(repeated)
    ids: Tensor = repeated.inputs[changed]
    before = _repeatable_state(repeated, ids)
    supervised = repeated.inputs["labels"] != IGNORED
    supervised = supervised if supervised.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    asked = supervised.clone()
    # the first token has none before it, and a decoder is not given the last label
    asked[:, : 1 - shift] = False
    asked[:, ids.shape[1] - shift :] = False
    seen, shown = _Seen(), _shown(repeated.inputs, changed, ids)
    for which in (0, -1):
        for first in range(min(2, len(ids))):
            at = {r: int(fit[which]) for r in range(first, len(ids), 2) if len(fit := asked[r].nonzero())}
            if not at:
                continue
            twin = copied(repeated.inputs)
            for row, place in at.items():
                twin[changed][row, place] = _another(ids, supervised, row, place)
            after = repeated.state(twin)
            if after is None or after.shape != before.shape:
                raise UnaskedError("the model has other places after a token was changed")
            far = (after - before).abs().float().amax(-1) / before.float().std(-1).clamp_min(1e-12)
            seen.note(far.masked_fill(~shown, 0), at, shift)
    if not seen.tokens:
        raise UnaskedError("no row has a token before a supervised one")
    if not seen.reached > 0:
        raise UnaskedError("a changed token changes nothing: the model does not read it")
    return FutureRecord(
        tokens=seen.tokens,
        rows=len(ids),
        change=seen.change,
        where=seen.where,
        other_rows=None if _couples_rows(repeated.plain) else seen.other_rows,
        other_row=seen.other_row,
        reached=seen.reached,
    )


@dataclass
class _Seen:
    """The largest changes so far."""

    tokens: int = 0
    change: float = 0.0
    where: str = ""
    other_rows: float = 0.0
    other_row: str = ""
    reached: float = 0.0

    def note(self, far: Tensor, at: dict[int, int], shift: int) -> None:
        """Note the changes `far` of all tokens, of shape (rows, places), after the tokens `at` were changed."""
        for row, place in at.items():
            # a decoder is given each label one place later
            earlier = far[row, : place + shift]
            self.tokens += len(earlier)
            self.reached = max(self.reached, float(far[row, place:].max()))
            if not float(earlier.max()) <= self.change:
                self.change, self.where = float(earlier.max()), f"row {row}, token {int(earlier.argmax())}"
        others = [r for r in range(len(far)) if r not in at]
        if others and not float(far[others].max()) <= self.other_rows:
            self.other_rows = float(far[others].max())
            self.other_row = f"row {others[int(far[others].amax(-1).argmax())]}"


def _repeatable_state(repeated: Repeated, ids: Tensor) -> Tensor:
    """Return the last hidden state of the micro-batch. Raises UnaskedError where there is no such thing."""
    if any(not p.is_floating_point() or p.element_size() == 1 for p in repeated.plain.parameters()):
        raise UnaskedError("weights of less than 16 bits may scale a token by others")
    config = getattr(forwards.inner(repeated.plain), "config", None)
    if config is not None and any("capacity" in name for name in vars(config)):
        raise UnaskedError("experts of limited capacity drop tokens depending on the rest of the batch, by design")
    before = repeated.state()
    if before is None or before.shape[:2] != ids.shape or repeated.hidden.passes != 1:
        raise UnaskedError("the last hidden state does not have one place for each token")
    again = repeated.state()
    if again is None or not bool(torch.equal(before, again)):
        raise UnaskedError("the last hidden state is another one when it is computed again")
    return before


def _shown(inputs: Mapping[str, Any], changed: str, ids: Tensor) -> Tensor:
    """Which places hold tokens: what a mask hides, such as padding in front, may see anything."""
    mask = inputs.get("attention_mask" if changed == "input_ids" else "decoder_attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        return mask.bool()
    return torch.ones_like(ids, dtype=torch.bool)


def _couples_rows(model: nn.Module) -> bool:
    """Whether rows of a batch rightly depend on each other: batch normalisation is over all of them."""
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _changeable(repeated: Repeated) -> tuple[str, int]:
    """Return the name of the tokens to change, and how many places later the model is given them."""
    inputs = repeated.inputs
    labels = Labels.of(inputs)
    config = getattr(forwards.inner(repeated.plain), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        given = inputs.get("decoder_input_ids")
        if isinstance(given, Tensor) and given.ndim == 2:
            return "decoder_input_ids", 0
        return "labels", 1
    if labels.shift:
        return "input_ids", 0
    raise UnaskedError("the labels are not the tokens that the model is given: it need not predict the next one")


def _another(ids: Tensor, supervised: Tensor, row: int, place: int) -> int:
    """Return another supervised token of the batch, else a neighbour in the vocabulary."""
    present = int(ids[row, place])
    others = [i for i in sorted(set(ids[supervised].tolist())) if i not in (present, IGNORED)]
    return int(others[(row + place) % len(others)]) if others else (present - 1 if present > 0 else present + 1)
