"""Stations: how a generated fault gets at what passes through each place of a training.

Everything is put into a finished Trainer, except for loading and generation, which are functions of peft and
transformers and are changed for as long as the fault is there.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, Trainer

from pytest_sftguard.engine.faults._collating import collating
from pytest_sftguard.engine.faults._training import at, trainables, wrap
from pytest_sftguard.engine.faults.fault import NotApplicableError
from pytest_sftguard.engine.generated import subjects
from pytest_sftguard.engine.generated.grammar import OPERATIONS, Draw
from pytest_sftguard.engine.generated.operations import IGNORED, on_ids, on_numbers

Found = Callable[[str], object]
"""Called with what the fault was limited to, in words."""

FILES = ("adapter_model.safetensors", "model.safetensors")
"""Files that a saved model's tensors are in."""


def within(draw: Draw, trainer: Trainer, found: Found) -> None:
    """Put the fault into a finished `trainer`. Raises NotApplicableError where it lacks what the station needs."""
    place = _PLACES.get(draw.where)
    if place is not None:
        place(_Fault(draw, trainer, found))


@contextlib.contextmanager
def around(draw: Draw, found: Found) -> Iterator[None]:
    """Change how adapters are loaded or answers generated, while the context lasts, if the fault is there."""
    if draw.where == "load":
        with mock.patch.object(peft_model, "load_peft_weights", _loading(draw, peft_model.load_peft_weights, found)):
            yield
    elif draw.where == "generate":
        with mock.patch.object(GenerationMixin, "generate", _generating(draw, GenerationMixin.generate)):
            yield
    else:
        yield


