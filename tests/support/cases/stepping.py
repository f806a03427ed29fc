"""Cases of gradients on their way to the optimizer, and of its update."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from pytest_sftguard.records import EntropyRecord, FirstStepRecord, Names, RunRecord

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


def _offset(record: RunRecord) -> RunRecord:
    """`record` with losses that are the model's and a number."""
    steps = (dataclasses.replace(s, offsets=(True,) * len(s.micro_losses)) for s in record.steps)
    return dataclasses.replace(record, steps=tuple(steps))


def _counted(*factors: float, returned: float | None = None, **changes: Any) -> RunRecord:
    """Steps of two micro-batches whose losses are the mean over their labels times the step's factor.

    compute_loss returned the mean of each micro-batch times `returned`, by default its share of the loss.
    """
    from tests.support.canned import healthy

    micro = ((4.2, 4.0), (3.9, 3.7), (3.6, 3.5), (3.1, 2.9))
    tokens = (30, 10)
    steps, entropies = [], []
    for s, means, factor in zip(healthy(steps=len(micro)).steps, micro, factors, strict=True):
        mean = sum(n * m for n, m in zip(tokens, means, strict=True)) / sum(tokens)
        shares = tuple(factor * n * m / sum(tokens) for n, m in zip(tokens, means, strict=True))
        given = shares if returned is None else tuple(returned * m for m in means)
        loss = factor * mean if returned is None else returned * sum(means)
        steps.append(dataclasses.replace(s, loss=loss, micro_losses=given, model_losses=()))
        entropies.append(EntropyRecord(step=s.step, micro=means, tokens=tokens))
    first = FirstStepRecord(
        micro_tokens=tokens, micro_token_losses=micro[0], token_loss=4.15, labels=44, loss_dtype="float32"
    )
    first = dataclasses.replace(first, **changes)
    record = healthy(steps=len(micro))
    return dataclasses.replace(record, steps=tuple(steps), entropies=tuple(entropies[1:]), first_step=first)


def _summed() -> RunRecord:
    """A loss that is the sum over as many tokens in each micro-batch."""
    record = _counted(20, 20, 20, 20, micro_tokens=(20, 20))
    entropies = tuple(dataclasses.replace(e, tokens=(20, 20)) for e in record.entropies)
    even = [sum(e.micro) / 2 for e in (EntropyRecord(step=1, micro=(4.2, 4.0), tokens=(20, 20)), *entropies)]
    steps = tuple(dataclasses.replace(s, loss=20 * mean) for s, mean in zip(record.steps, even, strict=True))
    return dataclasses.replace(record, steps=steps, entropies=entropies)


def _by_sgd() -> RunRecord:
    """A record in which SGD leaves a tensor where it is."""
    from tests.support.canned import within

    return within(_steps(unchanged=Names.of([_B])), "optimizer", name="SGD", betas=())


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
        "multiplied-twice": (_losses(lambda x: 3 * x, first=5), "returns 3 times .* in 2 of 6 micro-batches"),
        "shifted": (_losses(lambda x: x + 0.5), "plus 0.5, in every micro-batch"),
        "shifted-later": (_losses(lambda x: x + 0.5, first=4), "plus 0.5 in 3 of 6 micro-batches"),
        "rounded": (_losses(lambda x: round(x * 16) / 16), "rounded to 7 significant bits, in 6 of 6"),
        "offset": (
            _offset(_losses(lambda x: x + 0.1 * x * x, first=5)),
            "adds numbers to the loss that the model computed in 2 of 6 micro-batches, first 1.23366",
        ),
    },
    "loss_counts_once": {
        "added-up": (
            _counted(1, 1, 1, 1, returned=1.0),
            "the loss of step 1 is 8.2: .* nothing divides them by the 2 micro-batches of the step, whose mean is 4.15",
        ),
        "divided-twice": (
            _counted(0.5, 0.5, 0.5, 0.5),
            "the loss of step 1 is 2.075, and the mean .* 4.15: it is divided by the 2 micro-batches of the step twice",
        ),
        "divided-twice-means": (_counted(1, 1, 1, 1, returned=0.25), "the loss of step 1 is 2.05, .* twice"),
        "multiplied": (
            _counted(3, 3, 3, 3),
            "the loss of each of 4 steps is 3 times the mean .*; that of step 1 is 12.45 and not 4.15",
        ),
        "negated": (_counted(-1, -1, -1, -1), "the loss of each of 4 steps is -1 times the mean"),
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
    "loss_is_the_models-library": (
        "loss_is_the_models",
        _losses(lambda x: x / 2, own=FirstStepRecord(loss_library="trl")),
        "trl's own compute_loss divides or extends the loss",
    ),
    "loss_is_the_models-few": (
        "loss_is_the_models",
        _losses(lambda x: 2 * x, first=6),
        "1 different loss cannot tell by which rule",
    ),
    "loss_is_the_models-own": (
        "loss_is_the_models",
        _losses(lambda x: x + 0.1 * x * x),
        "compute_loss computes a loss of its own beside the model's",
    ),
    "loss_counts_once-no-step": ("loss_counts_once", _healthy(steps=(), log=()), "no optimizer step was seen"),
    "loss_counts_once-no-logits": (
        "loss_counts_once",
        _counted(3, 3, 3, 3, token_loss=None),
        "the logits of the first step and its labels were not seen together",
    ),
    "loss_counts_once-library": (
        "loss_counts_once",
        _counted(2, 2, 2, 2, loss_library="transformers"),
        "transformers's own code computes the loss: 8.3 in step 1, with a mean of 4.15",
    ),
    "loss_counts_once-half": (
        "loss_counts_once",
        _counted(3, 3, 3, 3, loss_dtype="bfloat16"),
        "the loss is computed in bfloat16",
    ),
    "loss_counts_once-changed": (
        "loss_counts_once",
        dataclasses.replace(
            _counted(3, 3, 3, 3),
            steps=tuple(dataclasses.replace(s, model_losses=(1.0, 1.0)) for s in _counted(3, 3, 3, 3).steps),
        ),
        "compute_loss changes the model's own loss",
    ),
    "loss_counts_once-few": (
        "loss_counts_once",
        dataclasses.replace(_counted(3, 3, 3, 3), entropies=()),
        "the losses of 1 step tell too little",
    ),
    "loss_counts_once-own": (
        "loss_counts_once",
        _counted(3, 3.1, 3.2, 3.3),
        "the loss is no multiple of the cross-entropy",
    ),
    "loss_counts_once-sum": (
        "loss_counts_once",
        _summed(),
        "the loss is no multiple of the cross-entropy",
    ),
    "every_factor_moves-sgd": (
        "every_factor_moves",
        _by_sgd(),
        "SGD's updates are as small as the gradients",
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
    ("loss_counts_once", "rtol"): (_counted(1.05, 1.05, 1.05, 1.05), 1e-3, 1e-2),
    ("loss_counts_once", "least_factor"): (_counted(1.05, 1.05, 1.05, 1.05), 0.0, 1e-2),
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
