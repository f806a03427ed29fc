"""Truth: which stations of a training each mechanism of the diagnosis speaks of.

A named cause of a generated fault is right if it speaks of the station where the fault is, and its content does not
contradict what the fault does there.
"""

from __future__ import annotations

from pytest_sftguard.detection.trials import Trial
from pytest_sftguard.diagnosis import MECHANISMS

_BATCH = ("data", "collator", "labels", "mask")
_GRADIENT = ("backward", "unscale", "clip")
ANY = ("*",)
"""Operations that do not matter to a mechanism."""

ASSERTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    # wiring
    "adapter_frozen": ((), ANY),
    "adapter_partly_frozen": ((), ANY),
    "adapter_not_attached": ((), ANY),
    "adapter_not_in_optimizer": (("optimizer",), ("drop", "freeze")),
    "base_not_frozen": ((), ANY),
    "base_changed": ((), ANY),
    "adapter_perturbs_the_base": (("forward",), ANY),
    "nan_in_base_weights": ((), ANY),
    "base_not_loaded": ((), ANY),
    "base_not_reproducible": ((), ANY),
    "trainables_in_the_checkpoints_type": ((), ANY),
    "precision_not_applied": ((), ANY),
    # the course of the training
    "learning_rate_zero": (("schedule",), ("drop", "scale")),
    "schedule_runs_at_skipped_steps": ((), ANY),
    "schedule_too_fast": (("schedule",), ("scale", "drop", "noise", "shift")),
    "learning_rate_too_high": (("schedule", "optimizer"), ("scale", "shift", "noise")),
    "no_step_taken": ((), ANY),
    "nonfinite_gradient_clipped": (("backward", "unscale"), ("non-finite",)),
    "optimizer_state_poisoned": (("optimizer", "checkpoint", "clip"), ("non-finite",)),
    "nan_in_adapter": (("optimizer", "schedule", "save", "load"), ("non-finite",)),
    "weights_changed_from_outside": (("optimizer",), ANY),
    "gradients_not_cleared": (_GRADIENT, ("scale", "stale", "freeze")),
    "log_laundered": ((), ANY),
    "gradients_altered": (_GRADIENT, ANY),
    # saving
    "adapter_keys_dropped": ((), ANY),
    "adapter_file_empty": ((), ANY),
    "other_base": (("forward",), ANY),
    "adapter_file_differs": (("save", "load"), ANY),
    "scaling_wrong": (("save", "load"), ("scale",)),
    "kernel_computes_otherwise": (("forward",), ANY),
    "merge_swallowed_in_bfloat16": ((), ANY),
    "merge_rewrites_tied_embedding": ((), ANY),
    # numbers
    "eps_underflow_in_float16": ((), ANY),
    "moments_underflow_in_float16": ((), ANY),
    "updates_swallowed_in_bfloat16": ((), ANY),
    "half_trainables_under_a_scaler": ((), ANY),
    "half_precision_trainables": ((), ANY),
    "loss_scale_collapse": ((), ANY),
    "forward_overflow_in_float16": (("forward",), ("scale", "shift")),
    "backward_overflow_in_float16": (("backward", "loss"), ("scale", "shift")),
    "gradient_underflow_in_float16": (("backward", "loss"), ("scale", "drop")),
    # inference and loss
    "attention_kernel_backward_not_finite": ((), ANY),
    "loss_gradient_wrong": (("loss", "backward", "forward"), ANY),
    "rotary_frequencies_in_half_precision": ((), ANY),
    "padded_on_the_right": ((), ANY),
    "nan_taken_for_a_number": ((), ANY),
    "parser_accepts_junk": ((), ANY),
    "rows_depend_on_their_batch": (("forward", "mask"), ANY),
    "learned_something_else": (_BATCH, ANY),
    # data
    "all_labels_masked": (("labels",), ("drop",)),
    "rows_without_labels": (("labels",), ("drop", "stale", "freeze", "swap")),
    "labels_shifted_twice": (("labels",), ("shift",)),
    "prompt_supervised": (("labels",), ("shift", "stale", "freeze")),
    "duplicate_bos": (("data", "collator"), ("repeat", "shift")),
    "token_id_out_of_range": ((), ANY),
    "rows_truncated": (("data", "collator"), ("drop",)),
    "wrong_labels": (("data", "labels", "collator"), ANY),
    "prompt_tokens_differ": (("data", "collator"), ANY),
    "attention_row_fully_masked": (("mask",), ("drop", "sign", "shift", "random")),
    "packed_rows_see_each_other": (("forward",), ANY),
    "evaluation_rows_all_masked": (("labels",), ("drop",)),
    "nonfinite_batch": ((), ANY),
    # across runs
    "retry_keeps_trained_weights": ((), ANY),
    "accumulation_mean_of_means": ((), ANY),
    "loss_divided_by_unshifted_labels": (("loss",), ("scale",)),
    "replicas_average_means": ((), ANY),
    "resume_loses_scale": ((), ANY),
    "resume_loses_state": (("checkpoint",), ANY),
    "not_repeatable": ((), ANY),
}
"""Of each mechanism the stations and the operations that it speaks of."""


def is_right(mechanism: str, trial: Trial) -> bool:
    """Whether naming `mechanism` is right for the fault of `trial`; a mechanism that is not in the table is wrong."""
    stations, operations = ASSERTS.get(mechanism, ((), ANY))
    return trial.where in stations and (operations == ANY or trial.what in operations)


def unknown() -> list[str]:
    """Mechanisms of the diagnosis that the table lacks."""
    return [m.name for m in MECHANISMS if m.name not in ASSERTS]
