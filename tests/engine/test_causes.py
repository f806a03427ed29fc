"""Causes of faults that no catalogue lists, from what a run of each leaves in its record."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.engine.building.targets import TargetError
from pytest_sftguard.engine.models import tiny
from pytest_sftguard.verdicts import JudgedRun, judge
from tests.targets.faulty import on, parameters
from tests.targets.healthy import built


def _around(owner: Any, name: str, around: Callable[..., Any]) -> None:
    setattr(owner, name, functools.partial(around, getattr(owner, name)))


def cleared_in_each_micro_batch(**arguments: Any) -> Trainer:
    """`zero_grad` at the beginning of each training_step."""
    trainer = built(arguments)

    def step(original: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        model.zero_grad()
        return original(model, *args, **kwargs)

    _around(trainer, "training_step", step)
    return trainer


class _OwnMean(Trainer):  # type: ignore[misc] # transformers types it as Any
    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """A mean over the micro-batch that knows nothing of the others."""
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


def own_mean(**arguments: Any) -> Trainer:
    """A loss of one's own that nothing divides by the number of micro-batches."""
    return built(arguments, trainer_class=_OwnMean)


def one_layer_at_rate_zero(**arguments: Any) -> Trainer:
    """Two parameter groups, one of them without a learning rate."""
    trainer = built(arguments)
    lower, upper = (
        [p for n, p in trainer.model.named_parameters() if p.requires_grad and ("layers.0" in n) is own]
        for own in (True, False)
    )
    trainer.optimizer = torch.optim.AdamW([{"params": upper, "lr": 1e-3}, {"params": lower, "lr": 0.0}])
    return trainer


def schedule_of_another_optimizer(**arguments: Any) -> Trainer:
    """A schedule that was made for an optimizer which was replaced afterwards."""
    trainer = built(arguments)
    old, trainer.optimizer = (torch.optim.AdamW(parameters(trainer), lr=1e-3) for _ in range(2))
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(old, lambda step: max(0.0, 1 - step / 6))
    return trainer


def alpha_zero(**arguments: Any) -> Trainer:
    """lora_alpha=0."""
    return built(arguments, lora={"lora_alpha": 0})


def factors_zero(**arguments: Any) -> Trainer:
    """A script that clears every factor after the wrap."""
    trainer = built(arguments)
    for factor in parameters(trainer, "lora_A"):
        factor.data.zero_()
    return trainer


def gradients_below_eps(**arguments: Any) -> Trainer:
    """A loss divided by far too much."""
    trainer = built(arguments)
    _around(trainer, "compute_loss", lambda original, *args, **kwargs: original(*args, **kwargs) * 1e-12)
    return trainer


def decay_without_the_rate(**arguments: Any) -> Trainer:
    """A weight decay of its own, which is not multiplied by the learning rate."""
    trainer = built(arguments)

    def create(original: Any, *args: Any, **kwargs: Any) -> Any:
        optimizer = original(*args, **kwargs)

        def step(original: Any, *args: Any, **kwargs: Any) -> Any:
            done = original(*args, **kwargs)
            torch._foreach_mul_([p.data for p in parameters(trainer)], 0.9)
            return done

        _around(optimizer, "step", step)
        return optimizer

    _around(trainer, "create_optimizer", create)
    return trainer


def labels_of_the_neighbour(**arguments: Any) -> Trainer:
    """A collator that gives each row the labels of another."""

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        return batch | {"labels": batch["labels"].roll(1, 0)}

    return built(arguments, collator=collate)


def tokens_changed_by_the_collator(**arguments: Any) -> Trainer:
    """A collator that overwrites the last two tokens of one row."""

    def collate(features: Any) -> Any:
        batch = tiny.collate(features)
        batch["input_ids"][0, -2:] = 7
        batch["input_ids"][0, 3:5] = 9
        return batch

    return built(arguments, collator=collate)


