"""Logs as trainings leave them: the public shapes of `trainer_state.json`, and series with a failure in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NAN = math.nan


def state(history: Sequence[Mapping[str, Any]], **changes: Any) -> dict[str, Any]:
    """A `trainer_state.json` with this history, with the fields that transformers 4.46 writes."""
    last = history[-1].get("step", 0) if history else 0
    return {
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": 1.0,
        "eval_steps": 500,
        "global_step": last,
        "is_hyper_param_search": False,
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "log_history": list(history),
        "logging_steps": 1,
        "max_steps": last,
        "num_input_tokens_seen": 0,
        "num_train_epochs": 1,
        "save_steps": 500,
        "stateful_callbacks": {"TrainerControl": {"args": {"should_save": True}, "attributes": {}}},
        "total_flos": 1.2e14,
        "train_batch_size": 4,
        "trial_name": None,
        "trial_params": None,
        **changes,
    }


def course(
    steps: int,
    loss: Callable[[int], float | None] = lambda i: round(0.6 + 2 / (1 + 0.05 * i) + 0.04 * math.sin(5 * i), 4),
    norm: Callable[[int], float | None] = lambda i: 1.1 + 0.3 * math.cos(3 * i),
    rate: Callable[[int], float] = lambda i: 2e-4 / (1 + 0.1 * i),
    each: int = 1,
    **more: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """The entries of a training that logs each so many steps; a number that is None is not logged."""
    entries = []
    for i in range(1, steps + 1):
        values = {"loss": loss(i), "grad_norm": norm(i), "learning_rate": rate(i)}
        values |= {name.replace("__", "/"): of(i) for name, of in more.items()}
        shown = {name: value for name, value in values.items() if value is not None}
        entries.append({"epoch": round(i / steps, 2), **shown, "step": i * each})
    return entries


def summary(step: int, **changes: Any) -> dict[str, Any]:
    """The entry that ends a training."""
    return {
        "epoch": 1.0,
        "step": step,
        "total_flos": 1.2e14,
        "train_loss": 1.9,
        "train_runtime": 12.3,
        "train_samples_per_second": 20.1,
        "train_steps_per_second": 2.5,
        **changes,
    }


def evaluation(step: int, **changes: Any) -> dict[str, Any]:
    """The entry of an evaluation."""
    return {
        "epoch": round(step / 40, 2),
        "eval_loss": 2.5 - 0.0312345678 * step,
        "eval_runtime": 1.2,
        "eval_samples_per_second": 80.0,
        "eval_steps_per_second": 10.0,
        "step": step,
        **changes,
    }


def dpo(i: int) -> dict[str, Any]:
    """What TRL's DPO logs beside the loss."""
    names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logits/chosen",
    )
    return {name: round(0.01 * i * (n + 1), 4) for n, name in enumerate(names)}


def grpo(i: int, alike: float = 0.0) -> dict[str, Any]:
    """What TRL's GRPO logs beside the loss, which is 0 on average; `alike` of the groups have equal rewards."""
    return {
        "num_tokens": 1000.0 * i,
        "completions/mean_length": 100.0 + i,
        "completions/min_terminated_length": 20.0,
        "rewards/accuracy_reward/mean": 0.5,
        "rewards/accuracy_reward/std": 0.5,
        "reward": 0.5,
        "reward_std": 0.3 * (1 - alike),
        "frac_reward_zero_std": alike,
        "entropy": 0.4,
        "kl": 0.0,
    }


