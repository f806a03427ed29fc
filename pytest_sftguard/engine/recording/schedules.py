"""The learning rates of a schedule, computed apart from the training, which may step it too often or not at all."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from pytest_sftguard.records import ScheduleRecord


class Schedule:
    """The scheduler of a training that is about to begin, which stays unchanged.

    All of transformers' own schedules are LambdaLR, whose functions return the rate of any step. Any other scheduler is
    copied onto an optimizer without parameters, and the copy is stepped.
    """

    def __init__(self, scheduler: Any) -> None:
        # accelerate wraps it
        self._scheduler = getattr(scheduler, "scheduler", scheduler)
        self._first = int(getattr(self._scheduler, "last_epoch", 0))
        self._copy: Any = None
        self._unknown = self._kept()

    def record(self, steps: int) -> ScheduleRecord:
        """Rates of the first `steps` effective steps; calls no function of the schedule before the training is over."""
        name = type(self._scheduler).__name__
        if self._unknown:
            return ScheduleRecord(name=name, unknown=self._unknown)
        try:
            rates = self._stepped(steps) if self._copy is not None else self._computed(steps)
        # a user's own scheduler may need anything
        except Exception as error:
            return ScheduleRecord(name=name, unknown=f"{name} cannot be stepped alone: {type(error).__name__}: {error}")
        return ScheduleRecord(name=name, rates=rates)

    def _kept(self) -> str:
        """Prepare to compute the rates; returns why that is impossible, or an empty string."""
        scheduler = self._scheduler
        name = type(scheduler).__name__
        optimizer = getattr(scheduler, "optimizer", None)
        if not isinstance(optimizer, torch.optim.Optimizer) or not optimizer.param_groups:
            return f"{name} is no scheduler of an optimizer"
        if isinstance(scheduler, ReduceLROnPlateau) or name in ("ReduceLROnPlateau", "GreedyLR"):
            return f"{name} follows a metric"
        if _is_closed(scheduler):
            return ""
        stand_in = _without_parameters(optimizer)
        try:
            self._copy = copy.deepcopy(scheduler, {id(optimizer): stand_in})
        # a user's own scheduler may hold anything: locks, generators, files
        except Exception as error:
            return f"{name} cannot be copied: {type(error).__name__}: {error}"
        return ""

    def _computed(self, steps: int) -> tuple[float, ...]:
        base, function = self._scheduler.base_lrs[0], self._scheduler.lr_lambdas[0]
        every = range(self._first, self._first + steps)
        rates, again = (tuple(float(base * function(k)) for k in every) for _ in range(2))
        if rates != again:
            raise ValueError("its function is not one of the step alone")
        return rates

    def _stepped(self, steps: int) -> tuple[float, ...]:
        group = self._copy.optimizer.param_groups[0]
        rates = [float(group["lr"])]
        with warnings.catch_warnings():
            # torch warns that the optimizer does not step
            warnings.simplefilter("ignore")
            while len(rates) < steps:
                try:
                    # the method of the class, because somebody may have wrapped that of the instance
                    type(self._copy).step(self._copy)
                # a OneCycleLR has ended, and accelerate does not step it any more
                except ValueError:
                    return (*rates, *[rates[-1]] * (steps - len(rates)))
                rates.append(float(group["lr"]))
        return tuple(rates)


def _is_closed(scheduler: Any) -> bool:
    """Whether the rate is the base rate times a function of the step."""
    return isinstance(scheduler, LambdaLR) and type(scheduler).get_lr is LambdaLR.get_lr


def _without_parameters(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer with the groups of `optimizer`, each with a parameter of one element."""
    groups: list[dict[str, Any]] = [{"params": [torch.zeros(1)]} for _ in optimizer.param_groups]
    stand_in = torch.optim.SGD(groups, lr=1.0)
    for group, original in zip(stand_in.param_groups, optimizer.param_groups, strict=True):
        group.update({k: copy.deepcopy(v) for k, v in original.items() if k != "params"})
    return stand_in
