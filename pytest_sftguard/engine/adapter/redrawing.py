"""The target built again under another seed: tensors that differ then exist nowhere but in this run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytest_sftguard.engine.adapter.adapters import active_adapters, base_digests, base_tensors, holder, in_file
from pytest_sftguard.engine.adapter.reloading import saved_tensors
from pytest_sftguard.engine.surroundings.errors import own_work
from pytest_sftguard.engine.tensors.reductions import combined


@dataclass(frozen=True)
class Redrawn:
    """The base of a second build, compared with the base of the training."""

    before: dict[str, str]
    """Digest of each base tensor of the training, before its first step."""
    after: dict[str, str]
    """Digest of each base tensor of the other model, as it was built."""
    rows: dict[str, tuple[int, ...] | None]
    """The tensors that differ, with the rows that do; None if the shape differs, or the tensor is absent."""
    whole: bool
    """Whether every parameter differs that could, so that the whole base is a toy made from the seed."""

    @own_work
    def without(self, trained: nn.Module, folder: Path) -> tuple[str, list[str]]:
        """Digest of the other base with the tensors of the adapter's file in `folder`, and what still differs."""
        name = active_adapters(trained)[0]
        saved = {in_file(n, name) for n in saved_tensors(trained, folder)}
        tokens = _token_rows(trained)
        left, digest = [], dict(self.after)
        for tensor, rows in self.rows.items():
            own = tokens.get(tensor)
            excused = rows is not None and own is not None and own.issuperset(rows)
            if own is None:
                excused = ".original_module." in tensor or in_file(tensor) in saved
            if excused:
                digest[tensor] = self.before[tensor]
            else:
                left.append(f"{tensor} (row {rows[0]})" if rows else tensor)
        return combined(digest), left


@own_work
def redrawn(before: dict[str, str], trained: nn.Module, fresh: nn.Module) -> Redrawn:
    """Compare the base of `fresh` with the digests `before` of the training's, whose tensors `trained` still has."""
    after, others = base_digests(fresh), _inactive_adapters(fresh)
    differing = [n for n in before if after.get(n) != before[n] and not _is_of(others, n)]
    after |= {n: before[n] for n in before.keys() & after.keys() if n not in differing}
    old, new = base_tensors(trained), base_tensors(fresh)
    rows = {n: _rows(old.get(n), new.get(n)) for n in differing}
    drawable = [n for n, p in fresh.named_parameters() if n in new and not _is_of(others, n) and _varies(p.detach())]
    return Redrawn(before, after, rows, bool(drawable) and set(drawable) <= set(differing))


def _inactive_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters beside the active one, which are random and have files of their own."""
    return set(getattr(holder(model)[1], "peft_config", {})) - set(active_adapters(model))


def _is_of(adapters: set[str], name: str) -> bool:
    """Whether a tensor belongs to one of `adapters`."""
    parts = name.split(".")
    return any(a in adapters and b.startswith(("lora_", "modules_to_save")) for b, a in itertools.pairwise(parts))


def other_factors(initial: dict[str, Tensor], fresh: nn.Module) -> set[str]:
    """Names of trainable tensors that `fresh` starts with other values than `initial`."""
    there: dict[str, Any] = dict(fresh.named_parameters())
    return {n for n, t in initial.items() if n not in there or not _same(t, there[n].detach())}


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.to(other.dtype), other.to(one.device))


def _rows(old: Tensor | None, new: Tensor | None) -> tuple[int, ...] | None:
    if old is None or new is None or old.shape != new.shape or old.dim() == 0:
        return None
    unlike = (old.detach().to(new.device) != new.detach()).reshape(len(old), -1).any(1)
    return tuple(unlike.nonzero()[:, 0].tolist())


def _varies(tensor: Tensor) -> bool:
    """Whether the elements of a tensor differ; norms and biases are all ones or zeros under every seed."""
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    return bool((tensor != tensor.reshape(-1)[0]).any())


def _token_rows(model: nn.Module) -> dict[str, set[int]]:
    """Rows of embeddings that are trained and saved separately, by the name of the embedding's tensor."""
    found: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        indices = getattr(getattr(module, "token_adapter", None), "token_indices", None)
        if isinstance(indices, dict):
            rows = {int(i) for a in active_adapters(model) for i in indices.get(a, ())}
            for inner in ("original_module.weight", "token_adapter.base_layer.weight"):
                found[f"{name}.{inner}"] = rows
    return found
