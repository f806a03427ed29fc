"""Looks at what comes after the training: each fault is reported by its own invariants, a sound run by none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pytest_sftguard.engine.after import parsing
from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import load_faults
from pytest_sftguard.engine.faults._injected import injected
from pytest_sftguard.engine.models import sums, tiny
from pytest_sftguard.rendering import message
from pytest_sftguard.verdicts import JudgedRun, Outcome

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
LOOKS = ("base_answers", "merging")
Run = Callable[..., JudgedRun]


def failed(run: JudgedRun) -> set[str]:
    """Names of the invariants that failed."""
    return {f.invariant for f in run.verdict.failures}


def test_faults_leave_nothing_behind(run_cell: Run) -> None:
    """After all faults the target trains as before."""
    before = run_cell(SUMS, steps=2, questions=0).record.adapter_digest
    for fault in load_faults():
        with injected(fault.id, SUMS):
            pass
    assert run_cell(SUMS, steps=2, questions=0).record.adapter_digest == before


@pytest.mark.parametrize(
    ("target", "reporting"),
    [("word_before_the_answer", "answers_beat_base"), ("end_masked_as_padding", "stops")],
)
def test_unlisted_fault_is_reported(run_cell: Run, target: str, reporting: str) -> None:
    """A word before the answer that inference lacks, and an end that no row teaches, show in the answers alone."""
    run = run_cell(f"tests.targets.after:{target}", steps=100, questions=16, looks=LOOKS)
    assert reporting in failed(run), run.verdict.findings


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16-true"])
def test_a_training_that_learned_passes(run_cell: Run, precision: str) -> None:
    """A hundred steps of sums are right, come to their ends, and merge; all of it is judged."""
    run = run_cell(SUMS, precision, steps=100, questions=16, looks=LOOKS)
    assert run.verdict.passed, run.verdict.findings
    names = ("effect_size", "merge_equivalence", "answers_beat_base", "stops", "strict_answers")
    assert {f.outcome for n in names for f in run.verdict.of(n)} == {Outcome.PASSED}


@pytest.mark.parametrize("steps", [2, 8, 20])
def test_a_short_training_is_not_held_to_its_answers(run_cell: Run, steps: int) -> None:
    """What has not learned yet fails neither for wrong answers nor for endless ones."""
    run = run_cell(SUMS, steps=steps, questions=16, looks=LOOKS, training_arguments={"learning_rate": 1e-3})
    assert not failed(run) & {"answers_beat_base", "stops", "merge_equivalence", "effect_size"}


def test_a_task_that_cannot_be_learned_is_no_collapse(run_cell: Run) -> None:
    """Answers by chance end at one answer for all questions and a loss that stays, and nothing is unsound."""
    run = run_cell("tests.targets.after:answers_by_chance", steps=100, questions=16, looks=LOOKS)
    assert not failed(run) & {"answers_beat_base", "stops"}, run.verdict.findings


HEALTHY = (
    "dora",
    "pissa",
    "bias_all",
    "saved_lm_head",
    "tied_embeddings_saved",
    "trainable_tokens_tied",
    "mixtral_experts",
    "idle_experts",
    "second_adapter_active",
    "lora_bias",
    "gpt2",
    "bert_classifier",
    "registered_counter",
)


@pytest.mark.parametrize("precision", ["fp32", "bf16-true"])
@pytest.mark.parametrize("target", HEALTHY)
def test_looks_are_silent_on_healthy_variants(run_cell: Run, target: str, precision: str) -> None:
    """Adapters of many types and architectures merge, or say why not, and disabling them gives the base."""
    run = run_cell(f"tests.targets.healthy:{target}", precision, looks=LOOKS)
    assert not failed(run) & {"effect_size", "merge_equivalence", "answers_beat_base", "stops"}, run.verdict.findings
    assert all(look.done or look.inapplicable for look in run.record.looks)


def test_a_choice_of_attention_is_made_again(run_cell: Run) -> None:
    """Falcon chooses when it is built, and with ALiBi its sdpa computes something else than its eager attention."""
    run = run_cell("tests.targets.healthy:eager_alibi", looks=LOOKS)
    assert [f.outcome for f in run.verdict.of("merge_equivalence")] == [Outcome.PASSED]
    assert run.record.merge is not None
    assert run.record.merge.max_saved_change == run.record.merge.max_logit_change


def test_a_tied_embedding_must_not_be_merged(run_cell: Run) -> None:
    """LoRA on a tied embedding trains soundly, and merging it rewrites the head."""
    run = run_cell("tests.targets.healthy:tied_adapted_embedding", looks=LOOKS)
    assert failed(run) == {"merge_equivalence"}
    assert "lm_head.weight" in message(run.verdict.failures[0])


def test_what_cannot_be_merged_says_why(run_cell: Run) -> None:
    """The reason is peft's own."""
    run = run_cell("tests.targets.healthy:lora_bias", steps=2, looks=LOOKS)
    look = run.record.look("merging")
    assert look is not None
    assert "Impossible to merge LoRA with `lora_bias=True`" in look.inapplicable


