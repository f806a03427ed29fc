"""A10: the training's path to loss and gradients leads where the plain path does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard import verdicts
from pytest_sftguard.records import PathRecord, PathsRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


class Reason(verdicts.Reason):
    """Where the training's path leads elsewhere than the plain one, or was not compared with it."""

    NOT_ALL_COMPARED = "{made} of {asked:# plain path} and {tensors:# gradient} took part in the comparison"
    NONFINITE = (
        "gradients of the training's first micro-batch are not finite[[ under {switched}]][[, but finite with {path}]]:"
        " {names}"
    )
    NONFINITE_PLAIN = "gradients with {path} are not finite: {names}"
    ONE_SIDED = "{observed:# tensor} had a gradient in the training or with {path}, and not in both: {names}"
    OTHER_GRADIENT = "the gradient of {tensor} is not the one with {path} (the training uses {switched})"
    OTHER_LOSS = "the loss is {loss:.6g}, and {plain_loss:.6g} with {path}"


@dataclass(frozen=True, kw_only=True)
class PathEquivalence(Invariant):
    """Loss and gradients are the same without checkpointing, compile and fused attention, and of a loss written out.

    Of each tensor the distance of its two gradients counts, relative to the plain one's norm. Dropout is off.
    """

    float32_limit: float = 1e-3
    """In float32. Measured 1e-7 to 2e-6 for tiny models, 6e-6 for six layers; a loss with a wrong
    gradient made 3.8 and 9.5."""

    tf32_limit: float = 8e-2
    """In tf32, which rounds as float16 does."""

    float16_limit: float = 8e-2
    """In float16. Measured 1e-4 to 3e-2."""

    bfloat16_limit: float = 0.4
    """In bfloat16. Measured 1e-3 to 9e-2 for two to six layers, and it grows with their number; a gradient of zero or
    of twice its size is 1.0 off."""

    routed_factor: float = 2.0
    """How many times as far a model with experts may be off in less than float32, for a rounding sends tokens to other
    experts. Measured 0.2 in bfloat16."""

    loss_share: float = 0.1
    """Share of the limit that the loss may be off, relative to itself: it is a mean, where a gradient is a
    difference. Measured 2e-7 in float32, 2e-3 in bfloat16."""

    code: ClassVar[str] = "A10"

    def check(self, record: RunRecord, reference: RunRecord | None = None) -> Iterator[Finding]:
        """Look at each plain path."""
        if (seen := record.paths) is None:
            yield self.not_looked(record, "paths")
            return
        if not (len(seen.paths) == seen.asked >= 1 and seen.tensors >= 1):
            made, asked = len(seen.paths), seen.asked
            yield self.not_evaluated(Reason.NOT_ALL_COMPARED, made=made, asked=asked, tensors=seen.tensors)
        # no limit for a type means that nothing passes in it
        limit: float = getattr(self, f"{seen.arithmetic}_limit", 0.0)
        if seen.routed and seen.arithmetic != "float32":
            limit *= self.routed_factor
        if not seen.paths:
            yield from self.forbid(Reason.NONFINITE, seen.nonfinite, switched=seen.switched)
        for path in seen.paths:
            yield from self._gradients(seen, path)
            yield from self._distance(seen, path, limit)

    def _gradients(self, seen: PathsRecord, path: PathRecord) -> Iterator[Finding]:
        if path.nonfinite:
            yield from self.forbid(Reason.NONFINITE_PLAIN, path.nonfinite, path=path.name)
        else:
            yield from self.forbid(Reason.NONFINITE, seen.nonfinite, switched=seen.switched, path=path.name)
        yield from self.forbid(Reason.ONE_SIDED, path.one_sided, path=path.name)

    def _distance(self, seen: PathsRecord, path: PathRecord, limit: float) -> Iterator[Finding]:
        off, switched = path.max_change, seen.switched or "a loss of its own"
        if not off <= limit:
            yield self.failed(
                Reason.OTHER_GRADIENT, observed=off, limit=limit, tensor=path.tensor, path=path.name, switched=switched
            )
        off, allowed = abs(seen.loss - path.loss), self.loss_share * limit * max(abs(path.loss), 1e-3)
        if not (math.isfinite(path.loss) and off <= allowed):
            yield self.failed(
                Reason.OTHER_LOSS, observed=off, limit=allowed, loss=seen.loss, plain_loss=path.loss, path=path.name
            )
