"""Recording one training at the source, step by step.

The owner of the loop tells a `Recorder` the raw loss of each micro-batch, that all gradients of a step are complete,
and that the optimizer has stepped. A Recorder reads tensors, never a log. A step costs a few fused reductions over the
trainable tensors and one transfer to the host.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter import routing
from pytest_sftguard.engine.adapter.adapters import (
    base_digests,
    base_tensors,
    lora_layers,
    partial_factors,
    reallocated,
    trainables,
)
from pytest_sftguard.engine.recording import descent, stepping, updates
from pytest_sftguard.engine.recording.collated import Collated
from pytest_sftguard.engine.recording.factors import Factors
from pytest_sftguard.engine.recording.gathering import Gathered, Numbers, finite
from pytest_sftguard.engine.recording.moments import Moments
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.engine.tensors.layouts import Layout, Signs, joined, l2, largest, ordered
from pytest_sftguard.engine.tensors.reductions import combined, digests, dtype_name, norms, to_host
from pytest_sftguard.records import NONE, BaseRecord, Names, OptimizerRecord, StepRecord, TensorRecord


class Recorder:
    """Observes one training of `model`, the unwrapped one, from before its first step."""

    @own_work
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        self.seen_batches = Collated(padding if isinstance(padding, int) else None)
        """The contents of the micro-batches."""
        self.parameters = trainables(model)
        self._tensors = now = list(self.parameters.values())
        self._types = _types(now)
        self._initial_dtypes = self._types[0]
        self._all_moved = False
        self._layout = Layout(now)
        self._start, self._previous, self._largest_move = (self._layout.copies(now) for _ in range(3))
        for moves in self._largest_move:
            moves.zero_()
        self._names = list(self.parameters)
        masked = reallocated(model)
        self._reallocated = [i for i, name in enumerate(self._names) if name in masked]
        self._moments = Moments(self.parameters)
        [start] = to_host([joined([largest(rows.clone()) for rows in self._start])])
        self._gathered = Gathered(self._names, ordered(self._layout.order, start), [p.numel() for p in now])
        self._factors, self._signs = Factors(model, self.parameters), Signs()
        self._groups = updates.Groups(now)
        self.base_before = base_digests(model)
        """Digest of each base tensor before the first step."""
        self._layer_of = _holders(self.parameters, lora_layers(model))
        self._layers = set(self._layer_of.values())
        self.used_layers: set[str] = set()
        self.ever_used: set[str] = set()
        self.rewritten: set[str] = set()
        self._descending = _Descending()
        self.rearranged: set[str] = set()
        self._open()

    def _open(self) -> None:
        self._micro_losses: list[Tensor] = []
        self._model_losses: list[Tensor] = []
        self._offsets: list[bool] = []
        self._returned: list[Tensor] = []
        self._places: list[int] = []
        self._gradient_order: Sequence[int] | None = None
        self._gradients = dict.fromkeys(("scale", "norm", "signed", "most", "moved", "factors"), _NOTHING)
        self._received = self._received_signed = _NOTHING
        self._given: list[int] | None = None
        self._stepping: stepping.Stepping | None = None
        self._started: float | None = None
        self._stale: tuple[list[str], Tensor] = ([], _NOTHING)
        self._had_gradients = self._cleared = False
        self.used_layers = set()

    @own_work
    def begin_micro_batch(self) -> bool:
        """Begin a micro-batch; returns whether it is the first of its step, which starts the step's clock."""
        first = self._started is None
        if first:
            self.start_clock()
            self.look_for_stale_gradients()
        return first

    @own_work
    def start_clock(self) -> None:
        """Begin the step, unless it has begun."""
        if self._started is None:
            self._started = time.perf_counter()
            if torch.cuda.is_available() and self._device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self._device)

    @own_work
    @torch.no_grad()
    def look_for_stale_gradients(self) -> None:
        """Record the gradients that exist before the first backward pass of the step: they belong to another step."""
        stale = [(n, p.grad) for n, p in self.parameters.items() if p.grad is not None]
        self._stale = ([n for n, _ in stale], norms([g.to_dense() if g.is_sparse else g for _, g in stale], math.inf))

    @own_work
    def collated(self, inputs: Any) -> None:
        """Record the inputs of a micro-batch of the present step."""
        self.seen_batches.add(self.taken + 1, inputs)

    @own_work
    def micro_batch(self, loss: Tensor, models: Tensor | None = None, *, offset: bool = False) -> None:
        """Record the raw loss of a micro-batch, of any shape, whose mean counts, and the loss of the model's output.

        `offset` says that the one is the other with a number added.
        """
        # `zero_grad` leaves None behind, so that nothing has to be read from the device
        self._cleared = self._cleared or (self._had_gradients and all(p.grad is None for p in self._tensors))
        self._micro_losses.append(mean(loss))
        if models is not None:
            self._model_losses.append(models)
        self._offsets.append(offset)

    @own_work
    def micro_batch_done(self, returned: Tensor) -> None:
        """Record a summand of the step's loss."""
        self._returned.append(mean(returned))
        self._had_gradients = self._had_gradients or any(p.grad is not None for p in self._tensors)

    @own_work
    @torch.no_grad()
    def before_step(self, loss_scale: Tensor | None = None, *, scaled: bool = True) -> None:
        """Record the gradients of the step, complete and unclipped.

        With a scaler, `loss_scale` is its scale, a tensor of one element on the device, so that nothing waits for it.
        Unless the gradients are still `scaled`, it has been divided out already.
        """
        self._follow()
        self._accept_reallocation()
        self._places, layout, dense, where = self._dense_gradients()
        norm, signed, most = [], [], []
        for rows in layout.blocks(dense, where):
            norm.append(l2(rows))
            signed.append(self._signs.total(rows))
            most.append(largest(rows))
        scale = loss_scale if scaled else None
        self._gradient_order = layout.order
        self._gradients = {
            "scale": _one(loss_scale),
            "norm": _unscaled(joined(norm), scale),
            "signed": _unscaled(joined(signed), scale),
            "most": _unscaled(joined(most), scale),
            "moved": self._moved() if self.taken else _NOTHING,
            "factors": self._factors.products(self.taken + 1),
        }
        self._descending.keep(dense, self._places, scale)

    def _accept_reallocation(self) -> None:
        """Measure from the present values where the adapter's own method has set elements to zero since the step."""
        if self._reallocated:
            kept = self._layout.tensors_of(self._previous)
            for i in self._reallocated:
                kept[i].copy_(self._tensors[i])

    def _moved(self) -> Tensor:
        """Changes of the weights since the previous step, of which the largest counts."""
        pairs = zip(self._layout.blocks(self._tensors), self._previous, strict=True)
        return joined([largest(rows.sub_(before)) for rows, before in pairs])

    @own_work
    @torch.no_grad()
    def at_optimizer(self, loss_scale: Tensor | None = None, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Record the gradients that `optimizer` receives, which are still multiplied by `loss_scale`, if any."""
        if not self.taken and optimizer is not None and descent.momentum_carried(optimizer):
            self._descending.give_up("the optimizer brought the momentum of an earlier training")
        self._given, layout, dense, where = self._dense_gradients()
        norm, signed = [], []
        for rows in layout.blocks(dense, where):
            norm.append(l2(rows))
            signed.append(self._signs.total(rows))
        self._received, self._received_signed = (_unscaled(joined(n), loss_scale) for n in (norm, signed))
        if layout is self._layout and stepping.repeatable(optimizer, self._tensors, self.taken + 1):
            assert optimizer is not None
            self._stepping = stepping.Stepping(optimizer, layout, self._tensors, dense, loss_scale, step=self.taken + 1)

    @own_work
    @torch.no_grad()
    def after_step(
        self, optimizer: torch.optim.Optimizer, learning_rate: float | None, loss_scale: Tensor | None = None
    ) -> None:
        """Record the step of the optimizer, also if the scaler skipped it; `loss_scale` is the scale after it."""
        self._follow()
        products = _NOTHING
        if self._descending.compares:
            products = self._descending.products(optimizer, self._layout.tensors_of(self._previous), self._tensors)
        weights_seen, update_seen, least_move = [], [], []
        for i, (rows, kept) in enumerate(zip(self._layout.blocks(self._tensors), self._previous, strict=True)):
            update_seen.append(largest(kept.sub_(rows)))
            if kept.numel() and not self._all_moved:
                moves = self._largest_move[i]
                least_move.append(torch.maximum(moves, kept, out=moves).amin().reshape(1))
            kept.copy_(rows)
            weights_seen.append(largest(rows))
        stepped = self.gradients_seen and len(self._places) == len(self._names)
        tensors = self._gradients | {
            "scale_after": _one(loss_scale),
            "loss": _stacked(self._returned),
            "micro": _stacked(self._micro_losses),
            # a step counts where the model itself computed all of its losses
            "own": _stacked(self._model_losses if len(self._model_losses) == len(self._micro_losses) else []),
            "stale": self._stale[1],
            "update": joined(update_seen),
            "weights": joined(weights_seen),
        }
        others = [
            self.seen_batches.due(),
            joined(least_move),
            self._moments.finite(optimizer, stepped=stepped),
            self._received,
            self._received_signed,
        ]
        *lists, collated, least, moments, given, given_signed, directed = to_host(
            [*tensors.values(), *others, products]
        )
        numbers = dict(zip(tensors, lists, strict=True))
        mismatch = self._factors.mismatch(numbers.pop("factors"))
        # an overflow may lie in an element that is not compared
        departure = None if self._stepping is None or _fell(numbers) else self._stepping.departure()
        direction = self._descending.direction(self._names, directed, skipped=_fell(numbers))
        self.seen_batches.take(collated)
        self._all_moved = self._all_moved or (bool(least) and all(v > 0 for v in least))
        self.ever_used |= self.used_layers
        sound = all(map(finite, (numbers["weights"], moments, numbers["norm"], given)))
        self._gathered.add(
            Numbers(
                **numbers,
                received=given if self._given is not None else None,
                # of other tensors they are other numbers
                received_signed=given_signed if self._given == self._places else [],
                mismatch=mismatch,
                departure=departure,
                order=self._layout.order,
                offsets=self._offsets if any(self._offsets) else [],
                places=self._places,
                gradient_order=self._gradient_order,
                stale_names=self._stale[0],
                cleared=self._cleared,
                rates=self._groups.rates(optimizer),
                dtypes=self._types[0],
                idle=self._idle(self.used_layers),
                direction=direction,
                not_directed=self._descending.why,
                nonfinite_moments=NONE if sound else self._moments.nonfinite(optimizer),
                learning_rate=learning_rate,
                seconds=time.perf_counter() - self._started if self._started is not None else None,
                memory=self._peak_memory(),
            )
        )
        self._open()

    @property
    def taken(self) -> int:
        """Number of finished steps."""
        return len(self._gathered)

    @property
    def steps(self) -> list[StepRecord]:
        """Records of the steps so far, without what `finished` adds."""
        return self._gathered.records()

    @own_work
    def finished(self) -> tuple[StepRecord, ...]:
        """Complete records of the steps so far."""
        self.seen_batches.settle()
        return tuple(
            dataclasses.replace(
                s,
                supervised_tokens=self.seen_batches.tokens(s.step),
                rows=self.seen_batches.rows(s.step),
                tied=self.seen_batches.tied(s.step),
            )
            for s in self.steps
        )

    @own_work
    def fields(self, optimizer: torch.optim.Optimizer | None, *, whole: bool = True) -> dict[str, Any]:
        """Fields of a RunRecord; unless `whole`, only those that need no tensor of a lost device."""
        if not whole:
            return {"steps": tuple(self.steps)}
        return {
            "steps": self.finished(),
            "optimizer": None if optimizer is None else self.optimizer(optimizer),
            "adapter": self.adapter(),
            "base": self.base(),
            "adapter_digest": self.adapter_digest(),
        }

    @own_work
    def begin_from_here(self) -> None:
        """Measure the first step from the present weights, which a checkpoint has replaced."""
        if self.parameters and not self.taken:
            self._follow()
            self._previous = self._layout.copies(self._tensors)

    def adapter(self) -> tuple[TensorRecord, ...]:
        """Records of every trainable tensor, compared with its start."""
        records = []
        partial, first_norms = partial_factors(self.model), self._gathered.first_norms()
        modules = dict(self.model.named_modules())
        for (name, parameter), dtype, start, move in zip(
            self.parameters.items(),
            self._initial_dtypes,
            self._layout.tensors_of(self._start),
            self._layout.tensors_of(self._largest_move),
            strict=True,
        ):
            end, begin = parameter.detach().float(), start.float()
            changed = _moved_share(name, (move > 0) & end.isfinite())
            record = TensorRecord(
                name=name,
                dtype=dtype_name(parameter.dtype),
                initial_dtype=dtype_name(dtype),
                elements=parameter.numel(),
                initial_norm=begin.norm().item(),
                final_norm=end.norm().item(),
                delta_norm=(end - begin).norm().item(),
                changed_fraction=changed,
                partial=name in partial,
                chosen_from=next((at for at, _ in routing.choices(name, modules)), ""),
                first_gradient_norm=first_norms.get(name),
            )
            records.append(record)
        return tuple(records)

    def adapter_digest(self) -> str:
        """Digest of the present bits of every trainable tensor; empty if there is none."""
        return combined(digests(self.parameters.items())) if self.parameters else ""

    @property
    def initial(self) -> dict[str, Tensor]:
        """The trainable tensors as they were before the first step."""
        return dict(zip(self.parameters, self._layout.tensors_of(self._start), strict=True))

    def base(self) -> BaseRecord:
        """Record of the base's tensors, compared with their start."""
        before, after = self.base_before, base_digests(self.model)
        after.update({n: d for n, d in before.items() if n in self.rewritten})
        changed = [n for n in before.keys() | after.keys() if before.get(n) != after.get(n)]
        return BaseRecord(
            tensors=len(after),
            digest_before=combined(before),
            digest_after=combined(after),
            changed=Names.of(sorted(changed)),
            rewritten=Names.of(sorted(self.rewritten)),
            rearranged=Names.of(sorted(self.rearranged)),
            trainable=Names.of(n for n in base_tensors(self.model) if n in self.parameters),
        )

    def optimizer(self, optimizer: torch.optim.Optimizer) -> OptimizerRecord:
        """Record of the optimizer, its parameters and the types of its states."""
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
            without_rate=Names.of(n for n, p in now.items() if id(p) in _without_rate(optimizer)),
            twice=Names.of(n for n, p in self.model.named_parameters() if places[id(p)] > 1),
            idle=len(owned - {id(p) for p in learning.values()}),
        )

    @property
    def unused(self) -> set[str]:
        """Names of the trainable tensors of layers that no token of the training reached."""
        return set(self._idle(self.ever_used))

    @property
    def all_layers_used(self) -> bool:
        """Whether a token of the present step has passed through every adapted layer."""
        return self.used_layers >= self._layers

    @property
    def gradients_seen(self) -> bool:
        """Whether the gradients of the present step were recorded."""
        return self._gradient_order is not None

    @property
    def _device(self) -> torch.device:
        first = next(iter(self.parameters.values()), None)
        return (next(self.model.parameters()) if first is None else first).device

    def _peak_memory(self) -> int | None:
        if self._device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated(self._device)

    def _dense_gradients(self) -> tuple[list[int], Layout, list[Tensor], list[int]]:
        """Indices of the parameters with a gradient, the gradients' layout, themselves, and their indices in it."""
        places, dense, alike = [], [], True
        for i, (parameter, dtype) in enumerate(zip(self._tensors, self._types[0], strict=True)):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                gradient = gradient.to_dense()
            alike = alike and gradient.dtype is dtype
            places.append(i)
            dense.append(gradient)
        # gradients may have types of their own
        if not alike:
            return places, Layout(dense), dense, list(range(len(dense)))
        return places, self._layout, dense, places

    def _follow(self) -> None:
        """Follow the parameters to new types and devices, if the loop has moved them."""
        now = self._tensors
        types = _types(now)
        if types != self._types:
            held = (self._layout.tensors_of(kept) for kept in (self._start, self._previous, self._largest_move))
            moved = [[t.to(p.device, p.dtype) for t, p in zip(tensors, now, strict=True)] for tensors in held]
            self._types, self._layout = types, Layout(now)
            self._start, self._previous, self._largest_move = map(self._layout.copies, moved)

    def _idle(self, used: set[str]) -> list[str]:
        """Names of the tensors of layers that are not `used`."""
        return [] if used >= self._layers else [n for n, layer in self._layer_of.items() if layer not in used]


