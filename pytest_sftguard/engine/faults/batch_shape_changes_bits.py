"""Control: in low precision the bits of a loss depend on the shape of the batch, and that is healthy."""

from __future__ import annotations

from typing import ClassVar

from pytest_sftguard.engine.faults import Fault


class BatchShapeChangesBits(Fault):
    """Nothing is wrong: another cut sums in another order."""

    id = "batch-shape-changes-bits"
    source = "https://thinkingmachines.ai/blog/defeating-nondeterminism-in-llm-inference/"
    injects = "nothing: a healthy bfloat16 run beside another cut of its batch, float32 and itself"
    precision = "bf16-mixed"
    batch = (4, 2)
    looks: ClassVar = ("rerun",)
