"""The fast training gives the numbers of the plain one on the same rows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen3Config,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from homework import sft
from homework.speed.fused import rotary
from homework.speed.packing import bucket_padding, can_pack
from homework.task.data import IGNORED, PadToLongest
from homework.training import AnswerTrainer, hold
from tools.benchmarks import plain_pipeline

CPU = {"bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True}


def batch(rows: int, times: int = 1) -> dict[str, int]:
    """Return the training arguments of `times` micro-batches of `rows`."""
    return {"per_device_train_batch_size": rows, "gradient_accumulation_steps": times}


class Steps(TrainerCallback):
    """Keeps factors and gradients of each optimizer step; begins each step `at` the factors of another training.

    Adam divides by gradients, and so makes much of their last digits: without this, each training would soon be at
    other weights.
    """

    def __init__(self, at: Steps | None = None) -> None:
        self.at = at
        self.factors: list[dict[str, Tensor]] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_step_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        """Nothing of the step is computed yet."""
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if self.at is not None:
            for name, factor in self.at.factors[len(self.factors)].items():
                learning[name].data.copy_(factor)
        self.factors.append({n: p.detach().clone() for n, p in learning.items()})

    def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
        """All gradients are there, and not clipped."""
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trained(
    folder: Path, rows: int, times: int, like: Steps | None = None, bucketed: bool = False
) -> tuple[Any, Steps]:
    """Train three steps of the app, `like` those of another training; without one, of the plain pipeline."""
    given = {"max_steps": 3, "logging_steps": 1, "max_grad_norm": 0.0, "output_dir": str(folder), **CPU}
    trainer: Any = (plain_pipeline if like is None else sft).build_trainer(**batch(rows, times), **given)
    if bucketed:
        trainer._bucketed = True
    steps = Steps(like)
    trainer.add_callback(steps)
    trainer.train()
    return trainer, steps


@pytest.mark.parametrize(
    ("rows", "times", "bucketed"), [(8, 1, False), (2, 4, False), (32, 1, False), (3, 2, False), (3, 2, True)]
)
def test_each_step_is_that_of_the_plain_pipeline(rows: int, times: int, bucketed: bool, tmp_path: Path) -> None:
    """The same rows, padded to 128, checkpointed, all logits, peft's own layers: 1e-5 relative in float32.

    Also with the padding that fills buckets in other precisions.
    """
    plain, steps = trained(tmp_path, rows, times)
    ours, short = trained(tmp_path, rows, times, like=steps, bucketed=bucketed)
    assert ours._packs
    assert ours._rotaries
    losses = [[line["loss"] for line in t.state.log_history if "loss" in line] for t in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(short.gradients) == len(steps.gradients) == 3
    for a, b in zip(short.gradients, steps.gradients, strict=True):
        assert a.keys() == b.keys()
        off = {name: (a[name] - b[name]).norm() for name in b}
        assert torch.stack(list(off.values())).norm() <= 1e-5 * torch.stack([g.norm() for g in b.values()]).norm()
        # where queries and keys cancel, rounding weighs more: 1.03e-5 was seen
        for name, distance in off.items():
            assert distance <= 3e-5 * b[name].norm(), name


@pytest.mark.parametrize("bf16", [True, False])
def test_a_training_takes_the_fused_paths(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer rotates queries and keys by the fused path; below float32, tokens and labels fill buckets."""
    trainer = sft.build_trainer(max_steps=2, output_dir=str(tmp_path), **batch(12), **{**CPU, "bf16": bf16})
    rotated: list[int] = []
    apply = rotary._Rotate.apply
    monkeypatch.setattr(rotary._Rotate, "apply", lambda x, *angles: (rotated.append(x.shape[-2]), apply(x, *angles))[1])
    model: Any = trainer.model
    asked: list[int] = []
    model.get_base_model().get_output_embeddings().register_forward_hook(
        lambda module, given, logits: asked.append(logits.shape[-2])
    )
    labels: list[int] = []
    model.register_forward_hook(lambda module, given, output: labels.append(output.logits.shape[-2]))
    collate = trainer.data_collator
    counted: list[int] = []

    def collated(rows: Any) -> Any:
        inputs = collate(rows)
        counted.append(int((inputs["labels"][:, 1:] != IGNORED).sum()))
        return inputs

    trainer.data_collator = collated
    trainer.train()
    # hooks on the model find one row of logits for each label
    assert labels == counted[:2]
    assert len(rotated) == 2 * 2 * model.config.num_hidden_layers
    sizes = {*rotated, *asked}
    assert len(asked) == 2
    assert any(bucket_padding(size) for size in sizes) is not bf16


