"""Checkpoints are read once per process, and no cell leaves a trace in the next."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from homework import sft
from pytest_sftguard.engine import runner, stages
from pytest_sftguard.engine.building.bases import Bases
from pytest_sftguard.matrix import Cell, RunConfig

SMALL = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
)
HERE = "tests.engine.building.test_bases"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint on disk."""
    torch.manual_seed(0)
    LlamaForCausalLM(SMALL).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(bases: Bases, folder: Path, **arguments: Any) -> Any:
    """A model of the checkpoint, loaded like a target does."""
    with bases.shared():
        return AutoModelForCausalLM.from_pretrained(folder, **arguments)


def same(a: Any, b: Any) -> bool:
    """Whether two models have the same tensors to the bit."""
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and x.dtype == y.dtype and torch.equal(x, y) for (n, x), (m, y) in pairs)


def test_the_second_model_is_not_read(folder: Path) -> None:
    """It equals what transformers would have read: bits, ties, `requires_grad`, mode and configuration."""
    bases, plain = Bases(), AutoModelForCausalLM.from_pretrained(folder)
    first, second = load(bases, folder), load(bases, folder)
    assert bases.reused == 1
    for model in (first, second):
        assert same(model, plain)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in plain.parameters()]
        assert (model.training, model.config.to_dict()) == (plain.training, plain.config.to_dict())
    assert first.config is not second.config
    assert PreTrainedModel.__dict__["from_pretrained"].__func__.__module__.startswith("transformers")


def test_what_one_model_writes_no_other_sees(folder: Path) -> None:
    """Neither existing models nor later ones see it."""
    bases, plain = Bases(), AutoModelForCausalLM.from_pretrained(folder)
    models = [load(bases, folder) for _ in range(3)]
    for i, model in enumerate(models):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(i)
        assert all(not same(model, other) for other in models[i + 1 :])
        assert same(load(bases, folder), plain)


def test_what_is_said_of_the_loading_is_said_again(folder: Path) -> None:
    """Each caller gets its own copy of the report."""
    bases = Bases()
    reports = [load(bases, folder, output_loading_info=True)[1] for _ in range(2)]
    assert bases.reused == 1
    assert reports[0] == reports[1]
    assert reports[0] is not reports[1]


def test_another_type_is_another_model(folder: Path) -> None:
    """A checkpoint is kept once for each requested type."""
    bases = Bases()
    types = [load(bases, folder, dtype=t).dtype for t in (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16)]
    assert types == [torch.float32, torch.bfloat16] * 2
    assert bases.reused == 2


def test_a_checkpoint_that_changed_is_read(folder: Path) -> None:
    """The modification of its files shows it."""
    bases = Bases()
    first = load(bases, folder)
    torch.manual_seed(1)
    LlamaForCausalLM(SMALL).save_pretrained(folder)
    assert not same(load(bases, folder), first)
    assert bases.reused == 0


def test_a_checkpoint_that_lacks_tensors_is_read_each_time(folder: Path) -> None:
    """The absent tensors are random, so that each load may differ."""
    bases, config = Bases(), LlamaConfig(**{**SMALL.to_dict(), "num_hidden_layers": 3})
    for _ in range(2):
        load(bases, folder, config=config)
    assert bases.reused == 0


def test_a_loading_that_somebody_wrapped_is_another_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in `from_pretrained` affects only the loads while it is injected."""
    bases, original = Bases(), PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def broken(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        with torch.no_grad():
            (loaded[0] if isinstance(loaded, tuple) else loaded).lm_head.weight.zero_()
        return loaded

    sound = load(bases, folder)
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "from_pretrained", classmethod(broken))
        assert not load(bases, folder).lm_head.weight.any()
    assert same(load(bases, folder), sound)


def writes_its_base(**arguments: Any) -> Any:
    """The app's target with noise on its base before the training."""
    trainer = sft.build_trainer(**arguments)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return trainer


def test_records_are_the_same_in_any_order() -> None:
    """Bit for bit, whichever cells ran before, including cells that write to their base."""
    cells = [Cell("fp32", 2, 1), Cell("bf16-mixed", 2, 1), Cell("fp32", 4, 1)]
    configs = [
        RunConfig(cell=cell, target=target, steps=2, device="cpu", questions=2)
        for cell in cells
        for target in ("homework.sft:build_trainer", f"{HERE}:writes_its_base")
    ]
    before = stages._bases.reused
    orders = (configs, configs[::-1])
    seen = [{(c.target, str(c.cell)): timeless(runner.run(c)) for c in order} for order in orders]
    assert seen[0] == seen[1]
    assert stages._bases.reused > before
    assert {r.error for records in seen for r in records.values()} == {None}


def timeless(record: Any) -> Any:
    """A record without the times, which differ in every run."""
    steps = tuple(dataclasses.replace(s, seconds=None) for s in record.steps)
    looks = tuple(dataclasses.replace(look, seconds=None) for look in record.looks)
    return dataclasses.replace(record, seconds=None, steps=steps, looks=looks, device=None)
