"""Recording one training at the source, step by step.

A `Recorder` is told three things, by whoever owns the loop: the raw loss of each micro-batch, that all gradients of a
step are there, and that the optimizer has stepped. It looks at tensors, never at a log. A step costs a handful of fused
reductions over the trainable tensors and one transfer to the host.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapters import base_digests, base_tensors, lora_layers, partial_factors, trainables
from pytest_sftguard.engine.rows import joined
from pytest_sftguard.engine.tensors import combined, digests, dtype_name, norms, to_host
from pytest_sftguard.records import BaseRecord, Names, OptimizerRecord, StepRecord, TensorRecord


class Recorder:
    """Sees one training; `model` is the unwrapped one, before its first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[StepRecord] = []
        self.parameters = trainables(model)
        self._start = [p.detach().clone() for p in self.parameters.values()]
        self._previous = [p.clone() for p in self._start]
        self._largest_move = [torch.zeros_like(p) for p in self._start]
        self._base_before = base_digests(model)
        self._layer_of = _holders(self.parameters, lora_layers(model))
        self.used_layers: set[str] = set()
        self.ever_used: set[str] = set()
        self.rewritten: set[str] = set()
        self._open()

    def _open(self) -> None:
        self._micro_losses: list[Tensor] = []
        self._returned: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._rows: list[Tensor | None] = []
        self._gradients: dict[str, Any] | None = None
        self._started: float | None = None
        self._stale: tuple[list[str], Tensor] = ([], torch.empty(0))
        self.used_layers = set()

    def begin_micro_batch(self) -> None:
        """A micro-batch is about to be computed: the step's clock starts with its first."""
        if self._started is None:
            self._started = time.perf_counter()
            left = [(n, p.grad) for n, p in self.parameters.items() if p.grad is not None]
            self._stale = ([n for n, _ in left], norms([_dense(g) for _, g in left], math.inf))
            if torch.cuda.is_available() and self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    def micro_batch(self, loss: Tensor, labels: Tensor | None = None, rows: Tensor | None = None) -> None:
        """The raw loss of a micro-batch (any shape; its mean counts), its labels, shape (rows, tokens), and a
        fingerprint of its rows."""
        self._rows.append(rows)
        self._micro_losses.append(loss.detach().float().mean())
        if labels is not None:
            self._tokens.append((labels[..., 1:] != -100).sum())

    def micro_batch_done(self, returned: Tensor) -> None:
        """What the training loop adds up for the step's loss."""
        self._returned.append(returned.detach().float().mean())

    def before_step(self, loss_scale: Tensor | None = None) -> None:
        """All gradients of the step are there: unclipped, and multiplied by `loss_scale` where there is a scaler.

        The scale is a tensor of one element, on the device, so that nothing waits for it here.
        """
        gradients = [(n, p.grad) for n, p in self.parameters.items() if p.grad is not None]
        tensors = [_dense(g) for _, g in gradients]
        now = [p.detach() for p in self.parameters.values()]
        moved = list(torch._foreach_sub(now, self._previous)) if now and self.steps else []
        scale = 1.0 if loss_scale is None else loss_scale
        self._gradients = {
            "names": [n for n, _ in gradients],
            "missing": Names.of(n for n, p in self.parameters.items() if p.grad is None),
            "l2": norms(tensors, 2) / scale,
            "largest": norms(tensors, math.inf) / scale,
            "scale": _one(loss_scale),
            "moved": norms(moved, math.inf),
        }

    def after_step(
        self, optimizer: torch.optim.Optimizer, learning_rate: float | None, loss_scale: Tensor | None = None
    ) -> None:
        """The optimizer has stepped, or was kept from it by the scaler, whose scale is now `loss_scale`."""
        now = [p.detach() for p in self.parameters.values()]
        difference = list(torch._foreach_sub(now, self._previous)) if now else []
        states = self._states(optimizer)
        gradients = self._gradients or {
            "names": [],
            **dict.fromkeys(("l2", "largest", "moved", "scale"), torch.empty(0)),
        }
        scale, scale_after, loss, micro, tokens, rows, l2, largest, moved, stale, update, weights, moments = to_host(
            [
                gradients["scale"], _one(loss_scale),
                _stacked(self._returned), _stacked(self._micro_losses), _stacked(self._tokens), _whole(self._rows),
                gradients["l2"], gradients["largest"], gradients["moved"], self._stale[1],
                norms(difference, math.inf), norms(now, math.inf), norms([t for _, t in states], math.inf),
            ]
        )  # fmt: skip
        if now:
            torch._foreach_copy_(self._previous, now)
            torch._foreach_abs_(difference)
            torch._foreach_maximum_(self._largest_move, difference)
        self.ever_used |= self.used_layers
        names = list(self.parameters)
        finite = [math.isfinite(w) for w in weights]
        seen = self._gradients is not None
        self.steps.append(
            StepRecord(
                step=len(self.steps) + 1,
                micro_losses=tuple(micro),
                loss=math.fsum(loss) if all(map(math.isfinite, loss)) and loss else (math.nan if loss else None),
                grad_norm=_hypot(l2) if seen else None,
                max_abs_gradient=_largest(largest) if seen else None,
                nonfinite_gradients=_named(gradients["names"], (not math.isfinite(v) for v in largest)),
                missing_gradients=gradients.get("missing", Names()),
                zero_gradients=_named(gradients["names"], (v == 0 for v in largest)),
                learning_rate=learning_rate,
                loss_scale=scale[0] if scale else None,
                loss_scale_after=scale_after[0] if scale_after else None,
                changed=sum(f and u > 0 for f, u in zip(finite, update, strict=True)),
                unchanged=_named(names, (u == 0 for u in update)),
                stale_gradients=_named(self._stale[0], (v != 0 for v in stale)),
                max_change_before=_largest(moved) if moved else None,
                idle=Names.of(n for n, layer in self._layer_of.items() if layer not in self.used_layers),
                nonfinite_weights=_named(names, (not f for f in finite)),
                nonfinite_moments=_named([n for n, _ in states], (not math.isfinite(v) for v in moments)),
                max_update=_largest(update),
                supervised_tokens=int(sum(tokens)) if tokens else None,
                rows=joined(rows) if rows else None,
                seconds=time.perf_counter() - self._started if self._started is not None else None,
                peak_memory_bytes=self._peak_memory(),
            )
        )
        self._open()

    def begin_from_here(self) -> None:
        """The weights that the training begins with have been loaded since: steps are measured from them."""
        if self._previous and not self.steps:
            torch._foreach_copy_(self._previous, [p.detach() for p in self.parameters.values()])

    def adapter(self) -> tuple[TensorRecord, ...]:
        """Every trainable tensor, now compared with its start."""
        records = []
        partial = partial_factors(self.model)
        for (name, parameter), start, move in zip(
            self.parameters.items(), self._start, self._largest_move, strict=True
        ):
            end, begin = parameter.detach().float(), start.float()
            changed = ((move > 0) & end.isfinite()).float().mean().item() if end.numel() else 0.0
            records.append(
                TensorRecord(
                    name=name, dtype=dtype_name(parameter.dtype), elements=parameter.numel(),
                    initial_norm=begin.norm().item(), final_norm=end.norm().item(),
                    delta_norm=(end - begin).norm().item(), changed_fraction=changed, partial=name in partial,
                )
            )  # fmt: skip
        return tuple(records)

    def adapter_digest(self) -> str:
        """One digest of the bits of every trainable tensor as it is now; empty where there is none."""
        return combined(digests(self.parameters.items())) if self.parameters else ""

    @property
    def initial(self) -> dict[str, Tensor]:
        """The trainable tensors as they were before the first step."""
        return dict(zip(self.parameters, self._start, strict=True))

    def base(self) -> BaseRecord:
        """The base's tensors, now compared with how they were."""
        after = base_digests(self.model)
        after.update({n: d for n, d in self._base_before.items() if n in self.rewritten})
        changed = [n for n in self._base_before.keys() | after.keys() if self._base_before.get(n) != after.get(n)]
        return BaseRecord(
            tensors=len(after),
            digest_before=combined(self._base_before),
            digest_after=combined(after),
            changed=Names.of(sorted(changed)),
            rewritten=Names.of(sorted(self.rewritten)),
            trainable=Names.of(n for n in base_tensors(self.model) if n in self.parameters),
        )

    def optimizer(self, optimizer: torch.optim.Optimizer) -> OptimizerRecord:
        """What the optimizer is, and in which types it keeps its states."""
        group: dict[str, Any] = optimizer.param_groups[0] if optimizer.param_groups else {}
        owned = {id(p) for g in optimizer.param_groups for p in g["params"]}
        states = [t for _, t in self._states(optimizer) if t.numel() > 1]
        return OptimizerRecord(
            name=type(optimizer).__name__,
            fused=bool(group.get("fused")),
            eps=_number(group.get("eps")),
            weight_decay=_number(group.get("weight_decay")),
            state_dtypes=tuple(sorted({dtype_name(t.dtype) for t in states})),
            owns_trainables=owned == {id(p) for p in self.parameters.values()},
        )

    @property
    def unused(self) -> set[str]:
        """Trainable tensors of layers that no token of the training reached."""
        return {n for n, layer in self._layer_of.items() if layer not in self.ever_used}

    @property
    def gradients_seen(self) -> bool:
        """Whether the gradients of the step that is under way have been looked at."""
        return self._gradients is not None

    @property
    def _device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def _peak_memory(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device)

    def _states(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        return [
            (f"{name}:{key}", value)
            for name, parameter in self.parameters.items()
            for key, value in optimizer.state.get(parameter, {}).items()
            # Adam's `step` stays on the host beside parameters on a GPU, and is a count
            if isinstance(value, Tensor) and value.is_floating_point() and value.device == parameter.device
        ]


def _one(scalar: Tensor | None) -> Tensor:
    """A copy of a scalar that may be changed in place, shape (1,); shape (0,) for None."""
    return torch.empty(0) if scalar is None else scalar.detach().clone().reshape(1)


def _holders(parameters: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """The innermost of `layers` that holds each parameter; those that none holds are left out."""
    innermost = sorted(layers, key=len)
    return {n: layer for n in parameters for layer in innermost if n.startswith(f"{layer}.")}


def _dense(gradient: Tensor) -> Tensor:
    return gradient.coalesce().values() if gradient.is_sparse else gradient.detach()


def _stacked(scalars: list[Tensor]) -> Tensor:
    return torch.stack([s.float() for s in scalars]) if scalars else torch.empty(0)


def _whole(numbers: list[Tensor | None]) -> Tensor:
    """Whole numbers as doubles, shape (0,) where one is missing."""
    there = [n.double() for n in numbers if n is not None]
    return torch.stack(there) if there and len(there) == len(numbers) else torch.empty(0)


def _named(names: list[str], flags: Any) -> Names:
    return Names.of(n for n, flag in zip(names, flags, strict=True) if flag)


def _largest(values: list[float]) -> float:
    """The largest value, NaN if there is one: `max` would drop it or keep it by its place."""
    if any(math.isnan(v) for v in values):
        return math.nan
    return max(values, default=0.0)


def _hypot(values: list[float]) -> float:
    return math.nan if any(math.isnan(v) for v in values) else math.hypot(*values)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