@pytest.mark.parametrize("switch", ["argument", "model"])
def test_checkpointed_layers_are_trained_on_padded_rows(switch: str, tmp_path: Path) -> None:
    """By argument or by the model's switch: their second forward pass comes after the rows are forgotten."""
    by_argument = switch == "argument"
    trainer: Any = sft.build_trainer(output_dir=str(tmp_path), gradient_checkpointing=by_argument, **batch(4), **CPU)
    model = trainer.model.train()
    if switch == "model":
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    given, following, _ = trainer._forward_inputs(model, rows)
    assert given["input_ids"].shape == following.shape == rows["input_ids"].shape


def test_an_evaluation_gets_every_logit(tmp_path: Path) -> None:
    """Only the training skips logits."""
    trainer = sft.build_trainer(output_dir=str(tmp_path), **batch(2), **CPU)
    rows = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, dict(rows), return_outputs=True)
    assert outputs.logits.shape[:2] == rows["input_ids"].shape
    trainer.model.train()
    assert trainer.compute_loss(trainer.model, dict(rows)).item() == pytest.approx(loss.item(), rel=1e-5)


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": (LlamaConfig(**SMALL, num_key_value_heads=2), True),
    "qwen3": (Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8), True),
    "gpt2": (GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), True),
    "mistral-window": (MistralConfig(**SMALL, num_key_value_heads=2, sliding_window=4), False),
    "gemma2-cap": (Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8), False),
    "mamba": (MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4), False),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_only_a_model_whose_tokens_interact_in_attention_alone_is_unpadded(family: str) -> None:
    """A trial on a batch decides, and leaves the model as it was."""
    config, packs = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    before, training = model.config._attn_implementation, model.training
    ids, mask = torch.randint(1, 64, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:] = mask[2, 3:] = 0
    assert can_pack(model, {"input_ids": ids, "attention_mask": mask}) is packs
    assert (model.config._attn_implementation, model.training) == (before, training)


LOSSES = {
    "llama": LlamaConfig(**SMALL, num_key_value_heads=2),
    "gemma2: logits are capped": Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, final_logit_softcapping=3.0),
    "granite: logits are divided": GraniteConfig(**SMALL, num_key_value_heads=2, logits_scaling=7.0),
    "mixtral: the router has a loss": MixtralConfig(
        **SMALL, num_key_value_heads=2, num_local_experts=3, output_router_logits=True, router_aux_loss_coef=0.5
    ),
    "gpt2: the head is the embedding": GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0
    ),
}


@pytest.mark.parametrize("family", LOSSES)
@pytest.mark.parametrize("adapted", ["for its task", "for none", ""])
@pytest.mark.parametrize("bf16", [True, False])
def test_the_loss_is_the_models_own(family: str, adapted: str, bf16: bool, tmp_path: Path) -> None:
    """Whatever a model does to its logits, with and without adapters, alone and as a share of a step; no hook stays."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LOSSES[family])
    if adapted:
        task = "CAUSAL_LM" if "its" in adapted else None
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type=task))
    rows = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED, *ids[1:]]}
        for ids in ([5, 6, 7, 8], [9, 10, 11], [12, 13, 14, 15, 16, 17])
    ]
    arguments, collate = TrainingArguments(output_dir=str(tmp_path), **{**CPU, "bf16": bf16}), PadToLongest(0)
    given: dict[str, Any] = {"args": arguments, "train_dataset": rows, "data_collator": collate}
    plain, ours = Trainer(model=copy.deepcopy(model), **given), AnswerTrainer(model=model, **given)
    for trainer in (ours, plain):
        trainer.model_wrapped = trainer.accelerator.prepare_model(trainer.model.train())
    inputs = collate(rows)
    for share in (None, torch.tensor(25)):
        losses = [t.compute_loss(t.model_wrapped, dict(inputs), num_items_in_batch=share) for t in (ours, plain)]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-2 if bf16 else 1e-5)
    hooks = [[(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in t.model.modules()] for t in (ours, plain)]
    assert hooks[0] == hooks[1]


def test_held_matrices_give_the_same_bits_under_autocast(tmp_path: Path) -> None:
    """Casting once is casting at each use; the embedding that shares its matrix with the head keeps its precision."""
    trainer = sft.build_trainer(output_dir=str(tmp_path), **batch(2), **CPU)
    model: Any = trainer.model
    ids = torch.tensor([trainer.train_dataset[0]["input_ids"]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(input_ids=ids).logits
        hold(model, torch.bfloat16)
        after = model(input_ids=ids).logits
    assert torch.equal(before, after)
    inner = model.get_base_model()
    assert inner.get_input_embeddings().weight.dtype == torch.float32
    assert inner.get_output_embeddings().weight.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
