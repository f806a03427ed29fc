"""Causes on the way out: the adapter's file, its base, the merged model."""

from __future__ import annotations

from pytest_sftguard.diagnosis.case import Case, Clue, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import merge_equivalence, round_trip
from pytest_sftguard.records import RoundTripRecord


def _keys_dropped(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.tensors or not (trip.unexpected or trip.load_warnings):
        return []
    clues = []
    if trip.unexpected and trip.missing:
        clues.append(decisive(f"the file has {trip.unexpected} in the place of {trip.missing}"))
    elif trip.load_warnings:
        clues.append(sign(f"loading warned: {trip.load_warnings[0][:120]}"))
    if trip.max_logit_effect == 0:
        clues.append(sign("after loading, the base answers under the adapter's name"))
    return clues


def _file_incomplete(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.missing or trip.unexpected:
        return []
    if trip.tensors == 0:
        return [decisive(f"the file holds no tensor at all ({trip.file_bytes} bytes)")]
    return [sign(f"the file lacks {trip.missing}, and holds {trip.tensors} tensors")]


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
    if trip is None or not trip.differing or trip.missing or trip.unexpected or trip.nonfinite:
        return []
    return [sign(f"{trip.differing} came back as other numbers than were trained")]


def _scaling(case: Case) -> list[Clue]:
    trip, start = case.record.round_trip, case.record.initial
    clues = []
    if start is not None and start.wrong_scaling:
        clues.append(decisive(f"the scaling of {start.wrong_scaling}"))
    if trip is not None and trip.rescaled:
        clues.append(decisive(f"after reloading, the scaling is another one: {trip.rescaled}"))
    same = _same_with_other_logits(case)
    if same is not None:
        clues.append(sign("the reloaded adapter has the same tensors on the same base, and another effect"))
        if not _is_little(same):
            clues.append(hint("what is left is its configuration: lora_alpha, r, use_rslora"))
    return clues


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
        "adapter_file_empty",
        "the adapter file lacks tensors of the adapter",
        "look at what overrides state_dict or save_model; with sharded training gather before saving",
        _file_incomplete,
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
        "save after the last step, in float32",
        _file_differs,
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
)
"""Causes on the way out; of two that are worth the same, the earlier goes first."""
