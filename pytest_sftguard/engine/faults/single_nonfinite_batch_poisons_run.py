"""One infinite loss ends the run without stopping it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_sftguard.engine.faults import Fault
from pytest_sftguard.engine.faults._training import multiply_loss

if TYPE_CHECKING:
    from transformers import Trainer


class SingleNonfiniteBatchPoisonsRun(Fault):
    """NaN enters the weights and the moments at one batch, and stays."""

    id = "single-nonfinite-batch-poisons-run"
    source = "https://github.com/facebookresearch/habitat-lab/pull/2229"
    injects = "the loss of step 3 times inf"
    silent = False
    reported_by: ClassVar = ("raw_loss_finite", "gradients_finite", "weights_and_moments_finite")
    mechanism = "nonfinite_batch"
    step = 3

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Spoil a loss."""
        return multiply_loss(build(**arguments), math.inf, 3)
