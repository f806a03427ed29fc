"""Measure a training step of the app beside the pipelines that people copy; write a table of docs/performance.md.

    python -m tools.benchmarks.training_speed --model smollm2-135m --write   (ten minutes on two cores)

All train the same adapter on the same rows, 32 of them a step, each in a process of its own, and take turns after every
step. `padded` pads every row to 128 tokens, checkpoints activations and computes all logits, in micro-batches of 8;
`trl` is TRL's SFTTrainer with its defaults, but without checkpointing; `app` is the app.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainerCallback

from homework import sft
from homework.base import load_base, load_tokenizer
from homework.recipes import SEED, recipe_for
from homework.speed.allocation import keep_freed_memory
from homework.task.answers import format_answer
from homework.task.data import TRAIN_FILE, plain_prompt, read_rows
from homework.training import hold
from pytest_sftguard.engine.surroundings.isolation import isolated
from tools.benchmarks import plain_pipeline
from tools.benchmarks.pages import publish, where
from tools.benchmarks.processes import in_fresh_process

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
ROWS = 32
PEAK = 2048
"""Rows and columns of the matrices whose product is the machine's peak."""
SAID = {
    "padded": "padded to 128, checkpointed, all logits, 8x4",
    "trl": "TRL's `SFTTrainer`, 8x4",
    "app": "the app, 32x1",
}


def arguments(folder: Path, rows: int, steps: int, bf16: bool) -> dict[str, Any]:
    """Return the arguments of all trainings."""
    batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": ROWS // rows}
    quiet = {"disable_tqdm": True, "logging_steps": 1, "report_to": "none", "save_strategy": "no"}
    return {"max_steps": steps, "bf16": bf16, "use_cpu": True, "output_dir": str(folder), **batch, **quiet}


def app(model: str | None, folder: Path, steps: int, bf16: bool) -> Trainer:
    """Return the app's Trainer as its command trains; a process of its own calls keep_freed_memory too."""
    trainer = sft.build_trainer(model=model, **arguments(folder, ROWS, steps, bf16))
    if bf16:
        hold(trainer.model, torch.bfloat16)
    return trainer


def padded(model: str | None, folder: Path, steps: int, bf16: bool) -> Trainer:
    """Return the pipeline that people copy."""
    return plain_pipeline.build_trainer(model=model, **arguments(folder, 8, steps, bf16))


