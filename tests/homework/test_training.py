"""The embedded model and real training on it."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from homework import sft, trainers
from homework.base import EMBEDDED, load_base, load_tokenizer
from homework.sources import ModelError
from homework.task.data import VALID_FILE, prompt_of, read_rows
from homework.validation import completions, validate

ROOT = Path(sft.__file__).parents[1]
CPU = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "bf16": False, "use_cpu": True}


def test_the_embedded_model_is_small() -> None:
    """At most 5 million parameters and 10 MB of float32 weights."""
    import torch

    model = load_base(None)
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 10_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_recorded_sums_are_those_of_the_files() -> None:
    """`SHA256SUMS` lists weights, configuration and tokenizer as they are."""
    lines = (EMBEDDED / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    sums = {name: total for total, name in (line.split("  ") for line in lines)}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(sums)
    for name, total in sums.items():
        assert hashlib.sha256((EMBEDDED / name).read_bytes()).hexdigest() == total, name


def test_the_base_answers_nothing_in_the_asked_format() -> None:
    """Before LoRA the answer rate is at most 0.05."""
    rows = read_rows(VALID_FILE)[:100]
    assert validate(load_base(None), load_tokenizer(None), rows).answer_rate <= 0.05


def test_an_answer_does_not_depend_on_the_batch_around_it() -> None:
    """A short question alone and left-padded beside longer ones gets the same text."""
    model, tokenizer = load_base(None), load_tokenizer(None)
    prompts = [prompt_of(question, tokenizer) for question, _ in read_rows(VALID_FILE)[:12]]
    together = completions(model, tokenizer, prompts)
    assert [completions(model, tokenizer, [prompt])[0] for prompt in prompts] == together


def test_build_trainer_keeps_its_contract(tmp_path: Path) -> None:
    """A Trainer with tokenizer, adapters in float32 on a base in `dtype`, rows, and the app's defaults."""
    import torch
    from peft import PeftModel
    from transformers import Trainer

    trainer = sft.build_trainer(dtype="bfloat16", output_dir=str(tmp_path), max_steps=3, **CPU)
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer.model, PeftModel)
    trainable = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    frozen = {p.dtype for p in trainer.model.parameters() if not p.requires_grad}
    assert (trainable, frozen) == ({torch.float32}, {torch.bfloat16})
    tokenizer: Any = trainer.processing_class
    assert tokenizer.eos_token_id is not None
    data: Any = trainer.train_dataset
    assert len(data) == 1000
    args: Any = trainer.args
    assert (args.optim, args.max_grad_norm, args.max_steps) == ("adamw_torch", 1.0, 3)
    assert (args.logging_steps, args.report_to, args.save_strategy) == (10, [], "no")


def test_build_trainer_looks_at_no_hardware_when_told_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batch and precision given, the selectors are not asked."""
    monkeypatch.setattr(trainers, "query_hardware", lambda: pytest.fail("the hardware was queried"))
    arguments = {**CPU, "output_dir": str(tmp_path), "gradient_accumulation_steps": 4}
    assert sft.build_trainer(**arguments).args.logging_steps == 2


def test_build_trainer_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    """Adapters start equal for equal seeds and differ for others."""
    import torch

    def start(seed: int) -> list[Any]:
        model: Any = sft.build_trainer(seed=seed, output_dir=str(tmp_path), **CPU).model
        return [p.detach().clone() for name, p in model.named_parameters() if "lora_A" in name]

    first, again, other = start(5), start(5), start(6)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_an_unknown_training_argument_is_named(tmp_path: Path) -> None:
    """A misspelt field is a TypeError with the nearest one."""
    with pytest.raises(TypeError, match=r"max_step.*did you mean 'max_steps'"):
        sft.build_trainer(max_step=3, output_dir=str(tmp_path))


@pytest.mark.parametrize("arguments", [{"model": "./no/such/folder"}, {"dtype": "float8"}, {"dtype": "int8"}], ids=str)
def test_what_cannot_be_loaded_is_a_model_error(tmp_path: Path, arguments: dict[str, Any]) -> None:
    """An unknown dtype or folder takes one line."""
    with pytest.raises(ModelError):
        sft.build_trainer(output_dir=str(tmp_path), **CPU, **arguments)


@pytest.mark.parametrize(("per_device", "accumulation"), [(2, 4), (8, 1)])
def test_eight_steps_teach_the_format(tmp_path: Path, per_device: int, accumulation: int) -> None:
    """After eight optimizer steps of batch 8, most seeded questions are closed as a readable number."""
    batch = {"per_device_train_batch_size": per_device, "gradient_accumulation_steps": accumulation}
    trainer = sft.build_trainer(output_dir=str(tmp_path), max_steps=8, disable_tqdm=True, **{**CPU, **batch})
    trainer.train()
    rows = read_rows(VALID_FILE)[:100]
    assert validate(trainer.model, trainer.processing_class, rows, prefix=sft.answer_prefix).answer_rate >= 0.5


@pytest.mark.slow
def test_the_default_training_reaches_its_bars(tmp_path: Path) -> None:
    """`train` with no other flags: nothing readable before; at least 0.99 answered and 0.60 right after."""
    argv = [sys.executable, "-m", "homework.sft", "train", "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "note:" not in done.stdout
    scores = re.findall(r"accuracy=([0-9.]+) answer_rate=([0-9.]+)", done.stdout)
    (_, rate_before), (accuracy, rate) = scores
    assert float(rate_before) <= 0.05
    assert float(rate) >= 0.99
    assert float(accuracy) >= 0.60
