"""The gradient that backward gave, against differences of the loss itself along random directions.

The size of a step is searched for: a fixed one is too large for one model and drowns in rounding in another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.micro_batch.repeated import Repeated
from pytest_sftguard.engine.micro_batch.stops import OtherCallsError, Stops
from pytest_sftguard.records import DerivativeRecord, DirectionRecord, Names

PARTS = 6
"""Parts into which the tensors are divided, in their order: one direction each, beside one through all of them."""
_ALIGNED = 1.5
"""Length of a direction's part along the gradient, compared with its random part: no derivative is near 0 by luck."""
_EVENED = 10.0
"""Largest factor by which a tensor with a small gradient is moved further: else large ones hide a wrong one."""
_FIRST_CHANGE = 0.03
"""Share of the loss by which the first step should change it, and `_FARTHEST` the largest relative step."""
_FARTHEST = 0.5
_AGREED, _AGREED_ENOUGH = 0.005, 0.02
"""Relative distance at which two steps agree, so that the search ends; and at which the better pair is still used."""
_SMALLER = 3.0
_SEARCHED, _SEARCHED_NEAR = 4, 2
_ROUNDING = 1e-7
"""Rounding of a float32 loss of about 1, of which a difference may contain its share `_AGREED`."""
_SUSPICIOUS = 0.01
"""Error from which on stop-gradients are held and the place is searched: half of the invariant's limit."""
_REDRAWN = 2
_BUDGET = 40
"""Passes after which no further direction is begun, once one has settled."""
_REPEATED = 1e-5
"""Largest relative difference of the loss computed again. Measured: 0 on a CPU, also with dropout."""
_DETACHED = 8
"""Places that are tried one by one."""


@dataclass
class _Direction:
    tensors: str
    moves: dict[str, Tensor]
    predicted: float
    """Derivative along the direction by the gradient."""
    size: float
    """Size that such a derivative usually has."""


@dataclass
class _Slope:
    value: float
    step: float


