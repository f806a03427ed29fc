"""The checkpoint that the Trainer keeps as the best one: by which metric, from which step, and whether it is loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytest_sftguard.engine.adapter.reloading import reloading
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Trained
from pytest_sftguard.records import KeptRecord, Names


class KeptCheckpoint(Look[Trained]):
    """Reads the Trainer's state and the folder of its checkpoints after the training."""

    def conclude(self, reached: Trained) -> dict[str, Any]:
        """Return the history of the metric, and what was chosen by it."""
        trainer: Any = reached.trainer
        args, state = trainer.args, trainer.state
        wanted = args.metric_for_best_model
        if wanted is None:
            raise InapplicableError("the training chooses no checkpoint: it keeps its last weights")
        metric = wanted if wanted.startswith("eval_") else f"eval_{wanted}"
        lines = [line for line in state.log_history if _is_number(line.get(metric))]
        if not lines:
            raise InapplicableError(f"no evaluation of the training gave {metric}")
        # what is not finite is never the best, and another invariant's affair
        lines = [line for line in lines if math.isfinite(line[metric])]
        losses = [float(v) if _is_finite(v := line.get("eval_loss")) else None for line in lines]
        kept = state.best_model_checkpoint
        record = KeptRecord(
            metric=metric,
            greater_is_better=bool(args.greater_is_better),
            loads=bool(args.load_best_model_at_end),
            steps=tuple(int(line["step"]) for line in lines),
            values=tuple(float(line[metric]) for line in lines),
            losses=() if None in losses else tuple(x for x in losses if x is not None),
            best_metric=float(state.best_metric) if _is_finite(state.best_metric) else None,
            kept_step=_step_of(kept),
            gone=kept is not None and not Path(kept).is_dir(),
            **(_loaded(reached.trained_model, Path(kept)) if kept and args.load_best_model_at_end else {}),
        )
        return {"kept": record}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _step_of(folder: str | None) -> int | None:
    found = re.search(r"-(\d+)$", Path(folder).name) if folder else None
    return int(found[1]) if found else None


def _loaded(model: Any, folder: Path) -> dict[str, Any]:
    """Tensors of `model` that are not those of the checkpoint in `folder`; none if it has no file of them."""
    form = reloading(model)
    saved = form.tensors(model, folder) if folder.is_dir() else {}
    both = {n: (t.detach().cpu(), saved[n]) for n, t in form.kept(model).items() if n in saved}
    alike = {n: (own, theirs) for n, (own, theirs) in both.items() if own.shape == theirs.shape}
    differing = [n for n, (own, theirs) in alike.items() if not _equal(own, theirs)]
    return {"compared": len(alike), "differing": Names.of(differing)}


def _equal(own: Tensor, saved: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is the same as NaN, because another invariant forbids it."""
    return torch.allclose(own.float(), saved.float(), rtol=0, atol=0, equal_nan=True)