class _Descending:
    """Waits for the first step that moves a tensor, and compares that update with the gradients.

    Those of steps without an effect before it, as in a warm-up from zero, may be in the optimizer's momentum. Then the
    update goes down their sum, in which the earlier ones have faded by the momentum, and without momentum down its own.
    Under Nesterov's rule, and of an optimizer that does not say whether it has momentum, the lower one of the two
    cosines counts.
    """

    def __init__(self) -> None:
        self.why = ""
        """Why the update is not compared; empty if it is, or if nothing has moved yet."""
        self._waiting, self._first = True, True
        self._places: list[int] = []
        self._gradients: list[Tensor] = []
        self._earlier: dict[int, Tensor] = {}
        self._readings, self._fading = 1, 1.0

    def give_up(self, why: str) -> None:
        """Compare nothing, because of `why`."""
        self._waiting, self._gradients, self._earlier, self.why = False, [], {}, why

    def keep(self, gradients: list[Tensor], places: list[int], scale: Tensor | None) -> None:
        """Keep the gradients as the backward pass left them, without their `scale`: what comes after may change them.

        Weight decay may be a part of the gradient, and is not scaled.
        """
        if self._waiting:
            kept = [g.detach().clone() for g in gradients] if scale is None else [g.detach() / scale for g in gradients]
            self._places, self._gradients = places, kept

    @property
    def compares(self) -> bool:
        """Whether the step has gradients to compare; none once the first move was seen."""
        return bool(self._gradients)

    def products(self, optimizer: torch.optim.Optimizer, before: list[Tensor], after: list[Tensor]) -> Tensor:
        """Numbers for `direction`, to be transferred with those of the step."""
        old, new = ([tensors[i] for i in self._places] for tensors in (before, after))
        decays = descent.decays(optimizer, new)
        momentum = descent.momentum_of(optimizer)
        self._fading = 1.0 if momentum is None else momentum
        alone = not self._earlier or not self._fading
        either = momentum is None or any(group.get("nesterov") for group in optimizer.param_groups)
        readings = [self._gradients] if alone or either else []
        readings += [] if alone else [self._summed(self._gradients)]
        self._readings = len(readings)
        return torch.cat([descent.products(old, new, gradients, decays) for gradients in readings])

    def _summed(self, gradients: list[Tensor]) -> list[Tensor]:
        """`gradients` and those of the steps before that moved nothing, faded."""
        earlier, fading = self._earlier, self._fading
        return [g + fading * earlier[i] if i in earlier else g for i, g in zip(self._places, gradients, strict=True)]

    def direction(self, names: list[str], numbers: list[float], *, skipped: bool) -> descent.Direction | None:
        """The direction of the step's update; None if nothing moved, or an earlier step did."""
        tensors = [names[i] for i in self._places]
        each = len(numbers) // self._readings
        parts = [numbers[i : i + each] for i in range(0, len(numbers), each or 1)]
        seen = [d for part in parts if (d := descent.direction(tensors, part)) is not None]
        # NaN is no smaller than anything
        found = min(seen, key=lambda d: -math.inf if math.isnan(d.cosine) else d.cosine, default=None)
        gradients, self._gradients = self._gradients, []
        if found is None:
            # those of a skipped step reach no optimizer
            if gradients and self._waiting and not skipped:
                self._earlier |= zip(self._places, self._summed(gradients), strict=True)
            # a step that moved nothing may have left momentum: each tensor by itself need not go downhill then
            self._first = self._first and (skipped or not self._waiting or not numbers)
            return None
        self._waiting, self._earlier = False, {}
        return found if self._first else dataclasses.replace(found, tensor="", tensor_cosine=found.cosine)


