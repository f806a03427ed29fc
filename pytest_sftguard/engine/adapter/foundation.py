"""The base before the first step: whether its tensors are finite, and whether a checkpoint filled them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import active_adapters, base_tensors, in_file, trainables
from pytest_sftguard.engine.adapter.attachment import matches, tuner_layers
from pytest_sftguard.engine.after import forwards


class Loads:
    """Tensors that the checkpoints lacked which transformers loaded while a target was built."""

    def __init__(self) -> None:
        self._absent: list[tuple[weakref.ref[nn.Module], list[str]]] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Collect the reports of from_pretrained."""
        from transformers import modeling_utils

        original = getattr(modeling_utils, "log_state_dict_report", None)
        if original is None:
            yield
            return

        def report(*args: Any, **kwargs: Any) -> Any:
            model, info = kwargs.get("model"), kwargs.get("loading_info")
            if isinstance(model, nn.Module) and info is not None:
                absent = {*info.missing_keys, *(key for key, *_ in info.mismatched_keys)}
                self._absent.append((weakref.ref(model), sorted(map(str, absent))))
            return original(*args, **kwargs)

        modeling_utils.log_state_dict_report = report
        try:
            yield
        finally:
            modeling_utils.log_state_dict_report = original

    def not_loaded(self, model: nn.Module) -> list[str]:
        """Tensors of `model` that no checkpoint had, and that no trained and saved tensor replaces."""
        parts = {id(m) for m in model.modules()}
        trained = [in_file(n, a) for n in trainables(model) for a in active_adapters(model)]
        found = []
        for reference, keys in self._absent:
            if id(reference()) in parts:
                found += [k for k in keys if not matches(trained, in_file(k))]
        return found


def nonfinite(model: nn.Module) -> tuple[int, list[str]]:
    """Number of base tensors, and the names of those that are not finite."""
    parameters = {n for n, _ in model.named_parameters()}
    tensors = base_tensors(model)
    return len(tensors), [n for n, t in tensors.items() if not _finite(t.detach(), n not in parameters)]


def zero_magnitudes(model: nn.Module) -> list[str]:
    """Names of DoRA magnitudes that contain a zero."""
    found = []
    for name, layer in tuner_layers(model).items():
        held: Any = getattr(layer, "lora_magnitude_vector", None) or {}
        for adapter in active_adapters(model):
            weight = getattr(held[adapter], "weight", None) if adapter in held else None
            if isinstance(weight, Tensor) and bool((weight.detach() == 0).any()):
                found.append(f"{name}.lora_magnitude_vector.{adapter}")
    return found


def padding_id(model: Any, tokenizer: Any) -> int | None:
    """The id that fills rows up; None where neither the tokenizer nor the model declares one."""
    sources = [tokenizer, getattr(forwards.inner(model), "config", None)]
    found = (getattr(s, "pad_token_id", None) for s in sources)
    return next((i for i in found if isinstance(i, int) and i >= 0), None)


def zero_embeddings(model: Any, ids: Iterable[int]) -> list[str]:
    """Those of `ids` whose frozen embedding is all zeros; none if the embedding is trained.

    The row that torch itself keeps at zero, because it is declared as padding, is left out.
    """
    embedding = forwards.embeddings(model)
    weight = getattr(embedding, "weight", None)
    learns = embedding is not None and any(p.requires_grad for p in embedding.parameters())
    if learns or not isinstance(weight, Tensor) or weight.dim() != 2:
        return []
    declared = getattr(embedding, "padding_idx", None)
    used = sorted(i for i in set(ids) if 0 <= i < len(weight) and i != declared)
    if not used:
        return []
    rows = weight.detach()[torch.tensor(used, device=weight.device)]
    return [str(i) for i, zero in zip(used, (rows == 0).all(1).tolist(), strict=True) if zero]


def _finite(tensor: Tensor, masks: bool) -> bool:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return True
    if masks:
        return not bool((tensor.isnan() | (tensor == torch.inf)).any())
    return bool(tensor.isfinite().all())
