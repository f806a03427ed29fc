"""Greedy generation against the model's own scores: what changes scores, tokens or places is seen, what may is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

TARGET = "tests.targets.ends"
SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
SEEN = (
    ("scores_negated_in_part", 8),
    ("answers_of_the_row_above", 8),
    ("scores_negated_in_part", 0),
    ("answers_of_the_row_above", 0),
    ("scores_rounded", 0),
    ("cache_shifted", 0),
)
"""Targets, and the number of questions that they are asked."""
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
}


def looked(run_cell: Callable[..., JudgedRun], target: str, **config: object) -> JudgedRun:
    """A run of `target` with the looks at generation."""
    return run_cell(target, **{"looks": ("following", "continuing"), "steps": 30, "questions": 8} | config)


def wrong(run: JudgedRun) -> list[str]:
    """What the invariant fails for."""
    return [message(f) for f in run.verdict.of("generation_follows_logits") if f.outcome is Outcome.FAILED]


@pytest.mark.parametrize(("name", "questions"), SEEN)
def test_answers_that_are_not_the_models_are_seen(
    run_cell: Callable[..., JudgedRun], name: str, questions: int
) -> None:
    """With questions, and with rows that are continued."""
    run = looked(run_cell, f"{TARGET}:{name}", questions=questions)
    assert "generated tokens had not the best score" in wrong(run)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16-true", "fp16-mixed"])
@pytest.mark.parametrize("name", ["scores_scaled", "penalised"])
def test_what_may_change_scores_is_passed(run_cell: Callable[..., JudgedRun], name: str, precision: str) -> None:
    """A scale changes no order; settings of the generation_config are applied to the scores."""
    run = looked(run_cell, f"{TARGET}:{name}", precision=precision)
    assert wrong(run) == []
    assert run.record.following is not None
    assert run.record.following.tokens


def test_another_search_is_not_judged(run_cell: Callable[..., JudgedRun]) -> None:
    """The setting is named."""
    [finding] = looked(run_cell, f"{TARGET}:with_beams", steps=2).verdict.of("generation_follows_logits")
    assert "num_beams" in message(finding)
    assert not finding.required


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("questions", [8, 0])
def test_any_architecture_follows_its_scores(
    run_cell: Callable[..., JudgedRun], tmp_path: Path, architecture: str, questions: int
) -> None:
    """Padded prompts, absolute places, windows, experts and recurrent states."""
    settings = (TINY if architecture != "gpt2" else {"vocab_size": 64, "eos_token_id": 2}) | ARCHITECTURES[architecture]
    set_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings)).save_pretrained(tmp_path)
    run = looked(run_cell, SUMS, model=str(tmp_path), steps=2, questions=questions)
    assert wrong(run) == []
    assert run.record.following is not None, run.record.looks
    assert [look.error for look in run.record.looks] == ["", ""]


@pytest.mark.parametrize("target", ["dora", "named_adapter", "lora_bias", "idle_experts"])
def test_any_adapter_follows_its_scores(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Rows are continued where no question can be asked."""
    run = looked(run_cell, f"tests.targets.healthy:{target}", steps=2, questions=0)
    assert wrong(run) == []
    assert run.record.following is not None, run.record.looks


def test_the_looks_change_nothing(run_cell: Callable[..., JudgedRun]) -> None:
    """The trained adapter and the answers are the same with and without them."""
    looks = ((), ("following", "continuing"))
    plain, seen = (looked(run_cell, SUMS, looks=names, steps=3).record for names in looks)
    assert plain.adapter_digest == seen.adapter_digest
    assert plain.answers == seen.answers