def nothing_saved(**arguments: Any) -> Trainer:
    """A save_model that does nothing."""
    trainer = built(arguments)
    trainer.save_model = lambda *args, **kwargs: None
    return trainer


def saved_before_training(**arguments: Any) -> Trainer:
    """A save_model that copies what was saved when the training began."""
    trainer = built(arguments)
    early = Path(arguments["output_dir"]) / "early"
    on(trainer, "on_train_begin", lambda: trainer.model.save_pretrained(early), None)
    trainer.save_model = lambda folder, *args, **kwargs: __import__("shutil").copytree(early, folder)
    return trainer


CAUSES = {
    "one_layer_at_rate_zero": "parameter_group_without_rate",
    "schedule_of_another_optimizer": "schedule_does_not_move",
    "alpha_zero": "adapter_scaled_by_zero",
    "factors_zero": "both_factors_zero",
    "gradients_below_eps": "gradients_below_eps",
    "decay_without_the_rate": "update_is_not_the_optimizers",
    "labels_of_the_neighbour": "labels_changed_on_the_way",
    "nothing_saved": "trained_adapter_not_saved",
    "saved_before_training": "saved_before_training",
}
SPLITS = {
    "cleared_in_each_micro_batch": "gradients_cleared_between_micro_batches",
    "own_mean": "loss_grows_with_micro_batches",
}


# torch warns of a schedule that is stepped without its optimizer
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("target", CAUSES)
def test_a_fault_has_its_cause(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The first cause that is named is the one that was put in."""
    run = run_cell(f"{__name__}:{target}", looks=("wiring", "supervision"))
    assert diagnose(run)[0].mechanism == CAUSES[target]


@pytest.mark.parametrize("target", SPLITS)
def test_a_fault_of_accumulation_has_its_cause(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Two splits of the same rows tell why they do not learn the same."""
    from pytest_sftguard.invariants import load_invariants

    run, other = (run_cell(f"{__name__}:{target}", batch=batch, steps=2) for batch in ((2, 4), (4, 2)))
    references = {"batch_split": other.record}
    judged = JudgedRun(run.record, judge(run.record, load_invariants(), references), references)
    assert diagnose(judged)[0].mechanism == SPLITS[target]


def test_rows_that_the_collator_changes_are_counted(run_cell: Callable[..., JudgedRun]) -> None:
    """Rows as trained on are held against those of the data set: tokens that no row has, and labels of their own."""
    changed, labels, sound = (
        run_cell(f"{__name__}:{t}", looks=("supervision",), steps=2).record.supervision
        for t in ("tokens_changed_by_the_collator", "labels_of_the_neighbour", "own_mean")
    )
    assert changed is not None
    assert labels is not None
    assert sound is not None
    assert (changed.strange_inputs or 0) > 0
    assert (labels.strange_labels or 0) > 0
    assert (sound.strange_inputs, sound.strange_labels) == (0, 0)


def wrapped_twice(**arguments: Any) -> Trainer:
    """get_peft_model on what get_peft_model returned."""
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return built(arguments, wrap=lambda model: get_peft_model(model, config))


def wrap_discarded(**arguments: Any) -> Trainer:
    """get_peft_model changes the model in place; its result is thrown away."""
    return built(arguments, wrap=lambda model: model.base_model.model)


# peft warns too, and goes on
@pytest.mark.filterwarnings("ignore:You are trying to modify a model:UserWarning")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize(
    ("target", "words"),
    [("wrapped_twice", "wrapped its model twice"), ("wrap_discarded", r"write\n? ?model = get_peft_model")],
)
def test_a_wrap_gone_wrong_is_told_in_plain_words(run_cell: Callable[..., JudgedRun], target: str, words: str) -> None:
    """The target is refused, with what to write instead, before peft raises something of its own."""
    with pytest.raises(TargetError, match=words):
        run_cell(f"{__name__}:{target}")
