"""Recording one training at the source, step by step.

A `Recorder` is told three things, by whoever owns the loop: the raw loss of each micro-batch, that all gradients of a
step are there, and that the optimizer has stepped. It looks at tensors, never at a log. A step costs a handful of fused
reductions over the trainable tensors and one transfer to the host.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import base_digests, base_tensors, lora_layers, partial_factors, trainables
from pytest_sftguard.engine.recording import updates
from pytest_sftguard.engine.recording.collated import Collated
from pytest_sftguard.engine.recording.gathering import Gathered, Numbers, finite
from pytest_sftguard.engine.recording.moments import Moments
from pytest_sftguard.engine.tensors.layouts import Layout, joined, l2, largest, ordered
from pytest_sftguard.engine.tensors.reductions import combined, digests, dtype_name, norms, to_host
from pytest_sftguard.records import NONE, BaseRecord, Names, OptimizerRecord, StepRecord, TensorRecord


class Recorder:
    """Sees one training; `model` is the unwrapped one, before its first step."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self._collated = Collated(padding if isinstance(padding, int) else None)
        self.parameters = trainables(model)
        self._tensors = now = list(self.parameters.values())
        self._kinds = _kinds(now)
        self._initial_dtypes = self._kinds[0]
        self._all_moved = False
        self._layout = Layout(now)
        self._start, self._previous, self._largest_move = (self._layout.copies(now) for _ in range(3))
        for moves in self._largest_move:
            moves.zero_()
        self._names = list(self.parameters)
        self._moments = Moments(self.parameters)
        [start] = to_host([joined([largest(rows.clone()) for rows in self._start])])
        self._gathered = Gathered(self._names, ordered(self._layout.order, start))
        self._groups = updates.Groups(now)
        self._base_before = base_digests(model)
        self._layer_of = _holders(self.parameters, lora_layers(model))
        self._layers = set(self._layer_of.values())
        self.used_layers: set[str] = set()
        self.ever_used: set[str] = set()
        self.rewritten: set[str] = set()
        self._open()

    def _open(self) -> None:
        self._micro_losses: list[Tensor] = []
        self._returned: list[Tensor] = []
        self._gradients: dict[str, Any] | None = None
        self._received: Tensor | None = None
        self._started: float | None = None
        self._stale: tuple[list[str], Tensor] = ([], _NOTHING)
        self.used_layers = set()

    def begin_micro_batch(self) -> bool:
        """A micro-batch is about to be computed: the step's clock starts with its first. Says whether this is it."""
        first = self._started is None
        if first:
            self.start_clock()
            self.look_for_stale_gradients()
        return first

    def start_clock(self) -> None:
        """The step begins now, unless it has begun before."""
        if self._started is None:
            self._started = time.perf_counter()
            if torch.cuda.is_available() and self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    @torch.no_grad()
    def look_for_stale_gradients(self) -> None:
        """No gradient of the step is there yet: whatever there is, is of another one."""
        left = [(n, p.grad) for n, p in self.parameters.items() if p.grad is not None]
        self._stale = ([n for n, _ in left], norms([g.to_dense() if g.is_sparse else g for _, g in left], math.inf))

    def collated(self, inputs: Mapping[str, Any]) -> None:
        """What a micro-batch of the step that is under way is made of."""
        self._collated.add(self.taken + 1, inputs)

    def micro_batch(self, loss: Tensor) -> None:
        """The raw loss of a micro-batch (any shape; its mean counts)."""
        self._micro_losses.append(_mean(loss))

    def micro_batch_done(self, returned: Tensor) -> None:
        """What the training loop adds up for the step's loss."""
        self._returned.append(_mean(returned))

    @torch.no_grad()
    def before_step(self, loss_scale: Tensor | None = None, *, scaled: bool = True) -> None:
        """All gradients of the step are there: unclipped, and multiplied by `loss_scale` where there is a scaler.

        The scale is a tensor of one element, on the device, so that nothing waits for it here. Where they are not
        `scaled`, it has been divided out already.
        """
        self._follow()
        places, layout, dense, where = self._dense_gradients()
        norm, most = [], []
        for rows in layout.blocks(dense, where):
            norm.append(l2(rows))
            most.append(largest(rows))
        scale = loss_scale if scaled else None
        self._gradients = {
            "places": places,
            "order": layout.order,
            "l2": _unscaled(joined(norm), scale),
            "largest": _unscaled(joined(most), scale),
            "scale": _one(loss_scale),
            "moved": self._moved() if self.taken else _NOTHING,
        }

    def _moved(self) -> Tensor:
        """How far the weights have been changed since the last step, in numbers of which the largest counts."""
        pairs = zip(self._layout.blocks(self._tensors), self._previous, strict=True)
        return joined([largest(rows.sub_(before)) for rows, before in pairs])

    @torch.no_grad()
    def at_optimizer(self, loss_scale: Tensor | None = None) -> None:
        """The optimizer is about to step: these are the gradients that it gets, still scaled where `loss_scale` is."""
        _, layout, dense, where = self._dense_gradients()
        norm = joined([l2(rows) for rows in layout.blocks(dense, where)])
        self._received = _unscaled(norm, loss_scale)

    @torch.no_grad()
    def after_step(
        self, optimizer: torch.optim.Optimizer, learning_rate: float | None, loss_scale: Tensor | None = None
    ) -> None:
        """The optimizer has stepped, or was kept from it by the scaler, whose scale is now `loss_scale`."""
        self._follow()
        weights_seen, update_seen, least_move = [], [], []
        for i, (rows, kept) in enumerate(zip(self._layout.blocks(self._tensors), self._previous, strict=True)):
            update_seen.append(largest(kept.sub_(rows)))
            if kept.numel() and not self._all_moved:
                moves = self._largest_move[i]
                least_move.append(torch.maximum(moves, kept, out=moves).amin().reshape(1))
            kept.copy_(rows)
            weights_seen.append(largest(rows))
        gradients = self._gradients or _UNSEEN
        stepped = self._gradients is not None and len(gradients["places"]) == len(self._names)
        received = _NOTHING if self._received is None else self._received
        (
            scale, scale_after, loss, micro, collated,
            norm, most, moved, stale, update, weights, least, moments, given,
        ) = (
            to_host([
                gradients["scale"], _one(loss_scale),
                _stacked(self._returned), _stacked(self._micro_losses), self._collated.due(),
                gradients["l2"], gradients["largest"], gradients["moved"], self._stale[1],
                joined(update_seen), joined(weights_seen), joined(least_move),
                self._moments.finite(optimizer, stepped=stepped), received,
            ])
        )  # fmt: skip
        self._collated.take(collated)
        self._all_moved = self._all_moved or (bool(least) and all(v > 0 for v in least))
        self.ever_used |= self.used_layers
        sound = finite(weights) and finite(moments) and finite(norm) and finite(given)
        self._gathered.add(
            Numbers(
                order=self._layout.order,
                scale=scale,
                scale_after=scale_after,
                loss=loss,
                micro=micro,
                there=gradients["places"],
                order_of_gradients=gradients["order"],
                norm=norm,
                most=most,
                moved=moved,
                stale_names=self._stale[0],
                stale=stale,
                update=update,
                weights=weights,
                given=given,
                received=self._received is not None,
                rates=self._groups.rates(optimizer),
                dtypes=self._kinds[0],
                idle=self._idle(self.used_layers),
                nonfinite_moments=NONE if sound else self._moments.nonfinite(optimizer),
                learning_rate=learning_rate,
                seconds=time.perf_counter() - self._started if self._started is not None else None,
                memory=self._peak_memory(),
            )
        )
        self._open()

    @property
    def taken(self) -> int:
        """How many steps are done."""
        return len(self._gathered)

    @property
    def steps(self) -> list[StepRecord]:
        """The steps so far, but for what `finished` adds."""
        return self._gathered.records()

    def finished(self) -> tuple[StepRecord, ...]:
        """Every step so far, complete."""
        self._collated.settle()
        return tuple(
            dataclasses.replace(s, supervised_tokens=self._collated.tokens(s.step), rows=self._collated.rows(s.step))
            for s in self.steps
        )

    def fields(self, optimizer: torch.optim.Optimizer | None, *, whole: bool = True) -> dict[str, Any]:
        """The fields of a RunRecord that a Recorder fills; not `whole`: those that need no tensor of a lost device."""
        if not whole:
            return {"steps": tuple(self.steps)}
        return {
            "steps": self.finished(),
            "optimizer": None if optimizer is None else self.optimizer(optimizer),
            "adapter": self.adapter(),
            "base": self.base(),
            "adapter_digest": self.adapter_digest(),
        }

    def begin_from_here(self) -> None:
        """The weights that the training begins with have been loaded since: steps are measured from them."""
        if self.parameters and not self.taken:
            self._follow()
            self._previous = self._layout.copies(self._tensors)

    def adapter(self) -> tuple[TensorRecord, ...]:
        """Every trainable tensor, now compared with its start."""
        records = []
        partial, first_norms = partial_factors(self.model), self._gathered.first_norms()
        for (name, parameter), dtype, start, move in zip(
            self.parameters.items(),
            self._initial_dtypes,
            self._layout.tensors_of(self._start),
            self._layout.tensors_of(self._largest_move),
            strict=True,
        ):
            end, begin = parameter.detach().float(), start.float()
            changed = ((move > 0) & end.isfinite()).float().mean().item() if end.numel() else 0.0
            records.append(
                TensorRecord(
                    name=name, dtype=dtype_name(parameter.dtype), elements=parameter.numel(),
                    initial_dtype=dtype_name(dtype),
                    initial_norm=begin.norm().item(), final_norm=end.norm().item(),
                    delta_norm=(end - begin).norm().item(), changed_fraction=changed, partial=name in partial,
                    first_gradient_norm=first_norms.get(name),
                )
            )  # fmt: skip
        return tuple(records)

    def adapter_digest(self) -> str:
        """One digest of the bits of every trainable tensor as it is now; empty where there is none."""
        return combined(digests(self.parameters.items())) if self.parameters else ""

    @property
    def base_before(self) -> dict[str, str]:
        """Digest of each base tensor before the first step."""
        return dict(self._base_before)

    @property
    def initial(self) -> dict[str, Tensor]:
        """The trainable tensors as they were before the first step."""
        return dict(zip(self.parameters, self._layout.tensors_of(self._start), strict=True))

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
        places = Counter(id(p) for g in optimizer.param_groups for p in g["params"])
        owned = set(places)
        now = trainables(self.model)
        learning = self.parameters | now
        states = [t for _, t in self._moments.named(optimizer) if t.numel() > 1]
        return OptimizerRecord(
            name=type(optimizer).__name__,
            fused=bool(group.get("fused")),
            eps=_number(group.get("eps")),
            weight_decay=_number(group.get("weight_decay")),
            betas=updates.betas(optimizer),
            state_dtypes=tuple(sorted({dtype_name(t.dtype) for t in states})),
            owns_trainables=owned == {id(p) for p in self.parameters.values()},
            lacking=Names.of(n for n, p in learning.items() if id(p) not in owned),
            foreign=Names.of(n for n, p in now.items() if id(p) in owned and n not in self.parameters),
            twice=Names.of(n for n, p in self.model.named_parameters() if places[id(p)] > 1),
            idle=len(owned - {id(p) for p in learning.values()}),
        )

    @property
    def unused(self) -> set[str]:
        """Trainable tensors of layers that no token of the training reached."""
        return set(self._idle(self.ever_used))

    @property
    def all_layers_used(self) -> bool:
        """Whether a token of the step that is under way has passed through every adapted layer."""
        return self.used_layers >= self._layers

    @property
    def gradients_seen(self) -> bool:
        """Whether the gradients of the step that is under way have been looked at."""
        return self._gradients is not None

    @property
    def _device(self) -> torch.device:
        first = next(iter(self.parameters.values()), None)
        return (next(self.model.parameters()) if first is None else first).device

    def _peak_memory(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device)

    def _dense_gradients(self) -> tuple[list[int], Layout, list[Tensor], list[int]]:
        """The gradients that there are: whose, how they are laid out, themselves, and their places in the layout."""
        places, dense, alike = [], [], True
        for i, (parameter, dtype) in enumerate(zip(self._tensors, self._kinds[0], strict=True)):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                gradient = gradient.to_dense()
            alike = alike and gradient.dtype is dtype
            places.append(i)
            dense.append(gradient)
        if not alike:  # kept in a type of their own
            return places, Layout(dense), dense, list(range(len(dense)))
        return places, self._layout, dense, places

    def _follow(self) -> None:
        """Take over the types and devices of the parameters, where the loop has moved them since."""
        now = self._tensors
        kinds = _kinds(now)
        if kinds != self._kinds:
            held = (self._layout.tensors_of(kept) for kept in (self._start, self._previous, self._largest_move))
            moved = [[t.to(p.device, p.dtype) for t, p in zip(tensors, now, strict=True)] for tensors in held]
            self._kinds, self._layout = kinds, Layout(now)
            self._start, self._previous, self._largest_move = map(self._layout.copies, moved)

    def _idle(self, used: set[str]) -> list[str]:
        """Tensors of layers that are not among those that are `used`."""
        return [] if used >= self._layers else [n for n, layer in self._layer_of.items() if layer not in used]


