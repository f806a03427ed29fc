"""Causes on the way out: the adapter's file, its base, the merged model."""

from __future__ import annotations

import math

from pytest_sftguard.diagnosis.case import Case, Clue, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import effect_size, identity_at_init, merge_equivalence, round_trip
from pytest_sftguard.records import RoundTripRecord


def _keys_dropped(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.tensors or not trip.unexpected or not trip.missing:
        return []
    clues = [decisive(f"the file has {trip.unexpected} in the place of {trip.missing}")]
    if trip.max_logit_effect == 0:
        clues.append(sign("after loading, the base answers under the adapter's name"))
    return clues


def _file_empty(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or trip.unexpected:
        return []
    if trip.tensors == 0:
        return [decisive(f"the file holds no tensor at all ({trip.file_bytes} bytes)")]
    # zeros in each file tensor, where the training left none
    moved = any(t.final_norm for t in case.record.adapter)
    if trip.zero.count == trip.tensors and moved and trip.differing:
        return [
            decisive(f"all {trip.tensors} tensors of the file are zeros, and the trained ones are not"),
            sign("after loading, the base answers under the adapter's name"),
        ]
    return []


def _file_incomplete(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.missing or trip.unexpected or trip.tensors == 0:
        return []
    return [decisive(f"the file lacks {trip.missing}, and holds {trip.tensors} tensors")]


def _saved_before_training(case: Case) -> list[Clue]:
    """A file with the adapter's start: every factor that begins at zero is zero in it, and no other is."""
    trip = case.record.round_trip
    second = {t.name for t in case.record.adapter if t.initial_norm == 0}
    moved = [t for t in case.record.adapter if t.initial_norm == 0 and t.final_norm]
    if trip is None or not moved or trip.missing or not trip.zero or len(moved) < len(second):
        return []
    if trip.zero.count != len(second) or not all("lora_B" in n or "lora_embedding_A" in n for n in trip.zero.first):
        return []
    return [
        decisive(f"each of the {len(second)} factors that begin at zero is zero in the file, and was trained"),
        hint("the others are there: it is an adapter before its first step"),
    ]


def _not_saved(case: Case) -> list[Clue]:
    error = case.error
    return [decisive(str(error))] if error is not None and error.type == "AdapterNotSavedError" else []


def _other_base(case: Case) -> list[Clue]:
    trip, base = case.record.round_trip, case.record.base
    if trip is None or base is None or not trip.fresh_base_digest:
        return []
    if trip.fresh_base_digest == base.digest_before or trip.other_seed is not None or trip.restored:
        return []
    return [
        sign("the base that the adapter is loaded onto is not the one that it was trained on"),
        sign("names and shapes are the same, so that nothing raises"),
    ]


def _file_differs(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.differing or trip.missing or trip.unexpected:
        return []
    # NaN that was trained is in the file as well
    if trip.nonfinite and not case.finite:
        return []
    # a record of an earlier version does not tell the file from the load
    if trip.file_differing is None:
        return [decisive(f"{trip.differing} came back as other numbers than were trained")]
    if not trip.file_differing:
        return []
    return [decisive(f"{trip.file_differing} has other numbers in the file than were trained")]


def _load_differs(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.differing or trip.missing or trip.unexpected or trip.file_differing is None:
        return []
    if trip.file_differing or trip.nonfinite:
        return []
    return [decisive(f"the file has the numbers that were trained, and {trip.differing} came back as others")]


def _scaling(case: Case) -> list[Clue]:
    trip, start = case.record.round_trip, case.record.initial
    clues = []
    if start is not None and start.wrong_scaling:
        clues.append(decisive(f"the scaling of {start.wrong_scaling}"))
    if trip is not None and trip.rescaled:
        clues.append(decisive(f"after reloading, the scaling is another one: {trip.rescaled}"))
    same = _same_with_other_logits(case)
    if same is not None:
        clues.append(hint("the reloaded adapter has the same tensors on the same base, and another effect"))
    return clues


def _scaled_by_zero(case: Case) -> list[Clue]:
    start = case.record.initial
    if start is None or not start.zero_scaling:
        return []
    return [decisive(f) for f in case.failed(identity_at_init.Reason.ZERO_SCALING)[:1]]


def _reload_computes_otherwise(case: Case) -> list[Clue]:
    same = _same_with_other_logits(case)
    if same is None or same.rescaled or not case.repeats or not math.isfinite(same.max_logit_change or math.nan):
        return []
    # with its adapter off, the trained model is not the base either: it is not the adapter that differs
    if same.max_base_change and not same.base_differs and case.failed(effect_size.Reason.OTHER_BASE):
        return []
    return [decisive(f) for f in case.failed(round_trip.Reason.LOGITS)[:1]]


def _merged(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if not case.finite or not case.repeats or (trip is not None and trip.nonfinite):
        return []
    return shown_by(merge_equivalence.Reason.LOGITS)(case)


def _merged_and_saved(case: Case) -> list[Clue]:
    """A merged model that is right in memory and another one after saving and loading: not all of it was saved."""
    if case.failed(merge_equivalence.Reason.LOGITS) or not case.finite or not case.repeats:
        return []
    return shown_by(merge_equivalence.Reason.SAVED_LOGITS)(case)


def _disabled_is_not_base(case: Case) -> list[Clue]:
    if case.record.initial is None or case.failed("identity_at_init") or case.failed("base_bit_frozen"):
        return []
    return shown_by(effect_size.Reason.OTHER_BASE)(case) if case.finite and case.repeats else []


def _own_kernel(case: Case) -> list[Clue]:
    same = _same_with_other_logits(case)
    if same is None or not same.computed_otherwise or same.rescaled:
        return []
    clues = [
        sign(f"{same.computed_otherwise} compute by a class or forward of their own, and after reloading by peft's")
    ]
    if _is_little(same):
        clues.append(sign("the logits differ by less than 1 % of the adapter's effect: too little for another scaling"))
    return clues


def _same_with_other_logits(case: Case) -> RoundTripRecord | None:
    """The round trip where it brought the same tensors back, onto the same base, and the logits differ."""
    trip, base = case.record.round_trip, case.record.base
    if trip is None or base is None or trip.differing or trip.missing or trip.nonfinite or trip.drawn:
        return None
    if base.changed or trip.fresh_base_digest != base.digest_before:
        return None
    return trip if case.failed(round_trip.Reason.LOGITS) else None


def _is_little(trip: RoundTripRecord) -> bool:
    """Whether the logits of a reloaded adapter differ by so little that no other scaling can be the reason."""
    change, effect = trip.max_logit_change, trip.max_logit_effect
    return change is not None and effect is not None and change < 0.01 * effect


def _merge_swallowed(case: Case) -> list[Clue]:
    merge = case.record.merge
    if merge is None or merge.touched or not case.failed("merge_equivalence"):
        return []
    if merge.dtype not in ("bfloat16", "float16") or merge.swallowed is None:
        return []
    return [
        sign(f"{merge.swallowed:.1%} of the weights that the adapter would change are the same after merging"),
        sign(f"the base is {merge.dtype}, and what is added is below half a unit in the last place"),
    ]


SAVING: tuple[Mechanism, ...] = (
    Mechanism(
        "adapter_keys_dropped",
        "the names in the adapter file match no module, and loading leaves those that they were meant for at zero",
        "save with save_pretrained from the model that was trained, and treat load warnings as errors",
        _keys_dropped,
    ),
    Mechanism(
        "trained_adapter_not_saved",
        "the Trainer's save_model writes no file of the adapter that was trained",
        "save the model that trains, and the adapter that is active in it",
        _not_saved,
    ),
    Mechanism(
        "adapter_file_empty",
        "the adapter file holds no tensor, or zeros in the place of each",
        "look at what overrides state_dict or save_model; with sharded training gather before saving",
        _file_empty,
    ),
    Mechanism(
        "adapter_file_incomplete",
        "the adapter file lacks tensors of the adapter",
        "look at what overrides state_dict or save_model, and filters names there",
        _file_incomplete,
    ),
    Mechanism(
        "saved_before_training",
        "the adapter file holds the adapter as it was before its first step",
        "save after the training, from the model that was trained, and not a copy of it",
        _saved_before_training,
    ),
    Mechanism(
        "other_base",
        "the adapter is put onto a base of other weights than it was trained on",
        "load the same revision of the base, and fix the seed of whatever is drawn at random",
        _other_base,
    ),
    Mechanism(
        "adapter_file_differs",
        "the adapter file holds other numbers than were trained",
        "save after the last step, in float32, and look at what rewrites tensors in save_model",
        _file_differs,
        locates=True,
    ),
    Mechanism(
        "reload_differs_from_the_file",
        "the adapter file is right, and loading it gives other tensors: the adapter, or a part, is made anew",
        "compare adapter_config.json with the trained configuration (target_modules, r), and look at what wraps the"
        " model again after loading",
        _load_differs,
    ),
    Mechanism(
        "adapter_scaled_by_zero",
        "the adapter is multiplied by 0: it has no effect, and its factors get no gradient",
        "set lora_alpha to a positive number; alpha / r is what the adapter's effect is multiplied by",
        _scaled_by_zero,
    ),
    Mechanism(
        "scaling_wrong",
        "the adapter's effect is multiplied by something else than the alpha / r that it was trained with",
        "leave lora_alpha, r and use_rslora as they were trained, in adapter_config.json too",
        _scaling,
    ),
    Mechanism(
        "kernel_computes_otherwise",
        "the modules that the adapter was trained with compute something else than those that it is loaded into",
        "compare each with peft's own on one input: type of its products, scaling, dropout, bias",
        _own_kernel,
    ),
    Mechanism(
        "merge_rewrites_tied_embedding",
        "the delta of a tied head is added to the tensor that the input embedding shares",
        "untie the weights before merging, or do not adapt lm_head of a tied model",
        shown_by(merge_equivalence.Reason.TIED),
    ),
    Mechanism(
        "merge_swallowed_in_bfloat16",
        "what merging adds is below the resolution of half precision weights, and rounds away",
        "merge in float32 and cast then, or serve the adapter unmerged",
        _merge_swallowed,
    ),
    Mechanism(
        "reloaded_model_computes_otherwise",
        "the same adapter on the same base computes something else after reloading",
        "compare adapter_config.json and the modules' classes of both models: lora_alpha, r, use_rslora, hooks and"
        " patches that the trained model alone has",
        _reload_computes_otherwise,
        locates=True,
    ),
    Mechanism(
        "merging_changes_the_model",
        "the merged model computes something else than the model with its adapter",
        "look at layers with a forward pass of their own, which merging into their weights does not reach",
        _merged,
        locates=True,
    ),
    Mechanism(
        "merged_model_not_saved_whole",
        "the merged model is right, and after saving and loading it computes something else",
        "look at hooks, patched forward passes and attributes that no file holds, and at tied weights",
        _merged_and_saved,
        locates=True,
    ),
    Mechanism(
        "disabled_adapter_leaves_something",
        "with its adapter switched off the trained model is not its base",
        "look at hooks, patched forward passes and changed attributes of the trained model, which a new one lacks",
        _disabled_is_not_base,
        locates=True,
    ),
)
"""Causes on the way out; of two that are worth the same, the earlier goes first."""
