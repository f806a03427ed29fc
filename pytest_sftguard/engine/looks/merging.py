"""Merging the adapter into its base must keep the logits, also after saving, and change no other tensor."""

from __future__ import annotations

import contextlib
import copy
import shutil
import traceback
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import config_of, eager, lora_layers
from pytest_sftguard.engine.adapter.reloading import from_pretrained
from pytest_sftguard.engine.after import finiteness, forwards
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Reloaded
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.engine.tensors.reductions import digests, dtype_name
from pytest_sftguard.records import MergeRecord, Names

_PREFIX = "base_model.model."
_WRAPPERS = (".base_layer", ".token_adapter")


class Merging(Look[Reloaded]):
    """Merges the reloaded model, in place: a copy would need its memory twice."""

    last = True

    def conclude(self, reached: Reloaded) -> dict[str, Any]:
        """Compare logits and weights before and after, and the logits of the saved model."""
        _refuse(reached.reloaded_model)
        # peft warns of tied weights, which this look compares
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {"merge": self._merge(reached)}

    def _merge(self, reached: Reloaded) -> MergeRecord:
        model: Any = reached.reloaded_model
        inputs = finiteness.probe_of(reached.given, model).plain
        layers = {n: m for n, m in lora_layers(model).items() if hasattr(m, "merge") and hasattr(m, "merged_adapters")}
        unmerged = _logits(model, inputs)
        changes = {n: _change(layer) for n, layer in _outermost(layers)}
        targets = tuple(f"{_plain(n)}." for n in layers)
        # no forward pass from here to `after`: it may write buffers
        before = _digests(model, model.active_adapters[0])
        with _peft_may_refuse():
            merged = model.merge_and_unload().eval()
        after = {n: d for n, d in _digests(merged, "").items() if not f"{n}.".startswith(targets)}
        logits = _logits(merged, inputs)
        again, not_saved = _saved_and_loaded(merged, reached.folder / "merged", inputs)
        return MergeRecord(
            layers=len(layers),
            dtype=dtype_name(_narrowest(c.dtype for c in changes.values())),
            max_abs_logit=unmerged.abs().max().item(),
            max_logit_change=(logits - unmerged).abs().max().item(),
            max_saved_change=None if again is None else (again - unmerged).abs().max().item(),
            not_saved=not_saved,
            touched=Names.of(sorted(n for n, digest in after.items() if before.get(n, digest) != digest)),
            **_survived(changes),
        )


@dataclass
class _Change:
    """How merging changes the weights of a layer, and how it would without rounding."""

    dtype: torch.dtype
    """Type of the weights."""
    weights: int = 0
    """Weights that would change without rounding."""
    unchanged: int = 0
    """Those of them that do not change."""
    kept: float = 0.0
    """Scalar product of the change and the change without rounding."""
    wanted: float = 0.0
    """Squared norm of the change without rounding."""


def _refuse(model: Any) -> None:
    """Raise InapplicableError where the model cannot be merged, with the reason."""
    config = config_of(model)
    if config is None:
        raise InapplicableError("the model has no adapter")
    if getattr(config, "is_prompt_learning", False):
        raise InapplicableError("the adapter is a prompt, which cannot be merged")
    if not hasattr(model, "merge_and_unload") and not hasattr(model, "get_base_model"):
        raise InapplicableError("the adapter is part of a larger model, which has no merge_and_unload")
    if not hasattr(model.base_model, "merge_and_unload"):
        raise InapplicableError(f"an adapter of type {type(model.base_model).__name__} cannot be merged")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "is_quantized", False):
        raise InapplicableError("the base is quantised: merging would round its weights again")


@contextlib.contextmanager
def _peft_may_refuse() -> Iterator[None]:
    """Turn an exception of peft itself into an InapplicableError with its reason."""
    try:
        yield
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        if "peft" not in Path(where).parts:
            raise
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        raise InapplicableError(f"peft does not merge it: {reason}") from error