class Derivative:
    """Compares derivatives along a few directions, and searches for the place where they begin to differ."""

    def __init__(self, repeated: Repeated, loss: float, parts: int = PARTS) -> None:
        self.repeated, self.loss, self.parts = repeated, loss, parts
        tensors = repeated.tensors
        hooked = [n for n, p in tensors.items() if p._post_accumulate_grad_hooks or n in repeated.uncalled]
        self.hooked = Names.of(hooked)
        self.tensors = {n: p for n, p in tensors.items() if n not in set(hooked)}
        self._generator = torch.Generator().manual_seed(0)
        self._settled, self._passes = _FARTHEST, 0
        self._lengths = {n: self._length(n) for n in self.tensors}
        typical = [c for _, c in self._lengths.values() if c > 0]
        self._typical = sorted(typical)[len(typical) // 2] if typical else 0.0

    def record(self) -> DerivativeRecord:
        """Compare along each direction."""
        record = DerivativeRecord(
            arithmetic=self.repeated.arithmetic, loss=self.loss, tensors=len(self.tensors), hooked=self.hooked
        )
        record = dataclasses.replace(record, left_out=self._incomparable(), **self._of_hooks())
        if record.left_out:
            return record
        groups = self._groups()
        with torch.no_grad():
            if not self._repeats():
                why = "the loss of one micro-batch is another one when it is computed again, with equal random numbers"
                return dataclasses.replace(record, left_out=why)
            found: list[tuple[_Direction, _Slope | None]] = []
            for names in groups:
                # a flat, noisy loss costs the most, and tells the least
                if self._passes >= _BUDGET and any(s is not None for _, s in found):
                    break
                found.append(self._tried(names))
        settled = [(d, s) for d, s in found if s is not None]
        record = dataclasses.replace(record, asked=len(found), unsettled=len(found) - len(settled))
        errors = [_error(d, s) for d, s in settled]
        directions = [
            DirectionRecord(tensors=d.tensors, error=e, ratio=_ratio(d, s), step=s.step)
            for (d, s), e in zip(settled, errors, strict=True)
        ]
        if any(not e <= _SUSPICIOUS for e in errors):
            record, directions = self._suspected(record, settled, directions)
        return dataclasses.replace(record, directions=tuple(directions))

    def _of_hooks(self) -> dict[str, Any]:
        hooked = self.repeated.hooked
        if not hooked:
            return {}
        return {
            "changed": Names.of(h.tensor for h in hooked),
            "hook": hooked[0].hook,
            "hook_distance": hooked[0].distance,
            "hook_factor": hooked[0].factor,
        }

    def _incomparable(self) -> str:
        if self.repeated.arithmetic != "float32":
            return f"differences of a loss in {self.repeated.arithmetic} are mostly rounding"
        if self.repeated.calls != 1:
            return f"the training step computed {self.repeated.calls} losses with compute_loss, not one"
        if not self.tensors:
            return "every trainable tensor has a hook of the training's own, which may change its gradient"
        if not math.isfinite(self.loss):
            return "the loss of the micro-batch is not finite"
        if not all(bool(g.isfinite().all()) for g in self.repeated.gradients.values()):
            return "gradients of the micro-batch are not finite"
        return ""

    def _repeats(self) -> bool:
        return math.isclose(self.repeated.loss(), self.loss, rel_tol=_REPEATED, abs_tol=_REPEATED)

    def _groups(self) -> list[list[str]]:
        names = list(self.tensors)
        size = math.ceil(len(names) / min(self.parts, len(names)))
        return [names, *(names[i : i + size] for i in range(0, len(names), size) if size < len(names))]

    def _length(self, name: str) -> tuple[float, float]:
        """Return the root mean square of a tensor, and the change of the loss by a relative step in it."""
        rms = float(self.tensors[name].detach().float().pow(2).mean().sqrt()) or _ROUNDING
        gradient = self.repeated.gradients.get(name)
        return rms, 0.0 if gradient is None else rms * float(gradient.norm())

    def _direction(self, names: list[str]) -> _Direction:
        """Draw a direction: part of it random, part along the gradient with a random sign for each tensor."""
        moves, predicted, size = {}, 0.0, 0.0
        for name in names:
            parameter = self.tensors[name]
            rms, change = self._lengths[name]
            scale = rms * (min(_EVENED, max(1 / _EVENED, self._typical / change)) if change else 1.0)
            move = torch.randn(parameter.shape, generator=self._generator).to(parameter.device)
            sign = 1 if torch.rand((), generator=self._generator) < 0.5 else -1
            gradient = self.repeated.gradients.get(name)
            if gradient is not None and change:
                move += sign * _ALIGNED * gradient / gradient.norm()
                size += (scale / rms * change) ** 2 * (1 + _ALIGNED**2)
                predicted += scale * float((gradient.double() * move.double()).sum())
            moves[name] = scale * move
        label = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        return _Direction(label, moves, predicted, math.sqrt(size))

    def _tried(self, names: list[str]) -> tuple[_Direction, _Slope | None]:
        """Return a direction in these tensors and the derivative there; a second one must confirm what deviates."""
        direction = self._direction(names)
        slope = self._slope(direction)
        if slope is None or _error(direction, slope) <= _SUSPICIOUS:
            return direction, slope
        for _ in range(_REDRAWN):
            other = self._direction(names)
            second = self._slope(other)
            if second is not None and not _error(other, second) <= _SUSPICIOUS / 2:
                return direction, slope
        return direction, None

    def _slope(self, direction: _Direction, compute: Callable[[], float] | None = None) -> _Slope | None:
        """Return the derivative of the loss along `direction` by differences; None where step sizes do not agree.

        Two sizes suffice where the gradient agrees with them. Four must agree on what contradicts it: two may lie on
        either side of the same kink.
        """
        compute = compute or self.repeated.loss
        farthest = _FARTHEST
        if direction.size:
            farthest = min(_FARTHEST, _FIRST_CHANGE * max(abs(self.loss), 0.1) / direction.size)
        # most directions settle where the last one did
        near = min(farthest, _SMALLER * self._settled)
        slope = self._searched(direction, compute, near, _SEARCHED if near == farthest else _SEARCHED_NEAR)
        if slope is None and near < farthest:
            slope = self._searched(direction, compute, farthest, _SEARCHED)
        if slope is not None:
            self._settled = slope.step
        return slope

    def _searched(self, direction: _Direction, compute: Callable[[], float], step: float, sizes: int) -> _Slope | None:
        before = self._difference(direction, step, compute)
        slopes: list[float] = []
        loosely: _Slope | None = None
        for _ in range(sizes):
            step /= _SMALLER
            rounding = _ROUNDING * max(abs(self.loss), 1.0) / step
            if not rounding <= _AGREED_ENOUGH * max(direction.size, abs(before)):
                break
            value = self._difference(direction, step, compute)
            size = max(direction.size, abs(value))
            if not (math.isfinite(value) and rounding <= _AGREED_ENOUGH * size):
                break
            # the error of central differences falls with the square of the step
            slopes.append((_SMALLER**2 * value - before) / (_SMALLER**2 - 1))
            slope, apart, before = _Slope(slopes[-1], step), abs(value - before) / size, value
            if _error(direction, slope) <= _SUSPICIOUS:
                if apart <= _AGREED:
                    return slope
                if apart <= _AGREED_ENOUGH:
                    loosely = slope
            elif len(slopes) >= 3 and rounding <= _AGREED * size and _spread(slopes[-3:]) <= _AGREED * size:
                return slope
        return loosely

    def _difference(self, direction: _Direction, step: float, compute: Callable[[], float]) -> float:
        self._passes += 2
        with self._moved(direction, step):
            above = compute()
        with self._moved(direction, -step):
            below = compute()
        return (above - below) / (2 * step)

    @contextlib.contextmanager
    def _moved(self, direction: _Direction, step: float) -> Iterator[None]:
        before = {n: self.tensors[n].detach().clone() for n in direction.moves}
        with torch.no_grad():
            for name, move in direction.moves.items():
                self.tensors[name].add_(step * move)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    self.tensors[name].copy_(value)

    def _suspected(
        self, record: DerivativeRecord, settled: list[tuple[_Direction, _Slope]], directions: list[DirectionRecord]
    ) -> tuple[DerivativeRecord, list[DirectionRecord]]:
        """Hold what the loss treats as constant, and find the tensor nearest to the loss that still deviates."""
        stops = Stops(self.repeated.plain)
        with torch.enable_grad(), self.repeated.without_checkpointing():
            try:
                with stops.noted():
                    self.repeated.loss()

                def held() -> float:
                    with torch.enable_grad(), stops.held():
                        return self.repeated.loss()

                made = []
                for (direction, _), seen in zip(settled, directions, strict=True):
                    if seen.error <= _SUSPICIOUS:
                        made.append(seen)
                        continue
                    slope = self._slope(direction, held)
                    error = None if slope is None else _error(direction, slope)
                    ratio = seen.ratio if slope is None else _ratio(direction, slope)
                    made.append(dataclasses.replace(seen, held_error=error, ratio=ratio))
                record = dataclasses.replace(record, detached=self._detached(stops, settled, made))
            except OtherCallsError:
                return record, directions
            wrong = [d for d in made if d.held_error is not None and not d.held_error <= _SUSPICIOUS]
            if wrong:
                record = self._located(record, held)
        return record, made

    def _detached(self, stops: Stops, settled: list[tuple[_Direction, _Slope]], made: list[DirectionRecord]) -> Names:
        """Return the places in the user's layers whose stop-gradient alone makes the difference."""
        explained = [
            (d, s)
            for (d, s), seen in zip(settled, made, strict=True)
            if seen.held_error is not None and seen.held_error <= _SUSPICIOUS
        ]
        if not explained:
            return Names.of([])
        direction, slope = max(explained, key=lambda pair: _error(*pair))
        limit = max(_SUSPICIOUS, 0.1 * _error(direction, slope))
        found = []
        for place in stops.places[:_DETACHED]:

            def without(place: str = place) -> float:
                with torch.enable_grad(), stops.held(but=place):
                    return self.repeated.loss()

            value = self._difference(direction, slope.step, without)
            if not _error(direction, _Slope(value, slope.step)) <= limit:
                found.append(place)
        return Names.of(found)

    def _located(self, record: DerivativeRecord, held: Callable[[], float]) -> DerivativeRecord:
        """Halve the tensors, from the loss backwards, down to the last one whose gradient deviates."""

        def deviates(names: list[str]) -> bool:
            direction = self._direction(names)
            slope = self._slope(direction, held)
            return slope is not None and not _error(direction, slope) <= _SUSPICIOUS

        names = list(self.tensors)
        while len(names) > 1:
            first, second = names[: len(names) // 2], names[len(names) // 2 :]
            names = second if deviates(second) else first
        if not deviates(names):
            return record
        [tensor] = names
        earlier = list(self.tensors)[: list(self.tensors).index(tensor)]
        upstream = deviates(earlier[: max(1, len(earlier) // 2)]) if earlier else None
        return dataclasses.replace(record, tensor=tensor, upstream=upstream)


def _spread(values: list[float]) -> float:
    return max(values) - min(values)


def _error(direction: _Direction, slope: _Slope) -> float:
    size = max(direction.size, abs(slope.value))
    return abs(direction.predicted - slope.value) / size if size else 0.0


def _ratio(direction: _Direction, slope: _Slope) -> float | None:
    return direction.predicted / slope.value if slope.value else None
