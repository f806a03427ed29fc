"""Tokens that come later, and other rows: the last hidden state of a token must not change with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.data.rows import IGNORED
from pytest_sftguard.engine.looks import InapplicableError
from pytest_sftguard.engine.micro_batch.footprint import Labels
from pytest_sftguard.engine.micro_batch.repeated import Repeated, copied
from pytest_sftguard.records import FutureRecord


def future(repeated: Repeated) -> FutureRecord:
    """Change one token in every second row, and look at the tokens before it and at the other rows.

    Raises InapplicableError where the model does not predict tokens from those before them.
    """
    inputs = repeated.inputs
    changed, shift = _changeable(repeated)
    if any(not p.is_floating_point() or p.element_size() == 1 for p in repeated.plain.parameters()):
        raise InapplicableError("weights of less than 16 bits may scale a token by others")
    before = repeated.state()
    ids: Tensor = inputs[changed]
    if before is None or before.shape[:2] != ids.shape or repeated.hidden.passes != 1:
        raise InapplicableError("the last hidden state does not have one place for each token")
    again = repeated.state()
    if again is None or not bool(torch.equal(before, again)):
        raise InapplicableError("the last hidden state is another one when it is computed again")
    couples = forwards.has_experts(repeated.plain) and _limited(repeated.plain)
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in repeated.plain.modules())
    supervised = inputs["labels"] != IGNORED
    supervised = supervised if supervised.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    rows, last = len(ids), ids.shape[1] - shift
    # the first token has none before it, and a decoder is not given the last label
    asked_of = supervised.clone()
    asked_of[:, : 1 - shift] = False
    asked_of[:, last:] = False
    earlier, where, beside, beside_at, tokens, reached = 0.0, "", 0.0, "", 0, 0.0
    asked = [(first, which) for which in (0, -1) for first in range(min(2, rows))]
    for first, which in asked:
        own = range(first, rows, 2)
        at = {r: int(fit[which]) for r in own if len(fit := asked_of[r].nonzero())}
        if not at:
            continue
        twin = copied(inputs)
        for row, place in at.items():
            twin[changed][row, place] = _another(ids, supervised, row, place)
        after = repeated.state(twin)
        if after is None or after.shape != before.shape:
            raise InapplicableError("the model has other places after a token was changed")
        far = (after - before).abs().float().amax(-1) / before.float().std(-1).clamp_min(1e-12)
        for row, place in at.items():
            # a decoder is given each label one place later
            found = far[row, : place + shift]
            tokens += len(found)
            reached = max(reached, float(far[row, place:].max()))
            if not float(found.max()) <= earlier:
                earlier, where = float(found.max()), f"row {row}, token {int(found.argmax())}"
        others = [r for r in range(rows) if r not in at]
        if others and not couples and not normalised and not float(far[others].max()) <= beside:
            beside = float(far[others].max())
            beside_at = f"row {others[int(far[others].amax(-1).argmax())]}"
    if not tokens:
        raise InapplicableError("no row has a token before a supervised one")
    if not reached > 0:
        raise InapplicableError("a changed token changes nothing: the model does not read it")
    if couples:
        raise InapplicableError("experts of limited capacity drop tokens depending on the rest of the batch, by design")
    return FutureRecord(
        tokens=tokens, rows=rows, change=earlier, where=where, other_rows=beside, other_row=beside_at, reached=reached
    )


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
    raise InapplicableError("the labels are not the tokens that the model is given: it need not predict the next one")


def _limited(model: Any) -> bool:
    config = getattr(forwards.inner(model), "config", None)
    return any("capacity" in name for name in vars(config)) if config is not None else False


def _another(ids: Tensor, supervised: Tensor, row: int, place: int) -> int:
    """Return another supervised token of the batch, else a neighbour in the vocabulary."""
    present = int(ids[row, place])
    others = [i for i in ids[supervised].unique().tolist() if i not in (present, IGNORED)]
    return int(others[(row + place) % len(others)]) if others else (present - 1 if present > 0 else present + 1)
