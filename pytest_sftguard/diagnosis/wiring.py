"""Causes in how adapter, base, optimizer and precision are put together."""

from __future__ import annotations

from pytest_sftguard.diagnosis.case import Case, Clue, decisive, hint, shown_by, sign
from pytest_sftguard.diagnosis.mechanism import Mechanism
from pytest_sftguard.invariants import (
    base_bit_frozen,
    base_finite,
    identity_at_init,
    optimizer_owns_trainables,
    precision_is_real,
    trainable_set_exact,
)
from pytest_sftguard.precision import MODES


def _not_in_optimizer(case: Case) -> list[Clue]:
    optimizer = case.record.optimizer
    clues = []
    if optimizer is not None and optimizer.owns_trainables is False and case.record.adapter:
        clues.append(sign("the parameters of the optimizer are not the trainable parameters of the model"))
    found = case.failed(optimizer_owns_trainables.Reason.LACKING, optimizer_owns_trainables.Reason.OTHERS)
    if found and case.record.adapter:
        clues.append(decisive(found[0]))
    rates = [s for s in case.record.steps if s.learning_rate]
    received = all(s.gradients_finite and s.grad_norm and s.received_grad_norm != 0 for s in case.record.steps)
    if case.no_effect and rates and received and not case.half_trainables:
        clues.append(decisive("gradients and learning rate are there, and no step changed a parameter"))
    return clues


def _frozen(case: Case) -> list[Clue]:
    if case.record.adapter or not case.record.steps or case.record.adapter_out_of_reach:
        return []
    return [
        decisive("no parameter of the model takes a gradient, and yet the run went through"),
        hint("gradient checkpointing makes the embeddings require gradients, so that backward does not raise"),
    ]


def _partly_frozen(case: Case) -> list[Clue]:
    reason = trainable_set_exact.Reason
    return shown_by(reason.DISABLED, reason.FROZEN)(case) if case.record.adapter else []


def _base_trains(case: Case) -> list[Clue]:
    found, changed = (case.failed(r) for r in (base_bit_frozen.Reason.TRAINABLE, base_bit_frozen.Reason.CHANGED))
    return [*map(decisive, found), *map(hint, changed)] if found and not _other_adapter(case) else []


def _base_changes(case: Case) -> list[Clue]:
    found, trainable = (case.failed(r) for r in (base_bit_frozen.Reason.CHANGED, base_bit_frozen.Reason.TRAINABLE))
    return [] if trainable or _other_adapter(case) else [decisive(f) for f in found]


def _other_adapter(case: Case) -> list[Clue]:
    base = case.record.base
    factors = [n for n in base.changed.first if any(p.startswith("lora_") for p in n.split("."))] if base else []
    if base is None or not factors or len(factors) < len(base.changed.first):
        return []
    found = case.failed(base_bit_frozen.Reason.CHANGED)
    return [decisive(found[0]), hint(f"{factors[0]} belongs to an adapter that is not the active one")] if found else []


def _both_zero(case: Case) -> list[Clue]:
    start = case.record.initial
    return shown_by(identity_at_init.Reason.ZERO_A)(case) if start is not None and not start.nonzero_b else []


def _fresh_head(case: Case) -> list[Clue]:
    """A head that no checkpoint holds, and that the adapter's file does not hold either."""
    base, trip = case.record.foundation, case.record.round_trip
    if base is None or trip is None or not base.not_loaded or base.not_loaded.count > _HEAD or not trip.drawn:
        return []
    if trip.other_seed is None or not trip.drawn.count <= base.not_loaded.count:
        return []
    return [
        decisive(f"the checkpoint lacks {base.not_loaded} alone, which was drawn at random"),
        decisive(f"no adapter file holds {trip.drawn}"),
    ]


def _random_rows(case: Case) -> list[Clue]:
    trip = case.record.round_trip
    if trip is None or not trip.drawn or trip.other_seed is None or _fresh_head(case):
        return []
    return [decisive(f"{trip.drawn} comes out otherwise under another seed, and no adapter file holds it")]


def _not_loaded(case: Case) -> list[Clue]:
    return [] if _fresh_head(case) else shown_by(base_finite.Reason.NOT_LOADED)(case)


