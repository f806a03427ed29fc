"""Plain trainings: what a bare Trainer makes of a target, with no code of the guard's in it, and how far two are apart.

It decides whether a generated fault has an effect. What two sound runs of one training differ by, which split the batch
in another place or use another attention kernel, is the noise floor.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer

from pytest_sftguard.engine.building.cpu_float16 import make_real
from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.generated.grammar import Setting
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.precision import mode_named

MEASURES = ("weights", "losses", "file", "logits", "ids", "resumed")
"""What is compared: trained weights, losses, the saved file, the reloaded model's logits and ids, a resumed run."""

SMALLEST_FLOOR = 1e-6
"""Least noise floor: a few roundings in float32, where two runs happen to agree to the bit."""

_ROWS = 4
_NEW_TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a plain training ended with."""

    error: str = ""
    """Exception that it ended in; empty if it ended well."""
    start: dict[str, Tensor] = field(default_factory=dict)
    """Trainable tensors before the training."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Trainable tensors after it."""
    losses: tuple[float, ...] = ()
    """Loss of each micro-batch."""
    file: dict[str, Tensor] = field(default_factory=dict)
    """The saved tensors."""
    logits: Tensor | None = None
    """Logits of the reloaded model, shape (rows, tokens, vocabulary)."""
    base_logits: Tensor | None = None
    """Those of its base alone."""
    ids: Tensor | None = None
    """Ids that the reloaded model generated, shape (rows, tokens)."""
    resumed: dict[str, Tensor] = field(default_factory=dict)
    """Trainable tensors after a training that was interrupted at half of its steps and resumed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a reloaded model is asked: the same for every run of a training."""

    batch: dict[str, Tensor]
    """A batch of rows."""
    prompts: dict[str, Tensor]
    """Their prompts, padded on the left."""