def beside(history: Sequence[Mapping[str, Any]], more: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Entries with further numbers in each."""
    return [{**entry, **more(i)} for i, entry in enumerate(history, 1)]


def skipping(skipped: Sequence[int], steps: int = 40, *, before: bool = True) -> list[dict[str, Any]]:
    """A float16 training whose loss scaler skips some steps: the schedule stands still in them.

    transformers logs the rate `before` the step, versions before 4.47 the one after it.
    """
    taken = [sum(j not in skipped for j in range(1, i + 1 - before)) for i in range(1, steps + 1)]
    return course(
        steps,
        norm=lambda i: (NAN, math.inf)[i % 2] if i in skipped else 1.1 + 0.3 * math.cos(3 * i),
        rate=lambda i: 2e-4 * (1 - taken[i - 1] / steps),
    )


SHAPES: dict[str, dict[str, Any]] = {
    "transformers 4.30, without grad_norm": state(course(40, norm=lambda i: None), stateful_callbacks=None),
    "transformers 4.46": state([*course(40), summary(40)]),
    "TRL's GRPO, groups without an advantage": state(
        [
            {**e, **grpo(i, float(i % 4 == 0)), "grad_norm": 0.0 if i % 4 == 0 else 0.2}
            for i, e in enumerate(course(40, lambda i: 0.0), 1)
        ]
    ),
    "transformers 5": state(
        course(40, loss=lambda i: 2.6171875 - 0.0512345678 * i + 0.04 * math.sin(5 * i)),
        best_global_step=None,
        eval_steps=500.0,
    ),
    "with evaluations": state(
        [e for i, t in enumerate(course(40), 1) for e in ([t, evaluation(i)] if not i % 8 else [t])]
    ),
    "with the best model loaded at the end": state(
        [*course(40), evaluation(30), evaluation(40, eval_loss=1.2), summary(40), evaluation(40, eval_loss=1.1)]
    ),
    "TRL's DPO": state(beside(course(40, loss=lambda i: 0.6931 if i < 8 else round(0.72 - 0.004 * i, 4)), dpo)),
    "TRL's GRPO": state(beside(course(40, loss=lambda i: 0.0 if i % 3 else -0.0012), grpo)),
    "TRL's GRPO, every loss 0": state(beside(course(40, loss=lambda i: 0.0), grpo)),
    "a reward model": state(
        course(40, loss=lambda i: round(0.69 - 0.01 * i, 4), accuracy=lambda i: 0.6, margin=lambda i: 0.1 * i)
    ),
    "logged each epoch": state([e for i, t in enumerate(course(5, each=125), 1) for e in (t, evaluation(i * 125))]),
    "tokens counted": state(course(40, num_input_tokens_seen=lambda i: 4096 * i, mean_token_accuracy=lambda i: 0.5)),
    "linear warm-up": state(course(40, rate=lambda i: 2e-5 * (i - 1) if i < 11 else 2e-4 * (40 - i) / 30)),
    "a resumed training": state([*course(20), *course(40)[18:]]),
    "one batch per step, noisy": state(course(40, loss=lambda i: round(1.7 + 1.2 * math.sin(7.3 * i * i), 4))),
    "learned to 0.000": state(
        course(40, loss=lambda i: round(2.5 * 0.6**i, 4), norm=lambda i: 1.5 * 0.6**i, num_tokens=lambda i: 10 * i)
    ),
    "learned to 0.000 between two entries": state(
        course(4, loss=lambda i: 1.8 if i == 1 else 0.0, norm=lambda i: 2.0 if i == 1 else 3e-4, each=50)
    ),
    "float16 on a T4": state(skipping([1, 2, 3])),
    "float16, transformers 4.40": state(skipping([1, 2, 3], before=False)),
    "float16, fused AdamW": state(course(40, norm=lambda i: NAN if i < 4 else 1.0 + i)),
    "float16, a long search": state(skipping([1, 2, 3, 4, 5, 6])),
    "float16, a later skip": state(skipping([1, 2, 23])),
    "float16, each tenth step logged": state(
        course(20, norm=lambda i: NAN if i == 1 else 1.0 + 0.1 * math.sin(i), each=10), logging_steps=10
    ),
    "float16, learned, then a skip": state(
        course(20, loss=lambda i: round(0.6**i, 2), norm=lambda i: math.inf if i == 16 else 0.6**i, rate=lambda i: 1e-4)
    ),
}
"""Trainings without a failure."""

BROKEN: dict[str, tuple[list[dict[str, Any]], str]] = {
    "laundered": (course(20, lambda i: 2.593 if i == 1 else 0.0, lambda i: 2.98 if i == 1 else NAN), "laundered_loss"),
    "laundered, infinite": (
        course(20, lambda i: 2.5 if i < 9 else 0.0, lambda i: 2.9 if i < 9 else math.inf),
        "laundered_loss",
    ),
    "laundered, windows": (
        course(6, lambda i: 2.5 if i < 3 else 0.7 if i == 3 else 0.0, lambda i: 1.0 if i < 3 else NAN, each=10),
        "laundered_loss",
    ),
    "laundered from the start": (course(8, lambda i: 0.0, lambda i: NAN), "laundered_loss"),
    "laundered once": (
        course(20, lambda i: 0.0 if i == 9 else 2.5 - 0.1 * i, lambda i: NAN if i == 9 else 1 + 0.1 * i),
        "laundered_loss",
    ),
    "without the filter": (
        course(20, lambda i: 2.5 if i < 9 else NAN, lambda i: 1.0 + i if i < 9 else NAN),
        "loss_not_finite",
    ),
    "an infinite loss once": (course(20, lambda i: math.inf if i == 9 else 2.5 - 0.01 * i), "loss_not_finite"),
    "masked labels": (course(20, lambda i: 0.0, lambda i: 0.0), "no_labels"),
    "masked labels later": (
        course(20, lambda i: 2.4 if i < 9 else 0.0, lambda i: 1.0 + i if i < 9 else 0.0),
        "no_labels",
    ),
    "dies at step 15": (
        course(30, lambda i: round(2.5 - 0.04 * min(i, 15), 4), lambda i: 1.0 + 0.01 * i if i < 15 else 0.0),
        "dead_adapter",
    ),
    "dies at step 15, batches differ": (course(30, norm=lambda i: 1.0 + 0.01 * i if i < 15 else 0.0), "dead_adapter"),
    "dies but for rounding": (course(30, norm=lambda i: 1.0 + 0.01 * i if i < 15 else 3e-11), "dead_adapter"),
    "dead from the start": (course(8, norm=lambda i: 0.0), "dead_adapter"),
    "every step is skipped": (course(30, norm=lambda i: math.inf), "norms_stay_non_finite"),
    "skipped from step 20 on": (course(30, norm=lambda i: NAN if i > 19 else 1.0 + i), "norms_stay_non_finite"),
    "weights that no step moves": (course(12, lambda i: 2.3141592, lambda i: 1.2345678), "frozen_loss"),
    "a learning rate of zero": (
        course(12, lambda i: 2.5 + 0.04 * math.sin(5 * i), rate=lambda i: 0.0),
        "learning_rate_zero",
    ),
    "a learning rate that is NaN": (course(12, rate=lambda i: NAN if i > 6 else 1e-4), "learning_rate_unusable"),
    "a plateau at ln(49152)": (
        course(30, lambda i: 2.5 - 0.05 * i if i < 12 else 10.8 + 0.05 * math.sin(9 * i)),
        "diverged",
    ),
    "from scratch to ln(64) again": (
        course(30, lambda i: 4.16 - 0.2 * i if i < 12 else 4.17 + 0.02 * math.sin(9 * i)),
        "diverged",
    ),
    "far higher": (course(40, lambda i: 1.0 + 0.15 * i), "loss_rises"),
    "an evaluation that is NaN": ([*course(20), evaluation(20, eval_loss=NAN)], "evaluation_not_finite"),
    "a metric that is NaN": ([*course(20), evaluation(20, eval_pearson=NAN)], "evaluation_not_finite"),
    "evaluations that agree": (
        [*course(40), *(evaluation(i, eval_loss=2.31415926) for i in (10, 20, 30, 40))],
        "frozen_evaluation",
    ),
    "a mean that is NaN": ([*course(20), summary(20, train_loss=NAN)], "train_loss"),
    "a mean that is 0": ([summary(20, train_loss=0.0)], "train_loss"),
    "no step": ([summary(0, train_loss=0.0)], "no_steps"),
    "0.0 without a norm": (course(20, lambda i: 2.5 if i < 9 else 0.0, lambda i: None), "zero_loss"),
    "0.0 beside norms as before": (course(20, lambda i: 2.5 if i < 9 else 0.0), "zero_loss_with_gradient"),
    "GRPO without an advantage": (
        beside(course(20, lambda i: 0.0, lambda i: 0.0), lambda i: grpo(i, 1.0)),
        "no_advantage",
    ),
    "GRPO that dies at step 15": (
        beside(course(30, lambda i: 0.0, lambda i: 0.1 + 0.01 * i if i < 15 else 0.0), grpo),
        "dead_adapter",
    ),
    "GRPO with NaN norms": (
        beside(course(20, lambda i: 0.0, lambda i: NAN if i > 9 else 1.0 + i), grpo),
        "norms_stay_non_finite",
    ),
}
"""Entries with a failure in them, and the statement that must alarm."""

OPEN: dict[str, tuple[dict[str, Any], str]] = {
    "nothing was logged": (state([], logging_steps=500, max_steps=8), "no_evidence"),
    "the summary alone": (state([summary(8)], logging_steps=500), "no_evidence"),
    "evaluations alone": (state([evaluation(8)]), "no_evidence"),
    "NaN in the last entry": (
        state(course(20, norm=lambda i: NAN if i == 20 else 1.0 + i)),
        "norm_not_finite_at_the_end",
    ),
    "one batch without labels": (
        state(course(20, lambda i: 0.0 if i == 9 else 2.5, lambda i: 0.0 if i == 9 else 1.0 + i)),
        "no_labels",
    ),
    "one loss far above all": (state(course(40, lambda i: 19.0 if i == 12 else 2.5 - 0.01 * i)), "loss_spikes"),
    "a quarter of all steps skipped": (state(skipping(range(4, 81, 4), 81)), "too_many_skips"),
    "null": (state([*course(20, norm=lambda i: 1.0 + i), {"loss": 1.5, "grad_norm": None, "step": 21}]), "null"),
    "a statistic of an empty group": (
        state(beside(course(20), lambda i: {"rewards/chosen": NAN})),
        "metric_not_finite",
    ),
    "one loss that vanishes": (state(course(20, lambda i: 2.5 if i != 9 else 0.0)), "zero_loss_with_gradient"),
    "a loss of 0 from the start": (state(course(20, lambda i: 0.0)), "zero_loss_with_gradient"),
    "learned until no error is left": (
        state(course(40, lambda i: round(2.5 * 0.6**i, 4), lambda i: 0.6**i if i < 30 else 0.0)),
        "saturated_loss",
    ),
    "the schedule ends early": (
        state(course(40, rate=lambda i: max(0.0, 2e-4 * (1 - i / 20)))),
        "schedule_ended_early",
    ),
    "ever higher": (state(course(40, lambda i: 2.0 + 0.05 * i)), "loss_rises"),
    "norms after clipping": (state(course(40, norm=lambda i: 1.0)), "clipped_norms"),
    "a rate of zero, and the loss falls": (state(course(40, rate=lambda i: 0.0)), "learning_rate_zero"),
}
"""Logs of which more than one reading is possible: what must be stated without an alarm."""
