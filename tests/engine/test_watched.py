"""Real trainings: each watched property sees its faults, and is silent on what is like them and sound."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
from torch import nn

from pytest_sftguard.engine.adapter import routing
from pytest_sftguard.engine.looks import Looks
from pytest_sftguard.tiers import TIERS
from pytest_sftguard.verdicts import JudgedRun, Outcome
from tests.targets import watched

QUICK = TIERS["quick"].looks
SEEN: dict[str, tuple[str, int | None]] = {
    "maximised": ("update_descends", 1),
    "negated_before_the_step": ("update_descends", 1),
    "one_tensor_negated": ("update_descends", 1),
    "optimizer_adds": ("update_descends", 1),
    "loss_in_bfloat16": ("loss_in_float32", None),
    "loss_cast_late": ("loss_in_float32", None),
    "sum_in_bfloat16": ("loss_in_float32", None),
    "stream_in_two_workers": ("rows_not_repeated", 2),
    "served_twice": ("rows_not_repeated", 2),
    "stale_batch": ("rows_not_repeated", 2),
    "pictures_served_twice": ("rows_not_repeated", 2),
    "padding_supervised": ("supervision_audit", 1),
    "mask_with_holes": ("supervision_audit", 1),
    "mask_shifted": ("supervision_audit", 1),
    "padding_supervised_without_a_mask": ("supervision_audit", 1),
    "tokens_classified_on_padding": ("supervision_audit", 1),
    "head_read_past": ("adapter_reached", None),
    "branch_never_taken": ("adapter_reached", None),
    "evaluation_mode": ("randomness_alive", 1),
    "attention_dropout_off": ("randomness_alive", 1),
    "dropout_set_to_zero": ("randomness_alive", 1),
    "seeded_in_every_step": ("randomness_alive", 2),
    "seeded_in_every_micro_batch": ("randomness_alive", 1),
    "rotary_changed_within": ("base_bit_frozen", 1),
    "weight_changed_midway": ("base_bit_frozen", 5),
}
"""The invariant that ought to see each fault, and the step that it ought to name."""
NO_EVIDENCE = ("two_rows_always", "collator_drops_rows")
SOUND = [
    name
    for name, thing in vars(watched).items()
    if inspect.isfunction(thing) and thing.__module__ == watched.__name__ and "sound" in str(thing.__doc__)
]
MINE = {invariant for invariant, _ in SEEN.values()} | {"cell_is_real"}


@pytest.mark.parametrize("target", SEEN)
def test_a_fault_is_seen(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The invariant that exists for the fault fails, and names its step."""
    batch = (4, 2) if target == "seeded_in_every_micro_batch" else (8, 1)
    run = run_cell(f"tests.targets.watched:{target}", batch=batch, steps=5, looks=QUICK)
    assert SEEN[target] in {(f.invariant, f.step) for f in run.verdict.failures}


@pytest.mark.parametrize("target", SOUND)
def test_what_is_like_a_fault_and_sound_is_passed_over(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """None of the watched properties doubts it."""
    run = run_cell(f"tests.targets.watched:{target}", steps=5, looks=QUICK)
    assert [f for f in run.verdict.findings if f.invariant in MINE and f.doubts] == []


@pytest.mark.parametrize("target", NO_EVIDENCE)
def test_a_batch_that_is_not_kept_is_no_evidence(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """A cell whose micro-batches have other rows than it names was not evaluated."""
    verdict = run_cell(f"tests.targets.watched:{target}", looks=QUICK).verdict
    assert verdict.outcome is Outcome.NOT_EVALUATED
    assert {f.invariant for f in verdict.not_evaluated if f.required} == {"cell_is_real"}


@pytest.mark.parametrize(("rows", "batch"), [("one_row", (8, 1)), ("three_rows", (8, 1)), ("three_rows", (2, 4))])
def test_a_data_set_below_the_batch_is_no_evidence(
    run_cell: Callable[..., JudgedRun], rows: str, batch: tuple[int, int]
) -> None:
    """Neither is a cell of more rows than the data set has."""
    verdict = run_cell(f"tests.targets.healthy:{rows}", batch=batch, looks=("batches",)).verdict
    assert {f.invariant for f in verdict.not_evaluated if f.required} == {"cell_is_real"}


class Block(nn.Module):
    """Two experts, and a router beside them where `routes` is set."""

    def __init__(self, *, routes: bool = True) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))
        self.gate = nn.Linear(4, 2 if routes else 3)


