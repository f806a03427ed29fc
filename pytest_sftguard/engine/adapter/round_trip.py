"""The round trip of the adapter: what its file contains, what a load gives back, and whether the effect is the same."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import (
    WEIGHTS,
    active_adapters,
    base_differs,
    base_tensors,
    config_of,
    eager,
    folder_of,
    in_file,
    is_adapter,
    saved_tensors,
    takes_from_the_base,
)
from pytest_sftguard.engine.after import finiteness, forwards
from pytest_sftguard.records import Names, RoundTripRecord


class AdapterNotSavedError(Exception):
    """The folder that the Trainer saved its model to does not hold the adapter that was trained."""


def round_trip(
    trained: nn.Module, folder: Path, fresh: Any, probe: finiteness.ProbeBatch, unused: Collection[str] = ()
) -> tuple[RoundTripRecord, nn.Module]:
    """Compare the saved adapter in `folder` with `trained`, and load it onto the base of `fresh`.

    `trained` and `fresh` are PeftModels, `fresh` as the target builds it. `unused` names tensors that no token reached,
    and that may be zero. Returns the record, and the reloaded model in evaluation mode. Raises what peft raises if the
    load fails.
    """
    from peft import PeftModel

    name = active_adapters(trained)[0]
    folder = folder_of(trained, folder)
    path = folder / WEIGHTS
    saved = saved_tensors(trained, folder)
    # with the frozen ones: an adapter that was loaded without is_trainable is saved all the same
    own = {in_file(n, name): p for n, p in trained.named_parameters() if is_adapter(trained, n)}
    expected: dict[str, Tensor] = {n: t for n, t in own.items() if "original_module" not in n}
    # with the tied ones
    every_name = {in_file(n, name) for n, _ in trained.named_parameters(remove_duplicate=False)}
    base_names = {in_file(n) for n in base_tensors(trained)}

    restored, fresh_config = takes_from_the_base(fresh), config_of(fresh)
    base = fresh.merge_and_unload() if restored else fresh.unload() if hasattr(fresh, "unload") else fresh
    if hasattr(base, "peft_config"):
        # `unload` leaves it behind, and peft warns of it
        del base.peft_config
    device = next(trained.parameters()).device
    base = base.to(device).eval()
    with torch.no_grad(), eager(base):
        inputs, raw, unpadded = probe.answers(base)
        # logits are large, so that none is kept longer than needed
        base_logits = finiteness.attended(raw.pop(), inputs)
    if not (folder / "adapter_config.json").exists():
        raise AdapterNotSavedError(
            f"the Trainer's save_model wrote no file of the trained adapter {name!r}: save the model that trains"
            " (trainer.model.save_pretrained), and the adapter that is active in it"
        )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reloaded = PeftModel.from_pretrained(base, str(folder)).to(device).eval()
    loaded: dict[str, Tensor] = {in_file(n, active_adapters(reloaded)[0]): p for n, p in reloaded.named_parameters()}
    never = {in_file(n, name) for n in unused}

    with torch.no_grad(), eager(trained) as one, eager(reloaded) as other:
        trained.eval()
        with _disabled(trained):
            base_change = _difference(finiteness.attended(trained(**inputs).logits, inputs), base_logits)
        after = finiteness.attended(reloaded(**inputs).logits, inputs)
        effect = _difference(after, base_logits)
        del base_logits
        before = finiteness.attended(trained(**inputs).logits, inputs)
    seen = finiteness.seen(inputs, [before, after], unpadded, one and other)
    wrong_shape = {n for n in expected if n in saved and saved[n].shape != expected[n].shape}
    return RoundTripRecord(
        file_bytes=path.stat().st_size if path.exists() else 0,
        tensors=len(saved),
        missing=Names.of(sorted((expected.keys() - saved.keys()) | wrong_shape)),
        unexpected=Names.of(sorted(saved.keys() - every_name - base_names)),
        nonfinite=Names.of(n for n, t in saved.items() if t.is_floating_point() and not t.isfinite().all()),
        zero=Names.of(n for n, t in saved.items() if ".lora_" in n and n not in never and not t.count_nonzero()),
        differing=Names.of(_differing(expected, loaded)),
        # peft may store what the file has in another shape
        file_differing=Names.of(_differing({n: t for n, t in expected.items() if n in saved}, saved)),
        load_warnings=tuple(str(w.message)[:300] for w in caught if _is_about_tensors(str(w.message))),
        rescaled=Names.of(_rescaled(trained, reloaded)),
        computed_otherwise=Names.of(_computed_otherwise(trained, reloaded)),
        restored=restored,
        max_abs_logit=before.float().abs().max().item(),
        max_logit_change=_difference(before, after),
        max_logit_effect=effect,
        finiteness=seen,
        max_base_change=base_change,
        base_differs=base_differs(fresh_config),
    ), reloaded


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference; NaN if there is one."""
    return float((one.float() - other.float()).abs_().max().item())


def _differing(expected: dict[str, Tensor], loaded: dict[str, Tensor]) -> Iterable[str]:
    for name, tensor in expected.items():
        other = loaded.get(name)
        if other is None or other.shape != tensor.shape or not _same_numbers(other.detach(), tensor.detach()):
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


def _same_numbers(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors contain the same numbers, or NaN at the same place; peft may load into a wider type."""
    return torch.allclose(one.double(), other.double(), rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def _disabled(model: Any) -> Iterator[None]:
    """Run without the adapter. Peft warns of trained biases, which `base_differs` reports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with model.disable_adapter():
            yield


def _is_about_tensors(message: str) -> bool:
    return any(word in message.lower() for word in ("missing", "unexpected", "mismatch", "not found in"))
