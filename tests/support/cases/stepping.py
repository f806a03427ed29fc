"""Cases of gradients on their way to the optimizer, and of its update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pytest_sftguard.records import FirstStepRecord, RunRecord

_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
_LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
_OWN = FirstStepRecord(model_loss="")
_MODELS = FirstStepRecord(model_loss="LlamaForCausalLM")


def DERIVED(record: RunRecord) -> dict[str, Any]:  # noqa: N802 - one of the tables
    """What is seen of gradients and update in each step."""
    seen: dict[str, Any] = {"parting": 3e-7, "parting_tensor": _B, "departure": 0.0, "departure_tensor": _B}
    seen |= {"factor_mismatch": 2e-8, "factor_layer": _LAYER}
    return {"steps": tuple(dataclasses.replace(s, model_losses=s.micro_losses, **seen) for s in record.steps)}


def _healthy(**changes: Any) -> RunRecord:
    from tests.support.canned import healthy

    return dataclasses.replace(healthy(), **changes)


def _step(number: int, **changes: Any) -> RunRecord:
    from tests.support.canned import with_step

    return with_step(_healthy(first_step=_MODELS), number, **changes)


def _steps(first_step: FirstStepRecord = _MODELS, **changes: Any) -> RunRecord:
    from tests.support.canned import with_steps

    return with_steps(_healthy(first_step=first_step), **changes)


def _losses(change: Callable[[float], float], *, first: int = 1, own: FirstStepRecord = _OWN) -> RunRecord:
    """Six steps whose losses are those of the model, changed from the step `first` on."""
    from tests.support.canned import healthy

    model = (4.217891, 4.103457, 3.918273, 3.777651, 3.512349, 3.391847)
    record = healthy(steps=len(model))
    steps = []
    for s, loss in zip(record.steps, model, strict=True):
        count = len(s.micro_losses)
        returned = change(loss) if s.step >= first else loss
        steps.append(dataclasses.replace(s, micro_losses=(returned,) * count, model_losses=(loss,) * count))
    return dataclasses.replace(record, steps=tuple(steps), first_step=own)


def _half(record: RunRecord) -> RunRecord:
    from tests.support.canned import B, with_tensor

    return with_tensor(record, B, dtype="bfloat16")


FAILURES: dict[str, dict[str, tuple[Any, ...]]] = {
    "factor_gradients_agree": {
        "apart": (
            _step(2, factor_mismatch=3e-3),
            r"lora_A and lora_B of .*q_proj are not those of one product .* at step 2: they differ by 0.003 .* float32",
        ),
        "nan": (_step(2, factor_mismatch=math.nan), "they differ by nan"),
        "bfloat16": (
            dataclasses.replace(_step(2, factor_mismatch=0.02), autocast_dtype="bfloat16"),
            "rounding in bfloat16 by 0.016 at most",
        ),
        "float16": (
            dataclasses.replace(_step(2, factor_mismatch=3e-3), autocast_dtype="float16"),
            "rounding in float16 by 0.002 at most",
        ),
        "tf32": (dataclasses.replace(_step(2, factor_mismatch=3e-3), tf32=True), "rounding in tf32 by 0.002 at most"),
        "own-loss-once": (
            dataclasses.replace(_step(3, factor_mismatch=0.1), first_step=_OWN),
            "at step 3: they differ by 0.1",
        ),
        "always": (_steps(factor_mismatch=0.1), "at step 1: they differ by 0.1"),
    },
    "loss_is_the_models": {
        "multiplied": (_losses(lambda x: x / 4), "compute_loss returns 0.25 times the loss .*, in every micro-batch"),
        "negated": (_losses(lambda x: -x), "compute_loss returns -1 times the loss"),
        "multiplied-later": (
            _losses(lambda x: 3 * x, first=3),
            "returns 3 times the loss that the model computed in 4 of 6 micro-batches",
        ),
        "shifted": (_losses(lambda x: x + 0.5), "plus 0.5, in every micro-batch"),
        "shifted-later": (_losses(lambda x: x + 0.5, first=4), "plus 0.5 in 3 of 6 micro-batches"),
        "rounded": (_losses(lambda x: round(x * 16) / 16), "rounded to 7 significant bits, in 6 of 6"),
    },
    "update_repeats": {
        "other": (
            _step(3, departure=0.02),
            "the update of .*lora_B.* at step 3 is not the one that AdamW makes .* differs by 0.02 of the largest",
        ),
        "nan": (_step(3, departure=math.nan), "differs by nan"),
        "nothing-due": (_step(1, departure=math.inf), "differs by inf"),
    },
    "norm_honest": {
        "parted": (
            _step(2, parting=2e-3),
            "the gradient of .*lora_B.* at step 2 is not the one .* left: they differ by 0.002 of its norm",
        ),
        "parted-nan": (_step(2, parting=math.nan), "they differ by nan"),
    },
}
MAY_BE_MISSING: dict[str, tuple[Any, ...]] = {
    "factor_gradients_agree-no-step": (
        "factor_gradients_agree",
        _healthy(steps=(), log=()),
        "no optimizer step was seen",
    ),
    "factor_gradients_agree-no-pair": (
        "factor_gradients_agree",
        _steps(factor_mismatch=None, factor_layer=""),
        "no layer has two factors that train",
    ),
    "factor_gradients_agree-bounded": (
        "factor_gradients_agree",
        _step(2, factor_mismatch=0.1, factors_bounded=True),
        "hooks clip the gradients of single tensors",
    ),
    "factor_gradients_agree-penalty": (
        "factor_gradients_agree",
        _steps(first_step=_OWN, factor_mismatch=0.1),
        "seems to depend on the factors by themselves",
    ),
    "loss_is_the_models-no-step": ("loss_is_the_models", _healthy(steps=(), log=()), "no optimizer step was seen"),
    "loss_is_the_models-other": (
        "loss_is_the_models",
        _steps(model_losses=()),
        "the loss is not that of one forward pass",
    ),
    "loss_is_the_models-few": (
        "loss_is_the_models",
        _losses(lambda x: 2 * x, first=5),
        "2 different losses tell too little",
    ),
    "loss_is_the_models-own": (
        "loss_is_the_models",
        _losses(lambda x: x + 0.1 * x * x),
        "compute_loss computes a loss of its own beside the model's",
    ),
    "update_repeats-no-step": ("update_repeats", _healthy(steps=(), log=()), "no optimizer step was seen"),
    "update_repeats-never": (
        "update_repeats",
        _steps(departure=None, departure_tensor=""),
        "no step was repeated: AdamW does not treat each element by itself",
    ),
}
THRESHOLDS: dict[tuple[str, str], Any] = {
    ("factor_gradients_agree", "max_share"): (_step(2, factor_mismatch=2e-3), 1e-3, 1e-3),
    ("factor_gradients_agree", "max_share_float16"): (
        dataclasses.replace(_step(2, factor_mismatch=2e-2), autocast_dtype="float16"),
        1e-2,
        1e-2,
    ),
    ("factor_gradients_agree", "max_share_bfloat16"): (
        dataclasses.replace(_step(2, factor_mismatch=0.2), autocast_dtype="bfloat16"),
        0.1,
        0.1,
    ),
    ("loss_is_the_models", "rtol"): (_losses(lambda x: 1.01 * x), 1e-3, 0.1),
    ("loss_is_the_models", "half_rtol"): (
        _losses(lambda x: 1.25 * x, own=FirstStepRecord(loss_dtype="bfloat16")),
        0.05,
        1.0,
    ),
    ("update_repeats", "max_share"): (_step(2, departure=2e-2), 1e-2, 1e-2),
    ("norm_honest", "max_parting"): (_step(2, parting=2e-4), 1e-4, 1e-4),
    ("norm_honest", "half_max_parting"): (_half(_step(2, parting=0.2)), 0.1, 0.1),
}
OPTIONAL = {
    "steps[].model_losses[]": "a loss need not be that of the model's own output",
    "steps[].parting": "what the optimizer received is not seen of every loop",
    "steps[].factor_mismatch": "asked in some steps, of layers that have two factors",
    "steps[].departure": "some steps are repeated, of optimizers that can be",
}