_NOTHING = torch.empty(0)
"""Stands for absent numbers; nobody writes to it."""


def _moved_share(name: str, moved: Tensor) -> float:
    """Share of the elements of a tensor that moved, `moved` of its shape, without units of a layer that are silent.

    Behind and before a rectifier that never fires, all elements for an input of A or an output of B have no gradient.
    That may be so for a half of them.
    """
    over = next((d for factor, d in (("lora_A", 0), ("lora_B", 1)) if f".{factor}." in name), None)
    if over is not None and moved.dim() == 2:
        alive = moved.any(over)
        if 2 * int(alive.sum()) >= len(alive):
            moved = moved[:, alive] if over == 0 else moved[alive]
    return moved.float().mean().item() if moved.numel() else 0.0


def _types(parameters: list[Tensor]) -> tuple[list[torch.dtype], list[torch.device]]:
    """Types of all parameters, and the device of the first: a model moves as a whole."""
    return [p.dtype for p in parameters], [p.device for p in parameters[:1]]


def _fell(numbers: Mapping[str, list[float]]) -> bool:
    """Whether the loss scale fell after the step, which was skipped then."""
    return bool(numbers["scale"] and numbers["scale_after"]) and numbers["scale_after"][0] < numbers["scale"][0]


def _one(scalar: Tensor | None) -> Tensor:
    """A copy of a scalar that somebody may change in place, shape (1,); shape (0,) for None."""
    return _NOTHING if scalar is None else scalar.detach().clone().reshape(1)


def _unscaled(numbers: Tensor, loss_scale: Tensor | None) -> Tensor:
    return numbers if loss_scale is None else numbers / loss_scale


def mean(loss: Tensor) -> Tensor:
    """A copy of the mean, which later changes in place do not affect."""
    return loss.detach().clone() if loss.dim() == 0 else loss.detach().float().mean()


def _without_rate(optimizer: torch.optim.Optimizer) -> set[int]:
    """Ids of the parameters in groups with the learning rate 0; empty where no group has a positive one."""
    rates = [(float(group.get("lr", 1.0)), group["params"]) for group in optimizer.param_groups]
    still = {id(p) for rate, parameters in rates if rate == 0 for p in parameters}
    return still if any(rate > 0 for rate, _ in rates) else set()


def _holders(parameters: Iterable[str], layers: Iterable[str]) -> dict[str, str]:
    """The innermost of `layers` around each parameter; parameters outside of all layers are left out."""
    innermost = sorted(layers, key=len)
    return {n: layer for n in parameters for layer in innermost if n.startswith(f"{layer}.")}


def _stacked(scalars: list[Tensor]) -> Tensor:
    return torch.stack([s.float() for s in scalars]) if scalars else _NOTHING


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
