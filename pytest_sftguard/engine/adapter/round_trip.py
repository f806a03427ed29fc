"""The round trip of the adapter: what its file contains, what a load gives back, and whether the effect is the same."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import (
    active_adapters,
    base_differs,
    base_tensors,
    config_of,
    disabled,
    eager,
    in_file,
)
from pytest_sftguard.engine.adapter.reloading import reloading
from pytest_sftguard.engine.after import finiteness, forwards
from pytest_sftguard.engine.building import quantised
from pytest_sftguard.engine.surroundings.errors import first_line, own_work
from pytest_sftguard.records import Names, RoundTripRecord

_LOADING_SEED = 1_000_003
"""A seed that no training is likely to have."""


class AdapterNotSavedError(Exception):
    """The folder that the Trainer saved its model to does not hold what was trained."""


def round_trip(
    trained: nn.Module, folder: Path, fresh: Any, probe: finiteness.ProbeBatch, unused: Collection[str] = ()
) -> tuple[RoundTripRecord, nn.Module]:
    """Compare what was saved in `folder` with `trained`, and load it onto the base of `fresh`.

    `fresh` is the model as the target builds it. `unused` names tensors that no token reached, and that may be zero.
    Returns the record, and the reloaded model in evaluation mode. Raises AdapterNotSavedError, and what peft or
    transformers raises if the load fails. An exception of the comparison of logits becomes `not_asked`.
    """
    form, device = reloading(trained), next(trained.parameters()).device
    if not form.written(folder):
        what = f"of the trained adapter {active_adapters(trained)[0]!r}" if form.partial else "with the trained weights"
        which = ", and the adapter that is active in it" if form.partial else ""
        raise AdapterNotSavedError(
            f"the Trainer's save_model wrote no file {what}: save the model that trains"
            f" (trainer.model.save_pretrained){which}"
        )
    files, saved = form.files(folder), form.tensors(trained, folder)
    name = active_adapters(trained)[0]
    with forwards.evaluating(trained):
        expected = form.kept(trained)
    fresh_config = config_of(fresh)
    base, restored = form.base(fresh)
    base = base.to(device).eval()
    logits = _Logits(probe, partial=form.partial)
    logits.before(base)
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng():
        warnings.simplefilter("always")
        # whoever loads the file does not know the state of the generators in the training
        torch.manual_seed(_LOADING_SEED)
        reloaded = form.loaded(base, folder).to(device).eval()
    with own_work:
        quantised.like(reloaded, trained)
        active = active_adapters(reloaded)[0]
        loaded: dict[str, Tensor] = {in_file(n, active): p for n, p in reloaded.named_parameters()}
        with torch.no_grad():
            loaded |= {n: t for n, t in form.kept(reloaded).items() if n not in loaded}
        # a base that was put together again need not have the bits that it had; buffers that adapters share are drawn
        beside = {} if restored else {n: t for n, t in _of_base(trained).items() if n in saved and n in loaded}
        never = {in_file(n, name) for n in unused}
        missing, unexpected = _unlike(trained, expected, saved) if form.partial else ([], [])
        differs = base_differs(fresh_config) if form.partial else "the model has no adapter that could be disabled"
        compared = RoundTripRecord(
            file_bytes=sum(p.stat().st_size for p in files),
            tensors=len(saved),
            missing=Names.of(missing),
            unexpected=Names.of(unexpected),
            nonfinite=Names.of(n for n, t in saved.items() if t.is_floating_point() and not t.isfinite().all()),
            zero=Names.of(n for n, t in saved.items() if ".lora_" in n and n not in never and _is_zero(t)),
            differing=Names.of(_differing(beside | expected, loaded)),
            # peft may store what the file has in another shape
            file_differing=Names.of(_differing({n: t for n, t in (beside | expected).items() if n in saved}, saved)),
            load_warnings=tuple(str(w.message)[:300] for w in caught if _is_about_tensors(str(w.message))),
            rescaled=Names.of(_rescaled(trained, reloaded)),
            computed_otherwise=Names.of(_computed_otherwise(trained, reloaded)),
            restored=restored,
            base_differs=differs,
            **logits.compared(trained, reloaded),
        )
    return compared, reloaded


def _unlike(trained: nn.Module, expected: dict[str, Tensor], saved: dict[str, Tensor]) -> tuple[list[str], list[str]]:
    """Tensors that the adapter's file lacks, and those that it has and the adapter does not."""
    name = active_adapters(trained)[0]
    # with the tied ones, of which one is in the file
    names: dict[int, set[str]] = {}
    for n, p in trained.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(in_file(n, name))
    same = {n: tied for tied in names.values() for n in tied}
    missing = {n for n in expected if not same.get(n, {n}) & saved.keys()}
    wrong_shape = {n for n in expected if n in saved and saved[n].shape != expected[n].shape}
    buffers = {in_file(n, name) for n, _ in trained.named_buffers(remove_duplicate=False)}
    known = same.keys() | expected.keys() | buffers | _of_base(trained).keys()
    return sorted(missing | wrong_shape), sorted(n for n in saved.keys() - known if not _beside(trained, n))


