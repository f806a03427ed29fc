"""Faults after the training: the adapter's file, its base, the merged model."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from pytest_sftguard.engine.faults._training import wrap
from pytest_sftguard.engine.faults.fault import Fault


class AdapterKeysDroppedOnLoad(Fault):
    """The names in the adapter's file do not fit the model, and the base answers under the adapter's name."""

    source = "https://github.com/huggingface/peft/issues/2566"
    injects = "strips one `model.` from every key of the saved adapter_model.safetensors"
    reported_by = ("round_trip", "effect_size")
    mechanism = "adapter_keys_dropped"

    def alter(self, trainer: Trainer) -> None:
        _rewrite(trainer, lambda tensors: {name.replace("model.", "", 1): t for name, t in tensors.items()})


class SavedAdapterEmpty(Fault):
    """The adapter's file holds nothing: the state was filtered twice, or sharded away."""

    source = "https://github.com/huggingface/transformers/issues/24551"
    injects = "saves an empty dict in the place of the adapter's tensors"
    reported_by = ("round_trip", "effect_size")
    mechanism = "adapter_file_empty"

    def alter(self, trainer: Trainer) -> None:
        _rewrite(trainer, lambda tensors: {})


class AdapterOnWrongBase(Fault):
    """The adapter is loaded onto weights that it was not trained on: nobody fixed their seed, or their revision."""

    source = "https://github.com/unslothai/unsloth-zoo/pull/810"
    injects = "builds a base with other weights each time, of the same names and shapes"
    reported_by = ("round_trip",)
    mechanism = "other_base"

    def __init__(self) -> None:
        self.seeds = itertools.count()

    def alter(self, trainer: Trainer) -> None:
        generator = torch.Generator().manual_seed(next(self.seeds))
        for parameter in trainer.model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point() and parameter.dim() > 1:
                noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.data.add_(noise * parameter.data.std())


class AlphaScalingWrong(Fault):
    """The adapter is used at another scale than the one it was trained at."""

    source = "https://github.com/Blaizzy/mlx-vlm/issues/841"
    injects = "multiplies lora_alpha by 4 in the saved adapter_config.json"
    reported_by = ("round_trip",)
    mechanism = "scaling_wrong"

    def alter(self, trainer: Trainer) -> None:
        def louder(path: Path) -> None:
            settings = json.loads(path.read_text(encoding="utf-8"))
            path.write_text(json.dumps(settings | {"lora_alpha": 4 * settings["lora_alpha"]}), encoding="utf-8")

        _after_saving(trainer, "adapter_config.json", louder)


class TiedLmHeadMerge(Fault):
    """LoRA is on the head of a tied model, and merging it rewrites the input embedding too."""

    source = "https://github.com/huggingface/peft/issues/2018"
    injects = "ties embedding and head, and puts the adapter on q_proj and lm_head"
    reported_by = ("merge_equivalence",)
    mechanism = "merge_rewrites_tied_embedding"
    tensor = "embed"
    steps = 10

    def alter(self, trainer: Trainer) -> None:
        _tie(trainer, target_modules=["q_proj", "lm_head"])


class MergeDrift(Fault):
    """Merging into half-precision weights rounds a small adapter away."""

    source = "https://github.com/huggingface/peft/issues/1388"
    injects = "sets learning_rate=1e-5 with a bfloat16 base: most of what the adapter adds is below half an ulp"
    reported_by = ("merge_equivalence",)
    mechanism = "merge_swallowed_in_bfloat16"
    precision = "bf16-true"
    steps = 30
    arguments: ClassVar = {"learning_rate": 1e-5}


class TiedModulesToSaveLost(Fault):
    """Control: older versions overwrote the trained head of a tied model with its embedding when they loaded it."""

    source = "https://github.com/huggingface/transformers/issues/45127"
    injects = "ties embedding and head, and trains the whole head: healthy now"

    def alter(self, trainer: Trainer) -> None:
        _tie(trainer, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])


def _after_saving(trainer: Trainer, name: str, change: Callable[[Path], None]) -> None:
    """Call `change` with each file called `name` in the folder that `trainer` has saved its model to."""

    def saved(save_model: Any, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        save_model(output_dir, *args, **kwargs)
        for path in Path(output_dir or trainer.args.output_dir).rglob(name):
            change(path)

    wrap(trainer, "save_model", saved)


def _rewrite(trainer: Trainer, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Save `change(tensors)` in the place of the adapter's tensors."""
    _after_saving(trainer, "adapter_model.safetensors", lambda path: save_file(change(load_file(path)), path))


def _tie(trainer: Trainer, **lora: Any) -> None:
    """Tie the base's head to its embedding, and put another adapter on it, configured by `lora`."""
    base: Any = trainer.model.unload()
    if hasattr(base, "peft_config"):
        del base.peft_config
    base.config.tie_word_embeddings = True
    base.get_output_embeddings().weight = base.get_input_embeddings().weight
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **lora))
    trainer.model = trainer.model_wrapped = adapted