_NOTHING = torch.empty(0)
"""In the place of numbers that there are none of; nobody writes to it."""
_UNSEEN: dict[str, Any] = {
    "places": [], "order": None, **dict.fromkeys(("l2", "largest", "moved", "scale"), _NOTHING),
}  # fmt: skip
"""In the place of gradients that nobody looked at."""


def _kinds(parameters: list[Tensor]) -> tuple[list[torch.dtype], list[torch.device]]:
    return [p.dtype for p in parameters], [p.device for p in parameters[:1]]  # models move as a whole


def _one(scalar: Tensor | None) -> Tensor:
    """A copy of a scalar that may be changed in place, shape (1,); shape (0,) for None."""
    return _NOTHING if scalar is None else scalar.detach().clone().reshape(1)


def _unscaled(numbers: Tensor, loss_scale: Tensor | None) -> Tensor:
    return numbers if loss_scale is None else numbers / loss_scale


def _mean(loss: Tensor) -> Tensor:
    """A copy of the mean that later changes in place leave alone."""
    return loss.detach().clone() if loss.dim() == 0 else loss.detach().float().mean()


def _holders(parameters: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """The innermost of `layers` that holds each parameter; those that none holds are left out."""
    innermost = sorted(layers, key=len)
    return {n: layer for n in parameters for layer in innermost if n.startswith(f"{layer}.")}


def _stacked(scalars: list[Tensor]) -> Tensor:
    return torch.stack([s.float() for s in scalars]) if scalars else _NOTHING


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
