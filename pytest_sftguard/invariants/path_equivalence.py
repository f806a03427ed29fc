"""A10: the way that the training computes loss and gradients leads where the plain way does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pytest_sftguard.records import PathRecord, PathsRecord, RunRecord
from pytest_sftguard.verdicts import Finding, Invariant


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
        seen = record.paths
        if seen is None:
            yield self.not_looked(record, "paths")
            return
        if not (len(seen.paths) == seen.asked >= 1 and seen.tensors >= 1):
            yield self.not_evaluated(
                f"{len(seen.paths)} of {seen.asked} plain paths are there, and {seen.tensors} gradients"
            )
        limit = {
            "float32": self.float32_limit,
            "tf32": self.tf32_limit,
            "float16": self.float16_limit,
            "bfloat16": self.bfloat16_limit,
        }.get(seen.arithmetic, 0.0)
        if seen.routed and seen.arithmetic != "float32":
            limit *= self.routed_factor
        if seen.nonfinite and not seen.paths:
            yield self._nonfinite(seen, "")
        for path in seen.paths:
            yield from self._gradients(seen, path)
            yield from self._distance(seen, path, limit)

    def _gradients(self, seen: PathsRecord, path: PathRecord) -> Iterator[Finding]:
        if seen.nonfinite and not path.nonfinite:
            yield self._nonfinite(seen, f", and are with {path.name}")
        elif path.nonfinite:
            yield self.failed(
                f"gradients with {path.name} are not finite: {path.nonfinite}", observed=path.nonfinite.count, limit=0
            )
        if path.one_sided:
            yield self.failed(
                f"tensors have a gradient on one way alone, of the training's and {path.name}: {path.one_sided}",
                observed=path.one_sided.count, limit=0,
            )  # fmt: skip

    def _nonfinite(self, seen: PathsRecord, than: str) -> Finding:
        how = f" under {', '.join(seen.switched)}" if seen.switched else ""
        return self.failed(
            f"gradients of the training's first micro-batch are not finite{how}{than}: {seen.nonfinite}",
            observed=seen.nonfinite.count, limit=0,
        )  # fmt: skip

    def _distance(self, seen: PathsRecord, path: PathRecord, limit: float) -> Iterator[Finding]:
        if not path.max_change <= limit:
            yield self.failed(
                f"the gradient of {path.tensor} is not the one with {path.name}"
                f" (the training uses {', '.join(seen.switched) or 'a loss of its own'})",
                observed=path.max_change, limit=limit,
            )  # fmt: skip
        allowed = self.loss_share * limit * max(abs(path.loss), 1e-3)
        if not (math.isfinite(path.loss) and abs(seen.loss - path.loss) <= allowed):
            yield self.failed(
                f"the loss is {seen.loss:.6g}, and {path.loss:.6g} with {path.name}",
                observed=abs(seen.loss - path.loss), limit=allowed,
            )  # fmt: skip