@pytest.mark.parametrize(
    ("block", "lists"), [(Block(), ["layers.0.experts"]), (Block(routes=False), [])], ids=["routed", "not-routed"]
)
def test_a_router_has_a_row_for_each_of_its_choices(block: Block, lists: list[str]) -> None:
    """Whatever it is called; a list of layers, which are all computed, has none."""
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    found = dict(routing.choices("layers.0.experts.1.up.weight", dict(model.named_modules())))
    assert list(found) == lists
    assert all(layers == [f"{at}.{i}.up.weight" for i in range(2)] for at, layers in found.items())


@pytest.mark.parametrize("target", ["idle_experts", "mixtral", "mixtral_experts", "opt_layerdrop"])
def test_a_layer_that_may_rest_is_not_dead(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """Experts that a router leaves aside, and layers that are left out at random, are no dead adapters."""
    run = run_cell(f"tests.targets.healthy:{target}", looks=QUICK)
    assert [f for f in run.verdict.of("adapter_reached") if f.doubts] == []


@pytest.mark.parametrize("target", ["twice_the_rank", "dropout", "streamed", "dynamic_rope"])
def test_watching_changes_no_bit(run_cell: Callable[..., JudgedRun], target: str) -> None:
    """The training has the same bits with and without the looks."""
    looks = ("batches", "randomness", "base_during", "reach")
    one, other = (run_cell(f"tests.targets.healthy:{target}", looks=asked) for asked in (looks, ()))
    assert one.record.adapter_digest == other.record.adapter_digest
    assert not [look for look in one.record.looks if look.error]


def test_momentum_of_an_earlier_training_is_not_judged(run_cell: Callable[..., JudgedRun]) -> None:
    """An optimizer that brings momentum along may go uphill at first."""
    run = run_cell("tests.targets.watched:momentum_brought_along", steps=3)
    [finding] = run.verdict.of("update_descends")
    assert (finding.outcome, finding.reason, finding.required) == (Outcome.NOT_EVALUATED, "uncompared", False)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw_torch"])
def test_weight_decay_is_no_ascent(run_cell: Callable[..., JudgedRun], optimizer: str) -> None:
    """However strong it is, and whether it is subtracted from the weights or added to the gradient."""
    arguments = {"optim": optimizer, "weight_decay": 10.0}
    run = run_cell("tests.targets.healthy:continued", steps=2, training_arguments=arguments)
    assert [f.outcome for f in run.verdict.of("update_descends")] == [Outcome.PASSED]


def test_a_library_that_computes_in_half_precision_is_named(run_cell: Callable[..., JudgedRun]) -> None:
    """BERT's classifier returns a loss in the type of its weights, which is not the user's doing."""
    run = run_cell("tests.targets.healthy:bert_classifier", precision="bf16-true")
    [finding] = run.verdict.of("loss_in_float32")
    assert (finding.outcome, finding.reason, finding.required) == (Outcome.NOT_EVALUATED, "library", False)
    assert finding.mentions("BertForSequenceClassification")


def test_the_looks_of_the_properties_are_those_of_the_tier() -> None:
    """They exist, and every tier has them."""
    assert {"batches", "randomness", "base_during", "reach"} <= set(QUICK)
    Looks(QUICK)


def test_a_step_that_the_scaler_skipped_has_no_direction(run_cell: Callable[..., JudgedRun]) -> None:
    """Its gradients are infinite, and it moves nothing: the first step that is taken is judged."""
    from pytest_sftguard.engine.faults import fault_named
    from pytest_sftguard.engine.faults._injected import injected

    fault = fault_named("amp_warmup_skips_are_normal")
    with injected("amp_warmup_skips_are_normal", "pytest_sftguard.engine.models.sums:build_trainer") as path:
        run = run_cell(path, fault.precision, fault.batch, steps=fault.steps, questions=0)
    assert [s.step for s in run.record.steps if s.update_cosine is not None] == [3]
    assert [f.outcome for f in run.verdict.of("update_descends")] == [Outcome.PASSED]
