"""From a base, rows and training arguments to a ready Trainer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from .base import is_embedded, label_of, load_base, load_tokenizer, name_of
from .recipes import SEED, TARGET_BATCH, Recipe, recipe_for
from .selection import Hardware, SelectionError, asked_precision, query_hardware, select_batch, select_precision
from .sources import NAMES
from .task.answers import Notation
from .task.data import PadToLongest, encode_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

OUTPUT_DIR = "outputs/sft-adapter"


def build(model: str | None, dtype: str, rows: Sequence[tuple[str, float]], given: dict[str, Any]) -> Trainer:
    """Return a Trainer for `rows`; `given` are TrainingArguments, each of which overrides the app's default.

    Raises TypeError for an argument that TrainingArguments lacks, ModelError, DataError and SelectionError (each a
    ValueError) for what cannot be used.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import TrainingArguments, set_seed

    from .training import AnswerTrainer

    known = {field.name for field in fields(TrainingArguments) if field.init}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"build_trainer() got {name!r}, which is no field of TrainingArguments{hint}")
    recipe = recipe_for(model)
    settings = {**_defaults(recipe, given), **given}
    try:
        arguments = TrainingArguments(**settings)
    except ValueError as error:
        raise SelectionError(f"the Trainer refuses its arguments: {error}") from error
    tokenizer = load_tokenizer(model)
    base = load_base(model, dtype)
    dataset = _encoded(model, tuple(rows), tokenizer, recipe.notation)
    set_seed(arguments.seed)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        bias="none",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, config, autocast_adapter_dtype=True)
    # peft would put this machine's path into the adapter's configuration
    adapted.peft_config["default"].base_model_name_or_path = label_of(model)
    return AnswerTrainer(
        model=adapted,
        args=arguments,
        train_dataset=dataset,
        data_collator=PadToLongest(int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
    )


def precision_arguments(precision: str, hardware: Hardware) -> dict[str, Any]:
    """Return the TrainingArguments of a precision on this hardware."""
    arguments: dict[str, Any] = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    # tf32 needs compute capability 8.0, as bf16 does
    if hardware.device_type == "cuda" and hardware.native_bf16 and hardware.bf16_reason.startswith("compute"):
        arguments["tf32"] = True
    # without it, the Trainer refuses bf16 because there is no GPU
    if hardware.device_type == "cpu" and precision == "bf16":
        arguments["use_cpu"] = True
    return arguments


def _defaults(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    hardware = Hardware(device_type="cpu") if given.get("use_cpu") else None
    asked = given.get("per_device_train_batch_size"), given.get("gradient_accumulation_steps")
    micro_batch, accumulation = select_batch(TARGET_BATCH, *asked, hardware)
    precision: dict[str, Any] = {}
    if "fp16" not in given and "bf16" not in given:
        hardware = hardware or query_hardware()
        precision = precision_arguments(select_precision(asked_precision(), hardware).value, hardware)
    return {
        "per_device_train_batch_size": micro_batch.value,
        "gradient_accumulation_steps": accumulation.value,
        **precision,
        "output_dir": OUTPUT_DIR,
        "optim": "adamw_torch",
        "learning_rate": recipe.learning_rate,
        "adam_beta2": recipe.adam_beta2,
        "num_train_epochs": recipe.epochs,
        "max_steps": -1,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, 10 // accumulation.value),
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }


_ENCODED: dict[tuple[str, Notation, tuple[tuple[str, float], ...]], list[dict[str, list[int]]]] = {}


def _encoded(
    model: str | None, rows: tuple[tuple[str, float], ...], tokenizer: PreTrainedTokenizerBase, notation: Notation
) -> list[dict[str, list[int]]]:
    """Return rows as token ids, encoded once a process where the tokenizer of `model` cannot change meanwhile."""
    if not is_embedded(model) and model not in NAMES:
        return encode_rows(rows, tokenizer, notation)
    key = name_of(model), notation, rows
    if key not in _ENCODED:
        _ENCODED[key] = encode_rows(rows, tokenizer, notation)
    return [{name: list(ids) for name, ids in row.items()} for row in _ENCODED[key]]
