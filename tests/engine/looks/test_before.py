"""Looks at what there is before the first step, on real trainings: wiring, start, base, labels and prompts."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

from pytest_sftguard.engine.faults import fault_named
from pytest_sftguard.engine.faults._injected import injected
from pytest_sftguard.engine.models import sums, tiny
from pytest_sftguard.records import RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun
from tests.targets import healthy as healthy_targets

LOOKS = ("wiring", "supervision", "prompts")
SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
HOMEWORK = "homework.sft:build_trainer"


def fault(run_cell: Callable[..., JudgedRun], name: str, target: str = SUMS) -> JudgedRun:
    """A training of `target` with the fault in it."""
    made = fault_named(name)
    with injected(name, target) as path:
        config = {"steps": 8, "questions": 0, "looks": LOOKS, "training_arguments": made.arguments}
        return run_cell(path, made.precision, made.batch, **config)


@pytest.mark.parametrize(
    "name", ["b-not-zero-at-init", "prompt-not-masked", "duplicate-bos", "completion-template-not-found"]
)
def test_nothing_else_sees_a_silent_fault(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """Without the looks of this file these trainings are green."""
    run = fault(run_cell, name)
    assert {f.invariant for f in run.verdict.failures} == set(fault_named(name).reported_by)


@pytest.mark.parametrize("name", ["duplicate-bos", "prompt-not-masked", "prompt-answer-boundary-merge"])
def test_a_fault_is_seen_where_no_question_is_in_the_rows(run_cell: Callable[..., JudgedRun], name: str) -> None:
    """The homework's questions are in none of its rows: the form of the prompts tells."""
    run = fault(run_cell, name, HOMEWORK)
    assert set(fault_named(name).reported_by) - {"answers_beat_base"} <= {f.invariant for f in run.verdict.failures}


HEALTHY = (
    "dora",
    "rslora",
    "pissa",
    "orthogonal",
    "continued",
    "saved_lm_head",
    "tied_embeddings_saved",
    "adapted_embedding",
    "bias_all",
    "trainable_tokens",
    "second_adapter_active",
    "rank_pattern",
    "last_layer_alone",
    "gpt2",
    "mixtral_experts",
    "idle_experts",
    "streamed",
    "left_padded",
    "own_loss",
    "bert_classifier",
    "dynamic_rope",
    "all_parameters_to_the_optimizer",
    "one_micro_batch_without_labels",
    "stray_keys_kept",
)


@pytest.mark.parametrize("target", HEALTHY)
def test_a_healthy_target_passes(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Nothing is wrong, and no look breaks."""
    run = run_cell(f"tests.targets.healthy:{target}", looks=LOOKS)
    assert run.verdict.passed, run.verdict.findings
    assert not [look for look in run.record.looks if look.error]


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"])
@pytest.mark.parametrize("target", [SUMS, HOMEWORK])
def test_a_target_that_asks_questions_passes(run_cell: Callable[..., JudgedRun], target: str, precision: str) -> None:
    """Rows, labels, prompts and start of the two targets with a tokenizer are sound in every precision."""
    run = run_cell(target, precision=precision, questions=0, looks=LOOKS)
    assert run.verdict.passed, run.verdict.findings
    assert all(look.done for look in run.record.looks)


@pytest.mark.parametrize(
    "target",
    [SUMS, "tests.targets.healthy:dynamic_rope", "tests.targets.healthy:dropout", "tests.targets.tiny:warm_up"],
)
def test_looking_changes_nothing(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The training has the same bits with the looks and without."""
    seen, unseen = (run_cell(target, questions=0, looks=looks).record for looks in (LOOKS, ()))
    assert _training(seen) == _training(unseen)


def _training(record: RunRecord) -> Any:
    timeless = tuple(dataclasses.replace(s, seconds=None) for s in record.steps)
    return record.adapter_digest, timeless, record.base, record.round_trip


def misspelled_target(**arguments: Any) -> Any:
    """A target module that the architecture does not have, beside one that it has."""
    return healthy_targets.built(arguments, lora={"target_modules": ["q_proj", "v_projj"]})


def replaced_after_the_wrap(**arguments: Any) -> Any:
    """A layer that is put in the place of an adapted one."""

    def wrap(model: Any) -> Any:
        attention = model.base_model.model.model.layers[1].self_attn
        attention.q_proj = attention.q_proj.base_layer
        return model

    return healthy_targets.built(arguments, wrap=wrap)


def one_factor_frozen(**arguments: Any) -> Any:
    """lora_A of one layer takes no gradient."""

    def wrap(model: Any) -> Any:
        next(p for n, p in model.named_parameters() if "lora_A" in n).requires_grad_(False)
        return model

    return healthy_targets.built(arguments, wrap=wrap)


def scaling_doubled(**arguments: Any) -> Any:
    """A layer that scales by twice alpha / r."""

    def wrap(model: Any) -> Any:
        model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] *= 2
        return model

    return healthy_targets.built(arguments, wrap=wrap)


