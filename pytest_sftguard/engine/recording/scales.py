"""The loss scale of a GradScaler, read without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState


def current(scaler: Any) -> Tensor | None:
    """The scale, a tensor of one element; None without a scaler, or with a disabled one."""
    if scaler is None or not scaler.is_enabled():
        return None
    # `get_scale` would wait for the device, twice a step
    scale = getattr(scaler, "_scale", None)
    return scale if isinstance(scale, Tensor) else torch.tensor(float(scaler.get_scale()))


def still_on(scaler: Any, optimizer: torch.optim.Optimizer | None) -> bool:
    """Whether the gradients of `optimizer` are still multiplied by the scale; `unscale_` divides it out early."""
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer), {})
    return current(scaler) is not None and state.get("stage", OptState.READY) is OptState.READY