class _Fault:
    """One fault in one Trainer: the step that is under way, what was chosen, and the values of earlier steps."""

    def __init__(self, draw: Draw, trainer: Trainer, found: Found) -> None:
        self.draw, self.trainer, self.found = draw, trainer, found
        self._visits: dict[str, tuple[int, int]] = {}
        self._kept: dict[tuple[str, int], dict[int, Tensor]] = defaultdict(dict)

    @property
    def step(self) -> int:
        """The optimizer step that is under way, from 1."""
        return int(self.trainer.state.global_step) + 1

    @property
    def affected(self) -> bool:
        """Whether the fault acts in the step that is under way."""
        return self.draw.affects(self.step)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable tensors that the fault is limited to."""
        every = trainables(self.trainer)
        names = subjects.chosen(self.draw, every)
        self.found(subjects.told(self.draw, names))
        return {n: every[n] for n in names}

    def numbers(self, name: str, value: Tensor) -> Tensor:
        """What becomes of `value`, which passes for the tensor or module `name` in the step that is under way."""
        past = self._past(name, value)
        if not self.affected:
            return value
        return _limited(self.draw, value, name, self.step, past)

    def ids(self, name: str, value: Tensor, eligible: Tensor, fill: int) -> Tensor:
        """What becomes of the ids or the mask `value` of a batch, of which `eligible` entries may change."""
        past = self._past(name, value)
        return on_ids(self.draw, value, eligible, fill, self.step, past) if self.affected else value

    def _past(self, name: str, value: Tensor) -> Tensor | None:
        """The value of the first step or of the step before, in the same micro-batch; None if there is none."""
        if not OPERATIONS[self.draw.what].needs_past:
            return None
        step, visit = self._visits.get(name, (0, 0))
        visit = visit + 1 if step == self.step else 0
        self._visits[name] = (self.step, visit)
        kept = self._kept[name, visit]
        kept.setdefault(self.step, value.detach().clone())
        for old in sorted(kept)[1:-2]:
            del kept[old]
        return kept.get(min(kept) if self.draw.what == "freeze" else self.step - 1)


def _limited(draw: Draw, value: Tensor, name: str, step: int, past: Tensor | None = None) -> Tensor:
    """The operation on `value`, or on one of its rows."""
    if past is not None and past.shape != value.shape:
        past = None
    if draw.whom != "row" or not value.dim():
        return on_numbers(draw, value, name, step, past)
    row = min(len(value) - 1, int(draw.choice * len(value)))
    changed = value.clone()
    changed[row] = on_numbers(draw, value[row], name, step, None if past is None else past[row])
    return changed


class _Rows(Dataset[Any]):
    """The rows of a data set with the fault in them."""

    def __init__(self, draw: Draw, rows: Any) -> None:
        self.draw, self.rows = draw, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = dict(self.rows[index])
        if self.draw.whom == "row" and index != int(self.draw.choice * len(self.rows)):
            return row
        ids = torch.as_tensor(row["input_ids"])
        labels = torch.as_tensor(row.get("labels", ids))
        # one row at a time, so that the whole of it is meant
        changed = on_ids(_everywhere(self.draw), ids[None], torch.ones_like(ids, dtype=torch.bool)[None], 0, index)[0]
        row["input_ids"] = changed.tolist()
        # labels that repeat the ids are made from them
        if "labels" in row and labels.shape == ids.shape:
            row["labels"] = torch.where(labels == ids, changed, labels).tolist()
        return row


def _everywhere(draw: Draw) -> Draw:
    return dataclasses.replace(draw, whom="all")


def _data(fault: _Fault) -> None:
    rows = fault.trainer.train_dataset
    if not hasattr(rows, "__getitem__") or not hasattr(rows, "__len__"):
        raise NotApplicableError("the target's data set is a stream, whose rows cannot be indexed")
    fault.trainer.train_dataset = _Rows(fault.draw, rows)
    fault.found("one row" if fault.draw.whom == "row" else "every row")


def _batches(key: str, fault: _Fault) -> None:
    def change(batch: Any) -> None:
        value = batch.get(key)
        if not isinstance(value, Tensor) or value.dim() != 2:
            raise NotApplicableError(f"the target's batches have no {key} of shape (rows, tokens)")
        mask = batch.get("attention_mask")
        attended = torch.ones_like(value, dtype=torch.bool) if mask is None or mask.dim() != 2 else mask.bool()
        if key == "labels":
            eligible, fill = value != IGNORED, IGNORED
        else:
            eligible, fill = (torch.ones_like(attended) if key == "attention_mask" else attended), 0
        batch[key] = fault.ids(key, value, eligible, fill)

    collating(fault.trainer, change)
    fault.found("one row" if fault.draw.whom == "row" else "every row")


def _forward(fault: _Fault) -> None:
    modules = {
        name: module
        for name, module in fault.trainer.model.named_modules()
        if isinstance(module, BaseTunerLayer)
        or (any(True for _ in module.parameters(recurse=False)) and not isinstance(module, nn.ParameterDict))
    }
    names = subjects.chosen(fault.draw, modules, same_role=True)
    fault.found(subjects.told(fault.draw, names, same_role=True))
    for name in names:

        def changed(module: nn.Module, inputs: Any, output: Any, name: str = name) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if not isinstance(first, Tensor) or not first.is_floating_point():
                return output
            value = fault.numbers(name, first)
            return (value, *output[1:]) if isinstance(output, tuple) else value

        modules[name].register_forward_hook(changed)


def _loss(fault: _Fault) -> None:
    def changed(compute_loss: Any, *args: Any, **kwargs: Any) -> Any:
        result = compute_loss(*args, **kwargs)
        if isinstance(result, tuple):
            return (fault.numbers("loss", result[0]), *result[1:])
        return fault.numbers("loss", result)

    fault.found("the loss")
    wrap(fault.trainer, "compute_loss", changed)


def _backward(fault: _Fault) -> None:
    for name, parameter in fault.parameters().items():
        # torch does not annotate it
        parameter.register_hook(lambda g, name=name: fault.numbers(name, g))  # type: ignore[no-untyped-call]


def _gradients(fault: _Fault) -> None:
    """Change the gradients where they lie."""
    for name, parameter in fault.parameters().items():
        if parameter.grad is not None:
            parameter.grad.copy_(fault.numbers(name, parameter.grad))


def _unscale(fault: _Fault) -> None:
    def unscaled(unscale: Any, *args: Any, **kwargs: Any) -> None:
        unscale(*args, **kwargs)
        _gradients(fault)

    def begin() -> None:
        # a reference in float32 has none, and so nothing to unscale
        if fault.trainer.accelerator.scaler is not None:
            wrap(fault.trainer.accelerator.scaler, "unscale_", unscaled)

    fault.parameters()
    at(fault.trainer, "on_train_begin", begin)


def _clip(fault: _Fault) -> None:
    def clipped(clip: Any, *args: Any, **kwargs: Any) -> Any:
        norm = clip(*args, **kwargs)
        _gradients(fault)
        return norm

    fault.parameters()
    wrap(fault.trainer.accelerator, "clip_grad_norm_", clipped)


def _optimizer(fault: _Fault) -> None:
    def stepped(step: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = fault.parameters()
        before = {n: p.detach().clone() for n, p in parameters.items()}
        result = step(*args, **kwargs)
        with torch.no_grad():
            for name, parameter in parameters.items():
                update = parameter - before[name]
                changed = fault.numbers(name, update)
                # what is not changed keeps its bits
                if changed is not update:
                    parameter.copy_(before[name] + changed)
        return result

    fault.parameters()
    at(fault.trainer, "on_train_begin", lambda: wrap(fault.trainer.optimizer, "step", stepped))


def _schedule(fault: _Fault) -> None:
    def change() -> None:
        groups = fault.trainer.optimizer.param_groups
        rates = torch.tensor([float(g["lr"]) for g in groups], dtype=torch.float64)
        for i, group in enumerate(groups):
            group["lr"] = float(fault.numbers(f"group {i}", rates[i]))

    def stepped(step: Any, *args: Any, **kwargs: Any) -> None:
        step(*args, **kwargs)
        # the Trainer counts the step only afterwards
        state = fault.trainer.state
        state.global_step += 1
        try:
            change()
        finally:
            state.global_step -= 1

    def begin() -> None:
        wrap(fault.trainer.lr_scheduler, "step", stepped)
        change()

    fault.found("the learning rate")
    at(fault.trainer, "on_train_begin", begin)


def _checkpoint(fault: _Fault) -> None:
    def loaded(load: Any, checkpoint: Any) -> None:
        load(checkpoint)
        if checkpoint is None:
            return
        optimizer = getattr(fault.trainer.optimizer, "optimizer", fault.trainer.optimizer)
        for name, parameter in fault.parameters().items():
            for key, moment in optimizer.state.get(parameter, {}).items():
                if isinstance(moment, Tensor) and moment.shape == parameter.shape:
                    moment.copy_(_limited(fault.draw, moment, f"{name} {key}", 1))

    fault.parameters()
    wrap(fault.trainer, "_load_optimizer_and_scheduler", loaded)


def _tensors(draw: Draw, tensors: dict[str, Tensor], found: Found) -> dict[str, Tensor]:
    """A saved or loaded state with the fault in it."""
    names = subjects.chosen(draw, sorted(tensors))
    found(subjects.told(draw, names))
    changed = {n: _limited(draw, tensors[n], n, 1) for n in names if tensors[n].is_floating_point()}
    return tensors | {n: t.contiguous() for n, t in changed.items()}


def _save(fault: _Fault) -> None:
    def saved(save_model: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save_model(output_dir, *args, **kwargs)
        for path in Path(output_dir or fault.trainer.args.output_dir).rglob("*.safetensors"):
            if path.name in FILES:
                save_file(_tensors(fault.draw, load_file(path), fault.found), path, {"format": "pt"})

    wrap(fault.trainer, "save_model", saved)


def _loading(draw: Draw, load: Any, found: Found) -> Any:
    def loaded(*args: Any, **kwargs: Any) -> Any:
        return _tensors(draw, load(*args, **kwargs), found)

    return loaded


class _Scores(LogitsProcessor):  # type: ignore[misc]
    """The fault on the logits of each generated token, of shape (rows, vocabulary)."""

    def __init__(self, draw: Draw) -> None:
        self.draw, self.taken = draw, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The changed logits."""
        self.taken += 1
        return _limited(self.draw, scores, "logits", self.taken)


def _generating(draw: Draw, generate: Any) -> Any:
    def generated(model: Any, *args: Any, **kwargs: Any) -> Any:
        processors = LogitsProcessorList([*(kwargs.pop("logits_processor", None) or ()), _Scores(draw)])
        return generate(model, *args, logits_processor=processors, **kwargs)

    return generated


_PLACES: dict[str, Callable[[_Fault], None]] = {
    "data": _data,
    "collator": lambda fault: _batches("input_ids", fault),
    "labels": lambda fault: _batches("labels", fault),
    "mask": lambda fault: _batches("attention_mask", fault),
    "forward": _forward,
    "loss": _loss,
    "backward": _backward,
    "unscale": _unscale,
    "clip": _clip,
    "optimizer": _optimizer,
    "schedule": _schedule,
    "checkpoint": _checkpoint,
    "save": _save,
}