def nan_in_an_unused_row(**arguments: Any) -> Any:
    """A NaN in the embedding of an id that is in no row."""

    def prepare(base: Any) -> Any:
        base.model.embed_tokens.weight.data[0, 3] = float("nan")
        return base

    return healthy_targets.built(arguments, prepare=prepare)


def zero_row_in_use(**arguments: Any) -> Any:
    """The embedding of BOS is zero, and BOS begins every row."""

    def prepare(base: Any) -> Any:
        base.model.embed_tokens.weight.data[1] = 0
        return base

    return healthy_targets.built(arguments, prepare=prepare)


def dora_of_a_zero_row(**arguments: Any) -> Any:
    """A weight with a row of zeros, decomposed into direction and magnitude."""

    def prepare(base: Any) -> Any:
        base.model.layers[0].self_attn.o_proj.weight.data[5] = 0
        return base

    return healthy_targets.built(arguments, prepare=prepare, lora={"use_dora": True})


def layer_missing_from_the_checkpoint(**arguments: Any) -> Any:
    """A checkpoint of a model with fewer layers: the last one is drawn at random."""
    folder = f"{arguments['output_dir']}-short"
    short = LlamaConfig(**healthy_targets.SMALL | {"num_hidden_layers": 1}, tie_word_embeddings=False)
    LlamaForCausalLM(short).save_pretrained(folder)

    def prepare(base: Any) -> Any:
        return LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=2, dtype=torch.float32)

    return healthy_targets.built(arguments, prepare=prepare)


def labels_of_another_row(**arguments: Any) -> Any:
    """Every row has the labels of the one before."""

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        batch["labels"] = batch["labels"].roll(1, dims=0)
        return batch

    return healthy_targets.built(arguments, collator=collate)


def rows_truncated(**arguments: Any) -> Any:
    """Rows are truncated to twelve tokens, so that the long ones lose their end."""

    def collate(features: Any) -> Any:
        return {k: v[:, :12] for k, v in tiny.collate(features).items()}

    ids = [r["input_ids"] for r in tiny.rows(64)]
    ids = [row if len(row) > 12 and i % 3 == 0 else [*row[:5], 2] for i, row in enumerate(ids)]
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return healthy_targets.built(arguments, dataset=rows, collator=collate)


UNLISTED = {
    "misspelled_target": ("trainable_set_exact", "v_projj"),
    "replaced_after_the_wrap": ("trainable_set_exact", "layers.1.self_attn.q_proj"),
    "one_factor_frozen": ("trainable_set_exact", "lora_A"),
    "scaling_doubled": ("identity_at_init", "layers.0.mlp.up_proj .4, not 2."),
    "nan_in_an_unused_row": ("base_finite", "embed_tokens"),
    "zero_row_in_use": ("base_finite", "zero throughout: 1"),
    "dora_of_a_zero_row": ("base_finite", "layers.0.self_attn.o_proj.lora_magnitude"),
    "layer_missing_from_the_checkpoint": ("base_finite", "layers.1"),
    "labels_of_another_row": ("supervision_audit", "not their own tokens"),
    "rows_truncated": ("supervision_audit", "greatest length"),
}


