"""Cases of what is watched throughout the training: direction, loss, rows, dropout, layers, and a base that stays."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from pytest_sftguard.matrix import Cell
from pytest_sftguard.records import (
    BaseDuringRecord,
    BatchesRecord,
    DefectRecord,
    FirstStepRecord,
    LookRecord,
    Names,
    RandomnessRecord,
    ReachRecord,
    RunRecord,
)

_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
_LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def FIELDS(cell: Cell, names: list[str]) -> dict[str, Any]:  # noqa: N802 - a table that needs the cell
    """What a healthy record holds of it."""
    return {
        "batches": BatchesRecord(
            rows=(cell.per_device_train_batch_size,) * 4,
            loader_rows=cell.per_device_train_batch_size,
            dataset_rows=64,
            compared_rows=4 * cell.per_device_train_batch_size,
        ),
        "randomness": RandomnessRecord(
            evaluating=False, adapter_dropout=0.1, adapter_dropouts=2, drawing=4, compared=4
        ),
        "base_during": BaseDuringRecord(tensors=12, steps=(1, 4)),
        "reach": ReachRecord(layers=2),
    }


def DERIVED(record: RunRecord) -> dict[str, Any]:  # noqa: N802 - one of the tables
    """The direction of the first step that moved."""
    moved = next((s.step for s in record.steps if s.changed), None)
    steps = tuple(
        dataclasses.replace(s, update_cosine=-0.4, uphill_cosine=-0.3, uphill_tensor=_B) if s.step == moved else s
        for s in record.steps
    )
    return {"steps": steps}


def _healthy(**changes: Any) -> RunRecord:
    from tests.support.canned import healthy

    return healthy(**changes)


def _with(part: str, **changes: Any) -> RunRecord:
    record = _healthy()
    return dataclasses.replace(record, **{part: dataclasses.replace(getattr(record, part), **changes)})


def _unlooked(look: str, **wording: str) -> RunRecord:
    record = _healthy()
    looks = tuple(x if x.name != look else LookRecord(name=look, **wording) for x in record.looks)
    return dataclasses.replace(record, looks=looks, **{look: None})


def _first(**changes: Any) -> RunRecord:
    from tests.support.canned import with_step

    return with_step(_healthy(), 1, **changes)


def _losses(*losses: float, precision: str = "fp32", tokens: int = 6, **first: Any) -> RunRecord:
    """A record whose steps have these losses, each of them that of a micro-batch."""
    from tests.support.canned import healthy

    record = healthy(Cell(precision, 2, 1), steps=len(losses))
    steps = zip(record.steps, losses, strict=True)
    made = tuple(dataclasses.replace(s, micro_losses=(x,), loss=x, supervised_tokens=tokens) for s, x in steps)
    return dataclasses.replace(record, steps=made, first_step=FirstStepRecord(**first) if first else None)


def _of_their_own(record: RunRecord) -> RunRecord:
    """`record` of a model that returns no loss."""
    return dataclasses.replace(record, steps=tuple(dataclasses.replace(s, model_losses=()) for s in record.steps))


def _no_gradient(**reach: Any) -> RunRecord:
    """A record in which no factor of the layer ever has a gradient."""
    from tests.support.canned import A, B, with_steps

    record = with_steps(_healthy(), zero_gradients=Names.of([A, B]), idle=Names.of([A, B]))
    return dataclasses.replace(record, reach=ReachRecord(layers=2, unreached=Names.of([_LAYER]), **reach))


def _two_epochs() -> RunRecord:
    return dataclasses.replace(_with("batches", rows=(2, 1, 1, 1)), micro_batches_per_epoch=2)


_BFLOAT16 = (4.1875, 4.21875, 4.28125, 4.3125)
_FLOAT16 = (4.18359375, 4.22265625, 4.21484375)
_SUMS = tuple(x / 6 for x in (25.125, 25.375, 25.625))

FAILURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "update_descends": {
        "uphill": (_first(update_cosine=0.4), "the first update of the weights follows .*: their cosine is 0.4"),
        "nan": (_first(update_cosine=math.nan), "their cosine is nan"),
        "one-tensor": (_first(uphill_cosine=0.8), "the first update of .*lora_B.* follows its gradient .* is 0.8"),
        "tensor-nan": (_first(uphill_cosine=math.nan), "follows its gradient"),
        "tensor-not-seen": (_first(uphill_cosine=None), "follows its gradient"),
    },
    "loss_in_float32": {
        "bfloat16": (_losses(*_BFLOAT16), "all 4 distinct losses .* are numbers of bfloat16, as 4.1875"),
        "float16": (_losses(*_FLOAT16), "all 3 distinct losses .* are numbers of float16"),
        "with-zeros": (_losses(*_BFLOAT16, 0.0), "numbers of bfloat16"),
        "sums": (_losses(*_SUMS), "multiplied by the tokens of their step, are numbers of bfloat16"),
        "one-loss": (_losses(4.1875, loss_dtype="bfloat16"), "all 1 distinct loss .* bfloat16"),
        "own-in-half-weights": (
            _losses(*_BFLOAT16, precision="bf16-true", loss_dtype="float32"),
            "numbers of bfloat16",
        ),
    },
    "rows_not_repeated": {
        "twice": (
            _with("batches", repeated_rows=16, times=2, allowed=1, step=3),
            "16 rows came more often .* the first one 2 times, and the data set has it 1 time",
        ),
    },
    "randomness_alive": {
        "evaluating": (
            _with("randomness", evaluating=True, adapter_off=Names(2, ("a", "b"))),
            "trains in evaluation mode, which turns off its dropout of 0.1",
        ),
        "attention-alone": (
            _with("randomness", evaluating=True, adapter_dropout=0.0, adapter_dropouts=0, base_dropout=0.2),
            "turns off its dropout of 0.2",
        ),
        "off": (
            _with("randomness", adapter_off=Names(2, ("a", "b"))),
            "2 of 2 dropout layers of the adapter dropped nothing in training, though 0.1 is asked for: a and 1 more",
        ),
        "repeated": (
            _with("randomness", repeated_step=3, repeats_step=1),
            "step 3 began with the random state of step 1",
        ),
        "same-step": (_with("randomness", repeated_step=1, repeats_step=1), "step 1 began with .* of step 1"),
    },
    "base_bit_frozen": {
        "restored": (
            _with("base_during", changed=Names.of(["inv_freq"]), step=1),
            r"1 of 12 base tensors differed inside train\(\), before step 1, and were restored .*: inv_freq",
        ),
    },
    "adapter_reached": {
        "unreached": (
            _no_gradient(),
            "no token passed through 1 of 2 adapted layers in any of 4 steps, .*: .*q_proj$",
        ),
    },
    "supervision_audit": {
        "padding": (
            _with("supervision", trained_defects=(DefectRecord(name="padding_supervised", rows=2, step=1),)),
            "2 of 16 rows as trained on supervised padding",
        ),
        "hidden": (
            _with("supervision", trained_defects=(DefectRecord(name="hidden_tokens", rows=3, step=2),)),
            "3 of 16 rows as trained on had tokens that the attention mask hides",
        ),
    },
}
NOT_EVALUATED: dict[str, dict[str, tuple[Any, ...]]] = {
    "loss_in_float32": {
        "no-loss": (dataclasses.replace(_healthy(), steps=(), log=()), "no optimizer step was seen"),
    },
    "base_bit_frozen": {
        "lost-during": (_unlooked("base_during"), "`base_during` left nothing to judge by"),
    },
    "rows_not_repeated": {
        "lost": (_unlooked("batches"), "left nothing to judge by"),
    },
    "cell_is_real": {
        "lost": (_unlooked("batches"), "left nothing to judge by"),
        "no-step": (dataclasses.replace(_healthy(), steps=(), log=()), "no optimizer step was seen"),
        "loader": (
            _with("batches", rows=(1,) * 4, loader_rows=1),
            "2 x 1 did not happen: the data loader makes micro-batches of 1 row",
        ),
        "small-data-set": (
            _with("batches", rows=(1,) * 4, dataset_rows=1),
            "no micro-batch had more than 1 row, and the data set has 1",
        ),
        "fewer": (_with("batches", rows=(1,) * 4), "no micro-batch had more than 1 row"),
        "more": (_with("batches", rows=(3,) * 4), "micro-batches had up to 3 rows"),
        "short": (_two_epochs(), "3 of 4 micro-batches had fewer than 2 rows"),
        "accumulated": (
            dataclasses.replace(_healthy(), gradient_accumulation_steps=4),
            "no step had more than 1 micro-batch",
        ),
    },
    "randomness_alive": {
        "lost": (_unlooked("randomness"), "left nothing to judge by"),
    },
    "adapter_reached": {
        "lost": (_unlooked("reach"), "left nothing to judge by"),
        "no-step": (dataclasses.replace(_healthy(), steps=(), log=()), "no optimizer step was seen"),
    },
}
MAY_BE_MISSING: dict[str, tuple[Any, ...]] = {
    "update_descends-nothing-moved": ("update_descends", _first(update_cosine=None), "no step moved a tensor"),
    "update_descends-carried": (
        "update_descends",
        _first(update_cosine=None, update_uncompared="it is resumed"),
        "was not compared with its gradient: it is resumed",
    ),
    "loss_in_float32-two-losses": ("loss_in_float32", _losses(4.1875, 4.25), "2 distinct losses tell too little"),
    "loss_in_float32-zeros": ("loss_in_float32", _losses(0.0, 0.0), "0 distinct losses tell too little"),
    "loss_in_float32-library": (
        "loss_in_float32",
        _losses(*_BFLOAT16, precision="bf16-true", loss_dtype="bfloat16", loss_class="BertForX"),
        "transformers' BertForX computes them in the type of its logits",
    ),
    "loss_in_float32-trl": (
        "loss_in_float32",
        _of_their_own(_losses(*_BFLOAT16, precision="bf16-true", loss_dtype="bfloat16", loss_library="trl")),
        "trl computes them in the type of its logits",
    ),
    "loss_in_float32-sums-of-the-library": (
        "loss_in_float32",
        _losses(*_SUMS, precision="bf16-true", loss_dtype="float32", loss_class="ViTForX"),
        "transformers' ViTForX computes them in the type of its logits",
    ),
    "loss_in_float32-not-known": (
        "loss_in_float32",
        _losses(*_BFLOAT16, precision="bf16-true"),
        "it was not seen who computed them",
    ),
    "rows_not_repeated-uncounted": (
        "rows_not_repeated",
        _with("batches", compared_rows=0, uncounted="no ids"),
        "rows were not counted: no ids",
    ),
    "rows_not_repeated-none": (
        "rows_not_repeated",
        _with("batches", compared_rows=0),
        "rows were not counted: there were none",
    ),
    "trainable_set_exact-no-adapter": (
        "trainable_set_exact",
        _with("wiring", without_adapter=True, modules=0),
        "which of its own tensors train is the target's choice",
    ),
    "evidence_complete-stopped": (
        "evidence_complete",
        dataclasses.replace(_healthy(steps=3), max_steps=8, stopped=True),
        "early stopping ended the training after 3 of 8 optimizer steps",
    ),
    "base_bit_frozen-all-of-it-trains": (
        "base_bit_frozen",
        dataclasses.replace(_with("base", tensors=0), adapter_type=""),
        "every tensor of the model trains, and none is frozen",
    ),
    "base_finite-all-of-it-trains": (
        "base_finite",
        dataclasses.replace(_with("foundation", tensors=0), adapter_type=""),
        "there is no base",
    ),
    "cell_is_real-not-known": (
        "cell_is_real",
        _with("batches", rows=(), loader_rows=None),
        "neither the inputs nor the data loader tell",
    ),
    "cell_is_real-packed": (
        "cell_is_real",
        _with("batches", rows=(1,) * 4, loader_rows=None, packed=True),
        "several sequences share a row",
    ),
    "randomness_alive-not-seen": (
        "randomness_alive",
        _with("randomness", evaluating=None, compared=0),
        "no forward pass of the training was seen",
    ),
    "randomness_alive-not-drawn": (
        "randomness_alive",
        _with("randomness", drawing=0),
        "the training draws no random numbers",
    ),
    "adapter_reached-dropped": (
        "adapter_reached",
        _no_gradient(dropped_layers=True),
        "in a model that leaves out layers at random",
    ),
}
THRESHOLDS: dict[tuple[str, str], Any] = {
    ("update_descends", "max_cosine"): (_first(update_cosine=0.3), 0.2, 0.1),
    ("loss_in_float32", "min_losses"): (_losses(*_BFLOAT16), 4, 1),
    ("randomness_alive", "max_off_fraction"): (_with("randomness", adapter_off=Names(1, ("a",))), 0.4, 0.1),
}
OPTIONAL = {
    "steps[].update_cosine": "None in all steps but the first that moved, and where momentum was brought along",
    "batches.rows[]": "the number of rows is one for all micro-batches but the last of an epoch",
    "randomness.evaluating": "None where the training calls a part of the model alone",
    "batches.loader_rows": "not every data loader tells",
    "batches.dataset_rows": "a stream has no length",
    "base_during.steps[]": "a run of one step is looked at once",
}