def arguments_of(setting: Setting, folder: str, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of a target for `setting`, with its output in `folder`."""
    mode = mode_named(setting.precision)
    return {
        "model": None,
        "dtype": mode.weights_dtype,
        "output_dir": folder,
        "max_steps": setting.steps,
        "per_device_train_batch_size": setting.batch[0],
        "gradient_accumulation_steps": setting.batch[1],
        "seed": 0,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **mode.training_arguments,
        **dict(setting.arguments),
        **changes,
    }


def asked(target: Target, setting: Setting) -> Asked:
    """What the reloaded models of `target` are asked: its own first rows."""
    with isolated(), tempfile.TemporaryDirectory() as folder:
        trainer = target.build(**arguments_of(setting, folder))
        rows = [trainer.train_dataset[i] for i in range(_ROWS)]
        batch = {k: v for k, v in trainer.data_collator(rows).items() if k in ("input_ids", "attention_mask")}
    prompts = [[i for i, label in zip(r["input_ids"], r["labels"], strict=True) if label == -100] for r in rows]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    return Asked(batch=batch, prompts={"input_ids": ids, "attention_mask": mask})


def train(target: Target, setting: Setting, ask: Asked, *, resumed: bool = False, eager: bool = False) -> Outcome:
    """Train `target` with a bare Trainer, save it, load it onto a second build, and ask that.

    With `resumed` the training is also interrupted at half of its steps, and resumed by another Trainer. With `eager`
    the attention is the plain one.
    """
    with isolated(), tempfile.TemporaryDirectory() as folder:
        try:
            return _trained(target, setting, ask, folder, resumed, eager)
        # whatever a fault raises
        except Exception as error:
            return Outcome(error=f"{type(error).__name__}: {error}"[:300])


def _trained(target: Target, setting: Setting, ask: Asked, folder: str, resumed: bool, eager: bool) -> Outcome:
    trainer = _built(target, setting, f"{folder}/training", eager)
    start, losses = _trainable(trainer), []
    compute_loss = trainer.compute_loss

    def noted(model: Any, *args: Any, **kwargs: Any) -> Any:
        result = compute_loss(model, *args, **kwargs)
        losses.append((result[0] if isinstance(result, tuple) else result).detach())
        return result

    trainer.compute_loss = noted
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    files = sorted(Path(folder, "saved").rglob("*.safetensors"))
    reloaded = _reloaded(_built(target, setting, f"{folder}/reloading", eager), f"{folder}/saved")
    with torch.no_grad():
        logits = reloaded(**ask.batch).logits.float()
        with reloaded.disable_adapter():
            base_logits = reloaded(**ask.batch).logits.float()
        ids = reloaded.generate(
            **ask.prompts, do_sample=False, max_new_tokens=_NEW_TOKENS, min_new_tokens=_NEW_TOKENS, pad_token_id=0
        )
    return Outcome(
        start=start,
        weights=_trainable(trainer),
        losses=tuple(float(loss) for loss in losses),
        file={n: t for path in files for n, t in load_file(path).items()},
        logits=logits,
        base_logits=base_logits,
        ids=ids[:, ask.prompts["input_ids"].shape[1] :],
        resumed=_resumed(target, setting, folder, eager) if resumed else {},
    )


def _built(target: Target, setting: Setting, folder: str, eager: bool, **changes: Any) -> Trainer:
    trainer: Trainer = target.build(**arguments_of(setting, folder, **changes))
    if eager:
        trainer.model.get_base_model().set_attn_implementation("eager")
    make_real(trainer)
    return trainer


def _reloaded(fresh: Trainer, saved: str) -> Any:
    from peft import PeftModel

    base = fresh.model.unload()
    if hasattr(base, "peft_config"):
        # `unload` leaves it behind, and peft warns of it
        del base.peft_config
    return PeftModel.from_pretrained(base, saved).eval()


def _resumed(target: Target, setting: Setting, folder: str, eager: bool) -> dict[str, Tensor]:
    from transformers import TrainerCallback

    half = setting.steps // 2

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= half:
                control.should_training_stop = control.should_save = True

    first = _built(target, setting, f"{folder}/interrupted", eager)
    first.add_callback(Stop())
    first.train()
    second = _built(target, setting, f"{folder}/resumed", eager)
    second.train(resume_from_checkpoint=f"{folder}/interrupted/checkpoint-{half}")
    return _trainable(second)


def _trainable(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().float().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def distances(one: Outcome, other: Outcome) -> dict[str, float]:
    """How far `one` is from `other`, by measure: relative, and infinite where it is not finite or lacks something.

    Weights and logits are relative to what the training of `other` changed of them, the rest to its own size.
    """
    found = {
        "weights": _apart(one.weights, other.weights, other.start),
        "losses": _relative(torch.tensor(one.losses), torch.tensor(other.losses)),
        "file": _apart(one.file, other.file),
    }
    if one.logits is not None and other.logits is not None:
        found["logits"] = _relative(one.logits, other.logits, other.base_logits)
    if one.ids is not None and other.ids is not None:
        same = one.ids.shape == other.ids.shape
        found["ids"] = float((one.ids != other.ids).float().mean()) if same else 1.0
    if one.resumed and other.resumed:
        found["resumed"] = _apart(one.resumed, other.resumed, other.start)
    return found


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> float:
    if one.keys() != other.keys() or any(one[n].shape != other[n].shape for n in one):
        return math.inf
    return _relative(_flat(one), _flat(other), _flat(start) if start else None)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[n].float().flatten() for n in sorted(tensors)])


def _relative(one: Tensor, other: Tensor, start: Tensor | None = None) -> float:
    if one.shape != other.shape:
        return math.inf
    size = (other if start is None else other - start).double().norm()
    distance = float((one.double() - other.double()).norm() / size.clamp(min=1e-30))
    return distance if math.isfinite(distance) else math.inf


def floor(
    target: Target, setting: Setting, ask: Asked, reference: Outcome, *, resumed: bool = False
) -> dict[str, float]:
    """The noise floor by measure: the largest distance of sound runs with another batch split or attention kernel."""
    rows, accumulated = setting.batch
    divisor = next((d for d in range(2, rows + 1) if rows % d == 0), 1)
    split = _with_batch(setting, (rows // divisor, accumulated * divisor))
    others = [train(target, split, ask), train(target, setting, ask, eager=True)]
    found = [distances(other, reference) for other in others if not other.error]
    floors = {m: max([SMALLEST_FLOOR, *(d[m] for d in found if m in d)]) for m in MEASURES}
    # losses of other micro-batches are other losses
    if others[1].error == "":
        floors["losses"] = max(SMALLEST_FLOOR, found[-1]["losses"])
    if reference.ids is not None:
        floors["ids"] = max(floors["ids"], 1 / reference.ids.numel())
    # a resumed run repeats the interrupted one to the bit, and shares its floor
    return floors | {"resumed": floors["weights"]}


def _with_batch(setting: Setting, batch: tuple[int, int]) -> Setting:
    return dataclasses.replace(setting, batch=batch)