def test_looks_change_nothing(run_cell: Run) -> None:
    """The same bits are trained, and the same answers given, with the looks and without them."""
    plain, looked = (run_cell(SUMS, steps=3, looks=looks).record for looks in ((), LOOKS))
    assert plain.adapter_digest == looked.adapter_digest
    assert plain.answers == looked.answers


def lenient(text: str) -> float | None:
    """Whatever the words around it, thousands separators and units, but one number and nothing made up."""
    stripped = text.strip().replace(",", "").removesuffix("km").rstrip(". ")
    return float(stripped) if stripped.lstrip("+-").replace(".", "", 1).isdigit() else None


PARSERS: dict[str, tuple[Callable[[str], float | None], str]] = {
    "strict": (sums.parse_answer, ""),
    "lenient": (lenient, ""),
    "zero-on-failure": (lambda text: sums.parse_answer(text) or 0.0, "junk"),
    "nan-on-failure": (lambda text: sums.parse_answer(text) or float("nan"), "junk"),
    "float": (lambda text: float(text) if text.strip() else None, "raised"),
    "last-number": (lambda text: float(text.split()[-1]) if text.split() and text.split()[-1].isdigit() else None, ""),
}


@pytest.mark.parametrize("name", PARSERS)
def test_parser_is_tried(name: str) -> None:
    """A parser may have a grammar of its own, and may make up nothing."""
    parse, wrong = PARSERS[name]
    words = sums.tokenizer()
    target = Target(
        path="x:y", build=sums.build_trainer, questions=sums.questions, parse_answer=parse, answer_prefix=""
    )
    batch = tiny.collate(sums.rows(words)[:4])
    record = parsing.tried(target, words, target.pairs(4), [batch])
    assert record is not None
    assert {k for k in ("junk", "misread", "raised") if getattr(record, k)} >= ({wrong} if wrong else set())
    assert wrong or not (record.junk or record.misread or record.raised), record


def test_merging_comes_last(run_cell: Run) -> None:
    """In whatever order looks are asked for, none sees the merged model: the base's answers are the base's."""
    run = run_cell(SUMS, steps=16, questions=16, looks=LOOKS[::-1])
    assert [look.name for look in run.record.looks] == list(LOOKS)
    assert run.record.base_answers is not None
    assert run.record.base_answers.answers != run.record.answers


def test_budget_follows_the_rows() -> None:
    """Answers that are longer than usual are generated whole; a prompt that is supervised too says nothing."""
    from pytest_sftguard.engine.after.generation import budget

    ids = torch.ones(2, 90, dtype=torch.long)
    labels = ids.clone()
    labels[:, :20] = -100
    assert [budget([{"input_ids": ids, "labels": x}]) for x in (labels, ids)] == [78, 32]