def _checkpoint_type(case: Case) -> list[Clue]:
    mode = MODES.get(case.record.precision)
    if mode is None or not case.doubted("precision_is_real"):
        return []
    other = [d for d in case.record.weights_dtypes if d in ("float16", "bfloat16") and d != mode.weights_dtype]
    if not other:
        return []
    clues = [sign(f"the base's weights are {', '.join(other)}, and {mode.name} asks for {mode.weights_dtype}")]
    copies = [t.name for t in case.record.adapter if t.dtype in other and not t.is_low_rank]
    if copies:
        clues.append(decisive(f"{copies[0]} is a copy of it, and trained in that type"))
    return clues


def _precision(case: Case) -> list[Clue]:
    seen = precision_is_real.Reason
    happened = (seen.COMPUTED, seen.WEIGHTS, seen.NO_SCALER, seen.AUTOCAST, seen.TF32)
    found = [f for f in case.doubted("precision_is_real") if f.because(*happened)]
    return [decisive(found[0])] if found and case.record.error is None else []


_HEAD = 4
"""Most tensors of a head: two layers with a weight and a bias each."""

WIRING: tuple[Mechanism, ...] = (
    Mechanism(
        "adapter_frozen",
        "the adapter takes no gradient; gradient checkpointing turns the crash that this would be into silence",
        "load adapters for training with PeftModel.from_pretrained(..., is_trainable=True)",
        _frozen,
    ),
    Mechanism(
        "adapter_partly_frozen",
        "a part of the adapter takes no gradient, or the adapter is switched off",
        "look for requires_grad_(False), disable_adapter_layers() and set_adapter() after the wrap",
        _partly_frozen,
    ),
    Mechanism(
        "adapter_not_attached",
        "a module that the configuration names has no adapter",
        "compare target_modules with model.named_modules()",
        shown_by(trainable_set_exact.Reason.UNMATCHED, trainable_set_exact.Reason.INCOMPLETE),
    ),
    Mechanism(
        "adapter_not_in_optimizer",
        "the optimizer does not step the parameters that train",
        "build the optimizer after get_peft_model, or let the Trainer build it",
        _not_in_optimizer,
    ),
    Mechanism(
        "base_not_frozen",
        "weights of the base train along, and the adapter file does not hold what they learn",
        "freeze the base, or name what should train in modules_to_save",
        _base_trains,
    ),
    Mechanism(
        "other_adapter_trained",
        "another adapter trains than the one that is active at the end, and saved",
        "call set_adapter once, before the Trainer is made, with the adapter that trains and is saved",
        _other_adapter,
    ),
    Mechanism(
        "base_changed",
        "something writes to the base's weights while the adapter trains",
        "look for callbacks and forward passes that write to weights or buffers",
        _base_changes,
    ),
    Mechanism(
        "adapter_perturbs_the_base",
        "the adapter changes the base's answers before the first step",
        "leave init_lora_weights=True, and do not draw lora_B at random",
        shown_by(identity_at_init.Reason.NONZERO_B),
    ),
    Mechanism(
        "both_factors_zero",
        "both factors of a pair begin at zero, so that neither has an effect or gets a gradient",
        "leave lora_A as it is drawn (init_lora_weights=True), and look at what fills weights after the wrap",
        _both_zero,
    ),
    Mechanism(
        "nan_in_base_weights",
        "the base's weights are not finite to begin with",
        "load the base again; check the file, and the type that it was cast to",
        shown_by(base_finite.Reason.NONFINITE),
    ),
    Mechanism(
        "fresh_head_not_saved",
        "the head is new, drawn at random, and the adapter's file does not hold it",
        "name it in modules_to_save, or give the task_type of the configuration, which does so for heads",
        _fresh_head,
    ),
    Mechanism(
        "base_not_loaded",
        "tensors that the checkpoint lacks are drawn at random",
        "load a checkpoint of the same architecture, and read transformers' load report",
        _not_loaded,
    ),
    Mechanism(
        "base_not_reproducible",
        "rows of new tokens are drawn at random, do not train, and are in no file",
        "train them (trainable_token_indices, or modules_to_save with the embedding), or set them from a fixed start",
        _random_rows,
    ),
    Mechanism(
        "trainables_in_the_checkpoints_type",
        "the base was loaded in its checkpoint's type, as transformers 5 does, and what trains of it is in that type",
        "pass dtype to from_pretrained: torch.float32, or the type that the cell asks for",
        _checkpoint_type,
    ),
    Mechanism(
        "precision_not_applied",
        "the precision that was asked for did not happen, and no label says so",
        "look at the mixed-precision settings that the target passes on; accelerate ignores fp16 on a CPU",
        _precision,
    ),
)
"""Causes in the wiring; of two that are worth the same, the earlier goes first."""