def _of_base(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of the base by the names that a file has for them."""
    return {in_file(n): t for n, t in base_tensors(model).items()}


def _beside(model: nn.Module, name: str) -> bool:
    """Whether a module has the tensor as an attribute, registered neither as a parameter nor as a buffer."""
    path, _, attribute = name.rpartition(".")
    return any(n == path and isinstance(getattr(m, attribute, None), (dict, Tensor)) for n, m in model.named_modules())


def _is_zero(tensor: Tensor) -> bool:
    """Whether there are elements, and all are zero; AdaLoRA may leave a layer no rank."""
    return bool(tensor.numel()) and not tensor.count_nonzero()


class _Logits:
    """The outputs of the base, of the trained and of the reloaded model for one batch.

    The models run the training's own code on a batch of ours: an exception here says nothing about the training.
    """

    def __init__(self, probe: finiteness.ProbeBatch, *, partial: bool) -> None:
        self._probe, self._partial = probe, partial
        self._asked: tuple[dict[str, Any], str] | None = None
        self._base: Tensor | None = None
        self._error = ""

    def before(self, base: nn.Module) -> None:
        """Ask the base, before anything is loaded onto it.

        A quantised base is asked afterwards, with the adapter disabled: its first forward pass packs its weights, which
        bitsandbytes does not undo when the adapter is loaded.
        """
        if not _quantised(base):
            self._base = self._guarded(self._ask_base, base)

    def compared(self, trained: nn.Module, reloaded: nn.Module) -> dict[str, Any]:
        """Fields of a RoundTripRecord: outputs of the trained and of the reloaded model."""
        return self._guarded(self._compared, trained, reloaded) or {"not_asked": self._error}

    def _guarded(self, ask: Callable[..., Any], *models: nn.Module) -> Any:
        if self._error:
            return None
        try:
            with torch.no_grad():
                return ask(*models)
        except Exception as error:
            self._error = f"{type(error).__name__}: {first_line(error)[:300]}"
            return None

    def _ask_base(self, base: nn.Module) -> Tensor:
        with eager(base), disabled(base):
            inputs, [output], unpadded = self._probe.answers(base)
        self._asked = inputs, unpadded
        return finiteness.attended(output, inputs)

    def _compared(self, trained: nn.Module, reloaded: nn.Module) -> dict[str, Any]:
        if self._base is None:
            self._base = self._ask_base(reloaded)
        base_change = None
        # `_ask_base` sets it
        assert self._asked is not None
        inputs, unpadded = self._asked
        with eager(trained) as one, eager(reloaded) as other:
            trained.eval()
            if self._partial:
                with disabled(trained):
                    base_change = _difference(self._ask(trained), self._base)
            after = self._ask(reloaded)
            effect = _difference(after, self._base)
            # logits are large, so that none is kept longer than needed
            self._base = None
            before = self._ask(trained)
        return {
            "max_abs_logit": before.float().abs().max().item(),
            "max_logit_change": _difference(before, after),
            "max_logit_effect": effect,
            "finiteness": finiteness.seen(inputs, [before, after], unpadded, one and other),
            "max_base_change": base_change,
        }

    def _ask(self, model: nn.Module) -> Tensor:
        assert self._asked is not None
        inputs, _ = self._asked
        return finiteness.attended(forwards.asked(model, inputs), inputs)


def _quantised(model: nn.Module) -> bool:
    return getattr(forwards.inner(model), "hf_quantizer", None) is not None


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; NaN if there is one."""
    return float((one.float() - other.float()).abs_().max().item())


def _differing(expected: dict[str, Tensor], loaded: dict[str, Tensor]) -> Iterable[str]:
    for name, tensor in expected.items():
        other = loaded.get(name)
        # what an encoder of prompts gives is computed again
        rtol = 1e-5 if name == "prompt_embeddings" else 0.0
        if other is None or other.shape != tensor.shape or not _same_numbers(other.detach(), tensor.detach(), rtol):
            yield name


def _computed_otherwise(trained: nn.Module, reloaded: nn.Module) -> Iterable[str]:
    """Modules whose class or forward method differs between the two models.

    Only within the model that peft wrapped: around it, accelerate leaves a forward method with autocast, which has
    ended by now.
    """
    within = set(forwards.inner(trained).modules())
    for name, mine, theirs in _pairs(trained, reloaded):
        if mine in within and _implementation(mine) != _implementation(theirs):
            yield name


def _implementation(module: nn.Module) -> tuple[type, Any]:
    """Class and forward code of a module. The code of a patch is the same in both models; its closure is not."""
    own = vars(module).get("forward")
    while isinstance(own, partial):
        own = own.func
    return type(module), getattr(own, "__code__", own)


def _rescaled(trained: nn.Module, reloaded: nn.Module) -> Iterable[str]:
    """LoRA layers whose scaling differs in the reloaded model, with both numbers."""
    adapters = active_adapters(trained)[0], active_adapters(reloaded)[0]
    for name, *layers in _pairs(trained, reloaded):
        known = [getattr(layer, "scaling", None) for layer in layers]
        before, after = (s.get(a) if isinstance(s, dict) else None for s, a in zip(known, adapters, strict=True))
        if not (isinstance(before, (int, float)) and isinstance(after, (int, float))):
            continue
        if not math.isclose(before, after, rel_tol=1e-6):
            yield f"{name} ({before:g}, reloaded {after:g})"


def _pairs(one: nn.Module, other: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules of two models by their name in the first, whatever names the adapters have."""
    mine, theirs = active_adapters(one)[0], active_adapters(other)[0]
    modules = {_without_adapter(name, theirs): module for name, module in other.named_modules()}
    for name, module in one.named_modules():
        same = modules.get(_without_adapter(name, mine))
        if same is not None:
            yield name, module, same


def _without_adapter(name: str, adapter: str) -> tuple[str, ...]:
    """A module's path with an empty string in place of the adapter's name."""
    return tuple("" if part == adapter else part for part in name.split("."))


def _same_numbers(one: Tensor, other: Tensor, rtol: float = 0.0) -> bool:
    """Whether two tensors contain the same numbers, or NaN at the same place; peft may load into a wider type."""
    found, wanted = one.double().cpu(), other.double().cpu()
    return torch.allclose(found, wanted, rtol=0, atol=rtol * float(wanted.abs().max()) if rtol else 0, equal_nan=True)


def _is_about_tensors(message: str) -> bool:
    return any(word in message.lower() for word in ("missing", "unexpected", "mismatch", "not found in"))