@pytest.mark.parametrize("target", UNLISTED)
def test_an_unlisted_fault_is_seen(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """What is wrong before the first step is seen there, and named."""
    run = run_cell(f"{__name__}:{target}", looks=LOOKS)
    invariant, wording = UNLISTED[target]
    messages = [message(f) for f in run.verdict.failures if f.invariant == invariant]
    assert any(re.search(wording, m) for m in messages), run.verdict.failures


def seeded_toy_base(**arguments: Any) -> Any:
    """A toy base that is drawn from the run's seed as a whole."""

    def prepare(base: Any) -> Any:
        torch.manual_seed(arguments["seed"])
        for p in base.parameters():
            if p.dim() > 1:
                p.data.normal_(0, 0.02)
        return base

    return healthy_targets.built(arguments, prepare=prepare)


def head_drawn_and_saved(**arguments: Any) -> Any:
    """A head that no checkpoint has, drawn from the seed, and trained and saved with the adapter."""

    def prepare(base: Any) -> Any:
        torch.manual_seed(arguments["seed"])
        base.lm_head.weight.data.normal_(0, 0.02)
        return base

    return healthy_targets.built(arguments, prepare=prepare, lora={"modules_to_save": ["lm_head"]})


def new_rows_trained(**arguments: Any) -> Any:
    """Rows of new tokens, drawn from the seed, and trained and saved with the adapter."""

    def prepare(base: Any) -> Any:
        torch.manual_seed(arguments["seed"])
        base.model.embed_tokens.weight.data[[3, 4]] = torch.randn(2, 32)
        return base

    return healthy_targets.built(arguments, prepare=prepare, lora={"trainable_token_indices": [3, 4]})


def loaded_adapter(**arguments: Any) -> Any:
    """An adapter whose tensors come out of a file."""

    def wrap(model: Any) -> Any:
        generator = torch.Generator().manual_seed(5)
        state = get_peft_model_state_dict(model)
        drawn = {n: 0.02 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
        set_peft_model_state_dict(model, drawn)
        return model

    return healthy_targets.built(arguments, wrap=wrap)


def labels_shifted_for_an_own_loss(**arguments: Any) -> Any:
    """Labels that are shifted in the collator, for a loss of one's own that does not shift."""
    from transformers import Trainer

    class Own(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            logits = outputs.logits.float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            return (loss, outputs) if return_outputs else loss

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        batch["labels"] = batch["labels"].roll(-1, dims=1)
        batch["labels"][:, -1] = -100
        return batch

    return healthy_targets.built(arguments, trainer_class=Own, collator=collate)


@pytest.mark.parametrize(
    "target",
    [seeded_toy_base, head_drawn_and_saved, new_rows_trained, loaded_adapter, labels_shifted_for_an_own_loss],
)
def test_a_sound_oddity_passes(run_cell: Callable[..., JudgedRun], target: Callable[..., Any]) -> None:
    """What is drawn from the seed and saved, or comes out of a file, is nothing to report."""
    run = run_cell(f"{__name__}:{target.__name__}", looks=LOOKS)
    assert run.verdict.passed, run.verdict.findings


def test_the_probe_is_padded_and_eager(run_cell: Callable[..., JudgedRun]) -> None:
    """The finished models are asked with sixteen tokens or more, padding in front of a row, attention written out."""
    seen = run_cell(SUMS, questions=0, steps=2).record.round_trip.finiteness
    assert seen.tokens >= 16
    assert (seen.padded_rows, seen.attention, seen.nonfinite) == (1, "eager", 0)


def test_a_head_has_the_type_that_the_cell_asks_for(run_cell: Callable[..., JudgedRun]) -> None:
    """In a cell of bfloat16 weights a head that is trained whole is bfloat16, as it was asked for."""
    assert run_cell("tests.targets.healthy:saved_lm_head", precision="bf16-true").verdict.passed


def test_the_sums_are_known() -> None:
    """Every row of the built-in target holds one of its questions."""
    assert len(sums.rows(sums.tokenizer())) == len(sums.questions())
