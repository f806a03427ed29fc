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
    # what changes the output of one factor parts the gradients too
    "factor_gradient_altered": (("backward", "forward"), ANY),
    "loss_changed_on_the_way": (("loss",), ANY),
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
    "mask_hides_tokens": (("mask",), ANY),
    "padding_supervised": (("labels", "mask"), ANY),
    "rows_truncated": (("data", "collator"), ("drop",)),
    "wrong_labels": (("data", "labels", "collator"), ANY),
    "prompt_tokens_differ": (("data", "collator"), ANY),
    "attention_row_fully_masked": (("mask",), ("drop", "sign", "shift", "random")),
    "packed_rows_see_each_other": (("forward",), ANY),
    "evaluation_rows_all_masked": (("labels",), ("drop",)),
    "nonfinite_batch": (("forward", "loss"), ("non-finite",)),
    # across runs
    "retry_keeps_trained_weights": ((), ANY),
    "accumulation_mean_of_means": ((), ANY),
    "loss_divided_by_unshifted_labels": (("loss",), ("scale",)),
    "replicas_average_means": ((), ANY),
    "resume_loses_scale": ((), ANY),
    "checkpoint_changes_state": (("checkpoint",), ANY),
    "resume_loses_state": (("checkpoint",), ANY),
    "not_repeatable": ((), ANY),
    # the stations that evidence isolates
    "other_adapter_trained": ((), ANY),
    "both_factors_zero": ((), ANY),
    "fresh_head_not_saved": ((), ANY),
    "labels_misplaced": (("labels",), ("shift",)),
    "end_token_not_supervised": (("data", "labels"), ANY),
    "state_runs_on_across_packs": ((), ANY),
    "padding_attended": (("mask",), ANY),
    "positions_count_padding": (("mask",), ANY),
    "labels_are_not_the_rows_tokens": (("labels", "collator", "data"), ANY),
    "rows_changed_on_the_way": (("collator", "mask"), ANY),
    "labels_changed_on_the_way": (("labels",), ANY),
    "defective_rows_in_the_data_set": (("data",), ANY),
    "batch_built_otherwise": (("mask", "collator"), ANY),
    "learning_rate_not_finite": (("schedule",), ("non-finite",)),
    "parameter_group_without_rate": ((), ANY),
    "schedule_too_slow": (("schedule",), ("scale", "drop", "noise", "shift")),
    "schedule_does_not_move": (("schedule",), ("freeze", "stale")),
    "gradients_below_eps": (("backward", "unscale", "clip", "loss"), ("scale", "drop")),
    "clipped_before_unscaling": (("unscale",), ("scale",)),
    "clipping_left_out": (("clip",), ANY),
    "clipped_at_another_norm": (("clip",), ANY),
    "logged_norm_altered": ((), ANY),
    "norm_is_not_the_gradients": (("unscale", "clip", "backward"), ANY),
    "logged_loss_altered": ((), ANY),
    "loss_does_not_reach_the_adapter": (("loss", "backward"), ANY),
    "adapted_layer_never_called": (("forward",), ("drop",)),
    "gradient_does_not_reach_a_part": (("backward", "forward"), ("drop", "scale")),
    "backward_not_finite": (("backward",), ("non-finite",)),
    "update_not_finite": (("optimizer",), ("non-finite",)),
    "step_leaves_a_part_unmoved": (("optimizer",), ANY),
    "elements_never_move": (("backward", "unscale", "clip", "optimizer"), ANY),
    "optimizer_leaves_out_steps": (("optimizer",), ANY),
    "update_is_not_the_optimizers": (("optimizer",), ANY),
    "rate_set_beside_the_schedule": (("schedule",), ANY),
    "trained_adapter_not_saved": (("save",), ("drop", "stale")),
    "adapter_file_incomplete": (("save",), ("drop",)),
    "saved_before_training": (("save",), ("drop",)),
    "reload_differs_from_the_file": (("load",), ANY),
    "adapter_scaled_by_zero": ((), ANY),
    "reloaded_model_computes_otherwise": (("forward", "load"), ANY),
    "merging_changes_the_model": (("forward",), ANY),
    "merged_model_not_saved_whole": (("forward",), ANY),
    "disabled_adapter_leaves_something": (("forward",), ANY),
    "attention_kernel_forward_not_finite": ((), ANY),
    "checkpointing_drops_gradients": ((), ANY),
    "loss_has_no_graph": ((), ANY),
    "evaluation_is_random": (("forward",), ("noise",)),
    "prompts_padded_without_mask": ((), ANY),
    "parser_raises": ((), ANY),
    "forward_not_finite": (("forward",), ("non-finite",)),
    "loss_not_finite": (("loss",), ("non-finite",)),
    "attention_kernels_disagree": ((), ANY),
    "training_path_computes_otherwise": (("forward", "loss"), ANY),
    "answers_depend_on_their_batch": (("generate",), ANY),
    "library_leaves_loss_undivided": ((), ANY),
    "loss_grows_with_micro_batches": (("loss",), ANY),
    "loss_divided_twice": (("loss",), ("scale",)),
    "gradients_cleared_between_micro_batches": ((), ANY),
    "replicas_train_apart": ((), ANY),
    "resume_sees_other_rows": ((), ANY),
    "rows_come_in_another_order": ((), ANY),
    "accumulated_gradient_wrong": (("backward", "loss"), ANY),
    "forward_depends_on_the_batch_split": (("forward", "mask", "collator"), ANY),
    "optimizer_stepped_beside_the_loop": (("optimizer",), ANY),
    "resume_restores_something_else": (("checkpoint",), ANY),
}
"""Of each mechanism the stations and the operations that it speaks of."""


def is_right(mechanism: str, trial: Trial) -> bool:
    """Whether naming `mechanism` is right for the fault of `trial`; a mechanism that is not in the table is wrong."""
    stations, operations = ASSERTS.get(mechanism, ((), ANY))
    return trial.where in stations and (operations == ANY or trial.what in operations)


def unknown() -> list[str]:
    """Mechanisms of the diagnosis that the table lacks."""
    return [m.name for m in MECHANISMS if m.name not in ASSERTS]
