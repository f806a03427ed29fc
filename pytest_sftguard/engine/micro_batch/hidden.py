"""The last hidden state and the logits of a forward pass, and the gradients that they receive.

A fused or chunked loss has no logits, and never calls the output embedding, but every loss reads the last hidden state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.after import forwards


class LastHidden:
    """Hooks on the body of a model, on its output embedding, and on the model itself."""

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = forwards.inner(model)
        body = getattr(inner, "base_model", None)
        self._body: nn.Module | None = body if isinstance(body, nn.Module) and body is not inner else None
        self.head: nn.Module | None = _head(inner)
        self.shape: torch.Size | None = None
        """Shape of the labels, set before the step: logits of another shape are not looked at."""
        self._clear()

    def _clear(self) -> None:
        self.passes = 0
        """Number of forward passes of the body."""
        self._body_ran = False
        self.state: Tensor | None = None
        """What the output embedding, or the loss, is given: of shape (rows, places, features)."""
        self.gradient: Tensor | None = None
        """Gradient of the loss with respect to `state`."""
        self.logits: Tensor | None = None
        """Logits of shape (rows, places, vocabulary), without history; None where the model returns none."""
        self.logits_gradient: Tensor | None = None
        """Gradient of the loss with respect to `logits`."""

    @contextlib.contextmanager
    def watched(self, *, gradient: bool) -> Iterator[None]:
        """Note the state of the next forward pass, with gradients if asked for."""
        self._clear()
        hooks = []
        if self._body is not None:
            hooks.append(self._body.register_forward_hook(lambda m, args, out: self._leaves(out, gradient)))
        if self.head is not None:
            hooks.append(self.head.register_forward_pre_hook(lambda m, args: self._enters(args, gradient)))
        if gradient:
            hooks.append(self.model.register_forward_hook(lambda m, args, out: self._scored(out)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leaves(self, out: Any, gradient: bool) -> Any:
        state = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", None)
        if not isinstance(state, Tensor) or state.ndim != 3:
            return None
        self._body_ran = True
        kept = self._note(state, gradient)
        if kept is state:
            return None
        if isinstance(out, tuple):
            return (kept, *out[1:])
        out.last_hidden_state = kept
        return out

    def _enters(self, args: Any, gradient: bool) -> Any:
        # OPT's head calls the decoder past its body; an embedding that a loss reads in chunks is called often
        if self._body_ran or not args or not isinstance(args[0], Tensor) or args[0].ndim != 3:
            return None
        kept = self._note(args[0], gradient)
        return None if kept is args[0] else (kept, *args[1:])

    def _note(self, state: Tensor, gradient: bool) -> Tensor:
        """Keep `state`, and return it or a copy that has a gradient, which a frozen body's state has not."""
        if gradient and not torch.is_grad_enabled():
            return state
        self.passes += 1
        if gradient:
            if not state.requires_grad:
                state = state.detach().requires_grad_()
            # torch does not type this method
            state.register_hook(lambda g: setattr(self, "gradient", g.detach()))  # type: ignore[no-untyped-call]
        self.state = state.detach()
        return state

    def _scored(self, out: Any) -> None:
        logits = out.get("logits") if hasattr(out, "get") else None
        if isinstance(logits, Tensor) and logits.requires_grad and logits.shape[:-1] == self.shape:
            self.logits = logits.detach()
            # torch does not type this method
            logits.register_hook(lambda g: setattr(self, "logits_gradient", g.detach()))  # type: ignore[no-untyped-call]


def _head(inner: Any) -> nn.Module | None:
    head = forwards.embeddings(inner, "output")
    return head if isinstance(head, nn.Module) else None