def with_trl(model: str | None, folder: Path, steps: int, bf16: bool) -> Trainer:
    """Return TRL's Trainer on prompts and completions, with the app's hyper-parameters."""
    recipe = recipe_for(model)
    rows = [
        {"prompt": plain_prompt(q), "completion": format_answer(a, recipe.notation)} for q, a in read_rows(TRAIN_FILE)
    ]
    optimizer = {"optim": "adamw_torch", "learning_rate": recipe.learning_rate, "adam_beta2": recipe.adam_beta2}
    same = {"max_grad_norm": 1.0, "seed": SEED, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    lora = {"r": recipe.rank, "lora_alpha": recipe.alpha, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return trl.SFTTrainer(
        model=load_base(model),
        args=trl.SFTConfig(**arguments(folder, 8, steps, bf16), **optimizer, **same),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(model),
        peft_config=peft.LoraConfig(**lora),
    )


BUILDERS: dict[str, Callable[..., Trainer]] = {"padded": padded, "trl": with_trl, "app": app}


def products(dtype: torch.dtype, seconds: float = 0.7) -> list[float]:
    """Return operations per second of large matrix products, computed one after the other for some time."""
    a, b = (torch.randn(PEAK, PEAK).to(dtype) for _ in range(2))
    # the first product makes the kernel
    a @ b
    rates, ends = [], time.perf_counter() + seconds
    while (began := time.perf_counter()) < ends:
        a @ b
        rates.append(2 * PEAK**3 / (time.perf_counter() - began))
    return rates


class Operations(TrainerCallback):
    """Counts the operations of each step, as torch counts those of products and attention."""

    def __init__(self, counter: FlopCounterMode) -> None:
        self.counter, self.totals = counter, [0]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step is over."""
        self.totals.append(self.counter.get_total_flops())


def operations(model: str | None, folder: Path, steps: int) -> list[int]:
    """Return the operations of each of the app's steps."""
    trainer = app(model, folder, steps, bf16=False)
    trainer.log = lambda *_, **__: None
    # torch does not count this in-place product
    in_place = {torch.ops.aten.addmm_: lambda _, a, b, **more: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        counted = Operations(counter)
        trainer.add_callback(counted)
        trainer.train()
    return [b - a for a, b in zip(counted.totals, counted.totals[1:], strict=False)]


@dataclass
class Seen:
    """What one training sent."""

    seconds: list[float] = field(default_factory=list)
    """Of each counted step."""
    losses: list[float] = field(default_factory=list)
    """Of each step, the warm-up included."""
    memory: int = 0
    """Peak memory of its process, bytes."""


class Turn(TrainerCallback):
    """Waits for its turn before each step, and sends how long it took."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Say that the training is ready, and wait."""
        self.pipe.send(None)
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of the step."""
        if logs and "loss" in logs:
            self.loss = float(logs["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the time of the step."""
        self.seconds = time.perf_counter() - self.began

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Send the previous step, which has been logged by now, and wait."""
        if hasattr(self, "seconds"):
            self.send()
            self._wait()

    def send(self) -> None:
        """Send seconds, loss and peak memory of the last step."""
        self.pipe.send((self.seconds, self.loss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))

    def _wait(self) -> None:
        self.pipe.recv()
        self.began = time.perf_counter()


def child(pipe: Any, pipeline: str, model: str | None, folder: Path, steps: int) -> None:
    """Run one training, in a process of its own."""
    _quiet()
    name, _, precision = pipeline.partition(" ")
    if name == "app":
        keep_freed_memory()
    trainer = BUILDERS[name](model, folder / pipeline.replace(" ", "-"), steps, precision == "bf16")
    trainer.remove_callback(PrinterCallback)
    turn = Turn(pipe)
    trainer.add_callback(turn)
    trainer.train()
    turn.send()


def measured(model: str | None, pipelines: list[str], folder: Path, steps: int, warm_up: int) -> dict[str, Seen]:
    """Return times and losses of each pipeline."""
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for pipeline in pipelines:
        pipes[pipeline], theirs = spawn.Pipe()
        spawn.Process(target=child, args=(theirs, pipeline, model, folder, steps + warm_up), daemon=True).start()
        theirs.close()
        pipes[pipeline].recv()
    found: dict[str, Seen] = {pipeline: Seen() for pipeline in pipelines}
    draw = random.Random(0)
    for step in range(1, steps + warm_up + 1):
        for pipeline in draw.sample(pipelines, len(pipelines)):
            pipes[pipeline].send(None)
            seconds, loss, found[pipeline].memory = pipes[pipeline].recv()
            found[pipeline].losses.append(loss)
            if step > warm_up:
                found[pipeline].seconds.append(seconds)
            print(f"step {step} of {pipeline}: {seconds:.2f} s, loss {loss:.5f}", flush=True)
    return found


@dataclass
class Share:
    """Steps of the app and large matrix products, in a process that has the machine to itself."""

    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    products: list[float] = field(default_factory=list)
    """Operations per second of products around each step, their median: the pace of a machine changes soon."""

    def of_peak(self, work: list[int]) -> float:
        """Return the operations of a step over those that products would have done in its time, median of all steps."""
        return statistics.median(w / s / p for w, s, p in zip(work, self.seconds, self.products, strict=True))


class BetweenProducts(TrainerCallback):
    """Times each step after the first `warm_up`, and products before and after it."""

    def __init__(self, dtype: torch.dtype, warm_up: int) -> None:
        self.dtype, self.warm_up, self.share = dtype, warm_up, Share()
        self._before: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """The step is about to begin."""
        self._before = self._before or products(self.dtype)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over."""
        seconds, after = time.perf_counter() - self._began, products(self.dtype)
        if state.global_step > self.warm_up:
            self.share.seconds.append(seconds)
            self.share.products.append(statistics.median(self._before + after))
        self._before = after


def alone(model: str | None, folder: Path, steps: int, warm_up: int, bf16: bool) -> Share:
    """Train the app as its command does, with the machine to itself."""
    _quiet()
    keep_freed_memory()
    trainer = app(model, folder, steps + warm_up, bf16)
    trainer.remove_callback(PrinterCallback)
    between = BetweenProducts(torch.bfloat16 if bf16 else torch.float32, warm_up)
    trainer.add_callback(between)
    trainer.train()
    return between.share


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(os.cpu_count() or 1)


def table(model: str | None, found: dict[str, Seen], work: list[int], shares: dict[str, Share]) -> str:
    """Return the table in Markdown, with a line on where and how."""
    lines = [
        "| | step (s) | quartiles | against the first line | loss of step 1 | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    base = statistics.median(found["padded fp32"].seconds)
    for pipeline, seen in found.items():
        name, _, precision = pipeline.partition(" ")
        low, middle, high = statistics.quantiles(seen.seconds, n=4)
        lines.append(
            f"| {SAID[name]}, {precision} | {middle:.2f} | {low:.2f} to {high:.2f} | {base / middle:.1f} x faster "
            f"| {seen.losses[0]:.5f} | {seen.memory / 2**30:.1f} GiB |"
        )
    wording = []
    for precision in ("fp32", "bf16"):
        theirs, ours = (found.get(f"{name} {precision}") for name in ("trl", "app"))
        if theirs and ours:
            ratio = statistics.median(theirs.seconds) / statistics.median(ours.seconds)
            wording.append(f"{ratio:.2f} x faster in {precision}")
    lines += [
        "",
        *([f"The app's step against TRL's: {', '.join(wording)}.", ""] if wording else []),
        f"{model or 'embedded model'}, {ROWS} rows a step, {len(work)} counted steps of each pipeline"
        f" in turns; {where()}, peft {peft.__version__}, trl {trl.__version__}.",
        "",
        "| the app alone | step (s) | operations / s | products / s | share |",
        "|---|---|---|---|---|",
    ]
    for precision, share in shares.items():
        second, rate = statistics.median(share.seconds), statistics.median(share.products) / 1e9
        low, high = (end(share.products) / 1e9 for end in (min, max))
        lines.append(
            f"| 32x1, {precision} | {second:.2f} | {statistics.fmean(work) / second / 1e9:.0f} GFLOP"
            f" | {rate:.0f} GFLOP, {low:.0f} to {high:.0f} | {share.of_peak(work):.0%} |"
        )
    lines += [
        "",
        f"Operations of a step as torch counts them: {statistics.fmean(work) / 1e9:.0f} GFLOP. Products: of two"
        f" {PEAK} x {PEAK} matrices, 0.7 s long before and after each of {len(work)} steps; the share is the median.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure on this machine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", metavar="NAME", help="as for homework.sft (default: the embedded model)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="counted steps of each pipeline (default 5)")
    parser.add_argument("--warm-up", type=int, default=1, metavar="N", help="steps before them (default 1)")
    every = [f"{name} {precision}" for precision in ("fp32", "bf16") for name in BUILDERS]
    parser.add_argument("--pipelines", nargs="+", default=every, choices=every, help="what is compared (default: all)")
    parser.add_argument("--write", action="store_true", help="put the table into docs/performance.md")
    options = parser.parse_args()
    _quiet()
    pipelines = list(dict.fromkeys(["padded fp32", *options.pipelines]))
    with isolated(), tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work = operations(options.model, folder / "operations", options.steps + options.warm_up)[options.warm_up :]
        found = measured(options.model, pipelines, folder, options.steps, options.warm_up)
        shares = {
            precision: in_fresh_process(
                alone, options.model, folder / f"alone-{precision}", options.steps, options.warm_up, bf16
            )
            for precision, bf16 in (("fp32", False), ("bf16", True))
        }
    made = table(options.model, found, work, shares)
    publish(PAGE, "training", made, write=options.write)


if __name__ == "__main__":
    main()