def _logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return the main output for what the training gave the model first, images, sounds and decoder inputs included."""
    with torch.no_grad(), eager(model):
        return forwards.asked(model, inputs).float()


def _outermost(layers: dict[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers that no other wraps: an adapter of two parameters of one module wraps it twice."""
    for name, layer in layers.items():
        if not any(name.startswith(f"{other}.base_layer") for other in layers):
            yield name, layer


def _change(layer: Any) -> _Change:
    """Merge a copy of a layer, and one in a wider type, which rounds nothing away; compare both with the layer."""
    own = _weights(layer)
    narrow = _narrowest(w.dtype for w in own.values())
    wide = torch.float64 if narrow is torch.float32 else torch.float32
    with _peft_may_refuse(), torch.no_grad():
        merged, exact = copy.deepcopy(layer), copy.deepcopy(layer).to(wide)
        merged.merge()
        exact.merge()
    change = _Change(narrow)
    wanted, found = _weights(exact), _weights(merged)
    for name, start in own.items():
        due, done = wanted[name].double() - start.double(), found[name].double() - start.double()
        change.weights += int(due.count_nonzero())
        change.unchanged += int(((done == 0) & (due != 0)).sum())
        change.kept += (due * done).sum().item()
        change.wanted += due.square().sum().item()
    return change


def _weights(layer: Any) -> dict[str, Tensor]:
    """Return the floating-point parameters of the layer below all adapters."""
    inner = layer
    while hasattr(inner, "base_layer"):
        inner = inner.base_layer
    return {n: p.detach().clone() for n, p in inner.named_parameters() if p.is_floating_point() and "lora_" not in n}


def _narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return min(dtypes, key=lambda d: torch.finfo(d).bits, default=torch.float32)


def _survived(changes: dict[str, _Change]) -> dict[str, Any]:
    """Return which share of the change is in the merged weights; nothing where the adapter changes none."""
    weights, wanted = sum(c.weights for c in changes.values()), sum(c.wanted for c in changes.values())
    if not weights or not wanted > 0 or wanted == float("inf"):
        return {}
    moved = {n: c for n, c in changes.items() if c.wanted > 0}
    return {
        "swallowed": sum(c.unchanged for c in changes.values()) / weights,
        "kept": sum(c.kept for c in changes.values()) / wanted,
        "least_kept": Names.of([_plain(min(moved, key=lambda n: moved[n].kept / moved[n].wanted))]),
    }


def _digests(model: nn.Module, adapter: str) -> dict[str, str]:
    """Return digests of all tensors but the adapter's, by the names that they have in the merged model."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    trained = {_plain(n.partition(".modules_to_save.")[0]) for n, _ in named if ".modules_to_save." in n}
    kept: dict[str, Tensor] = {}
    for name, tensor in named:
        plain = _plain(name).replace(f".modules_to_save.{adapter}.", ".")
        holder = plain.partition(".original_module")[0]
        # another adapter's tensor, or one that a trained module replaces
        if ".modules_to_save." in plain or (".original_module" in plain and holder in trained):
            continue
        kept[plain] = tensor
    return digests(kept.items())


def _plain(name: str) -> str:
    """Return the name without the parts that peft adds."""
    name = name.removeprefix(_PREFIX)
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _saved_and_loaded(model: Any, folder: Path, inputs: dict[str, Any]) -> tuple[Tensor | None, str]:
    """Return the logits of the merged model after saving and loading, or None and why that was not done."""
    model_class = type(model)
    if not hasattr(model_class, "from_pretrained") or not hasattr(model, "save_pretrained"):
        return None, f"a {model_class.__name__} has no save_pretrained"
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    with torch.device("meta"):
        built = {n: tuple(t.shape) for n, t in model_class(copy.deepcopy(model.config)).state_dict().items()}
    if shapes != built:
        return None, f"a {model_class.__name__} made from the model's configuration has other tensors"
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    folder.mkdir(parents=True, exist_ok=True)
    if 2 * size > shutil.disk_usage(folder).free:
        return None, "the disk has no room for the merged model"
    first = next(iter(model.parameters()))
    model.save_pretrained(str(folder))
    try:
        loaded = from_pretrained(model, folder).to(first.device).eval()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return _logits(loaded, inputs), ""
