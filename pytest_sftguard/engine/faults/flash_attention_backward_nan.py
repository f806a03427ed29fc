"""A fused attention kernel is right forward, and gives NaN gradients of the queries."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import Fault, wrapped

if TYPE_CHECKING:
    from transformers import Trainer


_KERNEL = "varlen_kernel"


class FlashAttentionBackwardNan(Fault):
    """The model attends by a kernel of its own, which is sdpa forward, and NaN for the queries backward."""

    id = "flash-attention-backward-nan"
    source = "https://github.com/Dao-AILab/flash-attention/issues/1052"
    injects = "an attention kernel whose backward pass gives NaN for the queries"
    reported_by: ClassVar = ("path_equivalence", "gradients_finite")
    mechanism = "attention_kernel_backward_not_finite"
    step = 1
    tensor = "q_proj"
    silent = False

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Register the kernel while the fault lasts."""
        ALL_ATTENTION_FUNCTIONS.register(_KERNEL, _kernel)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_KERNEL, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        try:
            yield wrapped(target, self.trainer)
        finally:
            for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                type(table)._global_mapping.pop(_KERNEL, None)

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """Have the model use it."""
        trainer: Any = build(**arguments)
        model = trainer.model
        (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation(_KERNEL)
        return trainer


def _kernel(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
    if query.requires_grad:
        query = query.clone()
        query.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)
