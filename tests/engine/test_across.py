"""Runs side by side: each fault is caught by its invariant, and healthy targets agree with themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pytest_sftguard import detection, tiers
from pytest_sftguard.diagnosis import diagnose
from pytest_sftguard.engine import replicas, runner
from pytest_sftguard.engine.recording.layers import LayerWatch
from pytest_sftguard.engine.tensors.fingerprints import (
    fingerprint,
    fingerprints,
    joined,
    joined_texts,
    row_fingerprints,
)
from pytest_sftguard.invariants import load_invariants
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.records import RunRecord
from pytest_sftguard.rendering import message
from pytest_sftguard.session import Runs
from pytest_sftguard.verdicts import JudgedRun, Outcome

SUMS = "pytest_sftguard.engine.models.sums:build_trainer"
HOMEWORK = "homework.sft:build_trainer"
ALONE = ("rerun", "resumed", "one_batch", "batch_split", "fp32")
ACROSS = {i.reference: i for i in load_invariants() if getattr(i, "reference", None)}  # type: ignore[attr-defined]


def config(target: str, batch: tuple[int, int] = (4, 2), precision: str = "fp32", **changes: Any) -> RunConfig:
    """A short run of a target."""
    path = target if ":" in target else f"tests.targets.healthy:{target}"
    given = {"steps": 6, "device": "cpu", "questions": 0} | changes
    return RunConfig(cell=Cell(precision, *batch), target=path, **given)


def reference(asked: RunConfig, relation: str) -> RunRecord:
    """The reference of a kind, trained."""
    return runner.run(tiers.reference_config(asked, relation))


def compared(asked: RunConfig, *relations: str) -> JudgedRun:
    """A run judged beside its references, by the invariants that compare."""
    return Runs().compared(asked, list(ACROSS.values()), relations)


def failed(run: JudgedRun) -> list[str]:
    """The messages of what failed."""
    return [f"{f.invariant}: {message(f)}" for f in detection.reports(run)]


@pytest.mark.parametrize("target", ["tasks:two_towers", "adapters:adalora"])
def test_a_loss_that_holds_for_a_micro_batch_is_its_authors(target: str) -> None:
    """Rows that are held against each other, and a term that each micro-batch adds, follow the split by nature."""
    run = compared(config(f"tests.targets.{target}", (2, 2)), "batch_split")
    assert failed(run) == []
    assert {f.reason for f in run.verdict.of("batch_split_equivalence")} <= {"own_loss"}


@pytest.mark.parametrize(
    "target",
    [
        "dora",
        "pissa",
        "saved_embedding_and_head",
        "tied_embeddings_saved",
        "gpt2",
        "mixtral_experts",
        "dropout",
        "streamed",
        "eleven_rows",
        "dynamic_rope",
        "checkpointing",
        "bert_classifier",
        "own_scheduler",
    ],
)
def test_a_healthy_target_agrees_with_itself(target: str) -> None:
    """Adapters, architectures and data of many kinds: split otherwise, run again, resumed, on one batch."""
    assert failed(compared(config(target, (8, 1)), *ALONE)) == []


@pytest.mark.parametrize("precision", ["bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"])
@pytest.mark.parametrize("target", ["gemma2", "rank_one"])
def test_a_healthy_target_agrees_in_low_precision(target: str, precision: str) -> None:
    """Rounding, and steps that the loss scaler skips, are no disagreement."""
    assert failed(compared(config(target, precision=precision), *ALONE)) == []


def test_homework_agrees_with_itself() -> None:
    """The training app that ships with the repository is the same in every run that it is compared with."""
    run = compared(config(HOMEWORK, (8, 1)), *tiers.REFERENCES)
    assert failed(run) == []
    assert [f.outcome for f in run.verdict.of("replica_equivalence")] == [Outcome.PASSED]


def test_watching_a_training_with_fused_layers_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """They fuse only where nobody looks into them, and so the watch does not."""
    asked = config(HOMEWORK, (8, 1))
    watched = runner.run(asked)
    assert watched.compute_dtypes == {"float32": 35}
    monkeypatch.setattr(LayerWatch, "_watch_layers", lambda self, layers: ({}, []))
    alone = runner.run(asked)
    assert alone.compute_dtypes == {}
    assert (watched.adapter_digest, watched.losses) == (alone.adapter_digest, alone.losses)


@pytest.mark.parametrize("target", ["own_loss", "bert_classifier"])
def test_a_loss_that_is_added_up_fails(target: str) -> None:
    """Losses that know nothing of num_items_in_batch are added up over micro-batches by transformers 5.23."""
    run = compared(config(target), "batch_split")
    assert any("batch_split_equivalence" in message for message in failed(run))


def test_another_run_is_the_same_to_the_bit() -> None:
    """After any other run of the process, a training sees the same rows and ends in the same bits."""
    asked = config("dropout")
    first = runner.run(asked)
    runner.run(config("gpt2", seed=3))
    again = reference(asked, "rerun")
    assert (first.adapter_digest, first.losses) == (again.adapter_digest, again.losses)
    assert [s.rows for s in first.steps] == [s.rows for s in again.steps]


def test_an_interrupted_run_has_all_steps() -> None:
    """The two parts of a run that was resumed are one record, in one numbering, each step measured from the last."""
    asked = config("dropout", steps=5)
    whole, resumed = runner.run(asked), reference(asked, "resumed")
    assert [s.step for s in resumed.steps] == [1, 2, 3, 4, 5]
    assert [s.max_update for s in resumed.steps] == [s.max_update for s in whole.steps]
    assert resumed.global_step == 5


def test_what_a_checkpoint_does_not_give_back_is_named() -> None:
    """Peft saves what the encoder of p-tuning makes of its numbers, and not the encoder."""
    run = compared(config("tests.targets.adapters:p_tuning", (4, 1)), "resumed")
    assert [f.reason for f in run.verdict.failures] == ["not_restored"]
    assert "prompt_encoder.default.embedding.weight" in failed(run)[0]
    assert diagnose(run)[0].mechanism == "resume_restores_something_else"


def test_states_that_torch_rounds_on_loading_are_no_loss() -> None:
    """Adafactor keeps float32 statistics of bfloat16 parameters, and torch loads them in bfloat16."""
    given: dict[str, Any] = {"training_arguments": {"optim": "adafactor"}, "looks": ("checkpoints",)}
    run = compared(config("tests.targets.adapters:whole", (4, 1), "bf16-true", **given), "resumed")
    assert "resume_equivalence" not in {f.invariant for f in run.verdict.failures}


def test_what_is_not_saved_cannot_be_resumed() -> None:
    """Where the target saves the model alone, there is nothing to resume from, and nothing fails."""
    asked = config("twice_the_rank", training_arguments={"save_only_model": True})
    assert "save_only_model" in (reference(asked, "resumed").not_run or "")


def test_one_batch_is_one_batch() -> None:
    """Every micro-batch of every step holds the same rows, short steps at the end of an epoch too."""
    record = reference(config("eleven_rows", training_arguments={"learning_rate": 0.0}), "one_batch")
    assert len({x for s in record.steps for x in s.micro_losses if len(s.micro_losses) == 2}) == 1
    assert len(record.steps) == tiers.ONE_BATCH_STEPS


@pytest.mark.parametrize(
    ("arguments", "wording"),
    [
        ({"learning_rate": 0.0}, "nothing is learned"),
        ({"learning_rate": 0.5}, "does not fall"),
        ({"learning_rate": 2.0}, "loss is nan|does not fall"),
        ({"learning_rate": 1e4}, "every gradient is exactly 0"),
    ],
)
def test_a_rate_that_cannot_learn_fails_on_one_batch(arguments: dict[str, Any], wording: str) -> None:
    """At learning rate 0 the loss of one batch never changes, at one too high it does not fall."""
    asked = config(SUMS, (8, 1), training_arguments=arguments)
    found = list(ACROSS["one_batch"].check(runner.run(asked), reference(asked, "one_batch")))
    assert any(f.outcome is Outcome.FAILED and re.search(wording, message(f)) for f in found), found


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 1e-2])
@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_a_low_rate_is_no_failure_on_one_batch(optimizer: str, rate: float) -> None:
    """However little the loss of one batch falls, it falls."""
    asked = config(SUMS, (8, 1), training_arguments={"learning_rate": rate, "optim": optimizer})
    assert list(ACROSS["one_batch"].check(runner.run(asked), reference(asked, "one_batch"))) == []


def half_precision(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """What a wrong kernel does to a product, in half precision alone."""

    def wrong(product: torch.Tensor) -> torch.Tensor:
        return product if product.dtype == torch.float32 else product * (1.5 if name == "scaled" else float("inf"))

    return wrong


@pytest.mark.parametrize("name", ["scaled", "overflowing"])
def test_a_kernel_that_is_wrong_in_half_precision_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right in float32 and wrong in bfloat16 shows in the first step."""
    wrong, plain = half_precision(name), torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x, *a, **k: wrong(plain(x, *a, **k)))
    run = compared(config(SUMS, (8, 1), precision="bf16-mixed"), "fp32")
    assert any("precision_agreement: the loss of step 1" in message for message in failed(run)), failed(run)


class TestFirstStep:
    """What is seen of the forward passes of the first step."""

    @pytest.mark.parametrize(
        ("target", "where"),
        [("twice_the_rank", ""), ("heavy_dropout", "adapter"), ("dropout", "model"), ("opt_layerdrop", "model")],
    )
    def test_where_random_numbers_are_drawn(self, target: str, where: str) -> None:
        """Dropout before the factors is told from dropout elsewhere."""
        first = runner.run(config(target, steps=1)).first_step
        assert first is not None
        assert first.random == where

    def test_neftune_draws(self) -> None:
        """Noise on the embeddings is drawn by the model."""
        asked = config("twice_the_rank", steps=1, training_arguments={"neftune_noise_alpha": 5.0})
        first = runner.run(asked).first_step
        assert first is not None
        assert first.random == "model"

    @pytest.mark.parametrize("target", ["twice_the_rank", "gpt2", "gemma2", "mixtral", "left_padded", "dropout"])
    @pytest.mark.parametrize("smoothing", [0.0, 0.1])
    def test_the_loss_is_the_mean_over_labels(self, target: str, smoothing: float) -> None:
        """The loss of a causal model is the mean that is computed from its logits."""
        arguments = {"label_smoothing_factor": smoothing}
        record = runner.run(config(target, steps=1, training_arguments=arguments))
        assert record.first_step is not None
        assert record.first_step.token_loss == pytest.approx(record.losses[0], rel=1e-6)
        assert record.first_step.labels == sum(record.first_step.micro_tokens) == record.steps[0].supervised_tokens

    def test_logits_may_stand_where_labels_are_alone(self) -> None:
        """A training that computes no other logits is looked at like any other: here, the app's."""
        record = runner.run(config("homework.sft:build_trainer", steps=1))
        assert record.first_step is not None
        assert record.first_step.token_loss == pytest.approx(record.losses[0], rel=1e-6)
        assert record.first_step.labels == sum(record.first_step.micro_tokens) == record.steps[0].supervised_tokens

    def test_a_classifier_has_no_labels_of_tokens(self) -> None:
        """Where labels are no token ids, no mean over them is known."""
        first = runner.run(config("bert_classifier", steps=1)).first_step
        assert first is not None
        assert (first.token_loss, first.micro_tokens, first.labels) == (None, (), None)


def batch(rows: list[list[int]], left: bool = False, mask: bool = True) -> dict[str, torch.Tensor]:
    """A padded batch; the last token of each row is supervised."""
    longest = max(map(len, rows)) + left
    pads = [[0] * (longest - len(r)) for r in rows]
    sides = [(p, r, []) if left else ([], r, p) for p, r in zip(pads, rows, strict=True)]
    made = {
        "input_ids": torch.tensor([[*a, *r, *b] for a, r, b in sides]),
        "labels": torch.tensor([[*[-100] * (len(a) + len(r) - 1), r[-1], *[-100] * len(b)] for a, r, b in sides]),
        "attention_mask": torch.tensor([[*[0] * len(a), *[1] * len(r), *[0] * len(b)] for a, r, b in sides]),
    }
    return made if mask else {k: v for k, v in made.items() if k != "attention_mask"}


ROWS = [[1, 5, 6, 2], [1, 7, 2], [1, 9, 9, 8, 2]]


class TestFingerprints:
    """Numbers for rows, whatever their order, padding and batch split."""

    def seen(self, *batches: dict[str, torch.Tensor], padding: int | None = 0) -> str:
        """What is written of a step of these micro-batches."""
        prints = [fingerprint(b, padding) for b in batches]
        return joined(float(p) for p in prints if p is not None)

    @pytest.mark.parametrize(
        "batches",
        [
            [batch(ROWS[::-1])],
            [batch(ROWS, left=True)],
            [batch(ROWS, mask=False)],
            [batch(ROWS[:1]), batch(ROWS[1:], left=True)],
        ],
        ids=["order", "padding", "no-mask", "batch_split"],
    )
    def test_the_same_rows(self, batches: list[dict[str, torch.Tensor]]) -> None:
        """Order, padding, mask and batch split make no difference."""
        assert self.seen(*batches) == self.seen(batch(ROWS))

    @pytest.mark.parametrize(
        "rows",
        [[[1, 6, 5, 2], *ROWS[1:]], [*ROWS, ROWS[0]], ROWS[:2], [ROWS[0], ROWS[0], ROWS[2]], [[1, 5, 6, 3], *ROWS[1:]]],
    )
    def test_other_rows(self, rows: list[list[int]]) -> None:
        """Swapped tokens, a row more, less or in the place of another, another label: all are seen."""
        assert self.seen(batch(rows)) != self.seen(batch(ROWS))

    def test_labels_count(self) -> None:
        """The same tokens with other labels are other rows."""
        other = batch(ROWS)
        other["labels"][0, 1] = 5
        assert self.seen(other) != self.seen(batch(ROWS))

    def test_parts_are_put_together(self) -> None:
        """What two processes wrote of their halves is what one writes of the whole."""
        assert joined_texts([self.seen(batch(ROWS[:1])), self.seen(batch(ROWS[1:]))]) == self.seen(batch(ROWS))
        assert joined_texts([None, "00"]) is None

    @pytest.mark.parametrize("padding", [None, 0])
    def test_together_is_as_alone(self, padding: int | None) -> None:
        """Batches of all kinds have the fingerprints that each has by itself."""
        pixels, labelled = {"pixel_values": torch.zeros(2, 3)}, batch(ROWS)
        batches = [
            batch(ROWS),
            batch(ROWS[1:], left=True),
            batch(ROWS[:1], mask=False),
            pixels,
            {**labelled, "labels": torch.tensor([1, 0, 1])},
            {**labelled, "labels": labelled["labels"].float()},
            {"input_ids": labelled["input_ids"]},
            {**labelled, "attention_mask": torch.ones(3)},
            {**labelled, "input_ids": labelled["input_ids"].int()},
            batch([[3], [4]]),
        ]
        # more than are worked out together
        long = [batch([[1, *[5] * 40_000, 2]]), *[batch(ROWS * 4)] * 3]
        for some in (batches, batches[:3], batches[3:], batches[:1], long, []):
            alone = [row_fingerprints(b, padding) for b in some]
            assert list(map(str, fingerprints(some, padding))) == list(map(str, alone))

    def test_what_is_no_row_of_tokens_has_none(self) -> None:
        """Pixels have no fingerprint."""
        assert fingerprint({"pixel_values": torch.zeros(2, 3)}) is None
        assert fingerprint({"input_ids": torch.zeros(2, 3)}) is None


MINE = """
from pytest_sftguard.rendering import message
from pytest_sftguard.engine.models import tiny

def build_trainer(**arguments):
    return tiny.build_trainer(**arguments)

def broken(**arguments):
    import os
    if "RANK" in os.environ:
        print("a last word")
        os._exit(7)
    return tiny.build_trainer(**arguments)

def hanging(**arguments):
    import os, time
    while os.environ.get("RANK") == "1":
        time.sleep(0.1)
    return tiny.build_trainer(**arguments)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of a test's own, in a folder of its own on sys.path."""
    (tmp_path / "mine_alone.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_alone"
    sys.modules.pop("mine_alone", None)


class TestReplicas:
    """Two processes on the CPU."""

    def test_a_test_of_its_own_has_replicas(self, mine: str) -> None:
        """A target in a folder that a test put on sys.path is found by the processes, too."""
        asked = config(f"{mine}:build_trainer", (8, 1), steps=3)
        run = compared(asked, "replicas")
        assert failed(run) == []
        record = run.references["replicas"]
        assert (record.error, record.not_run, len(record.replica_digests)) == (None, None, 2)
        assert [s.rows for s in record.steps] == [s.rows for s in run.record.steps]

    def test_a_process_that_dies_is_quoted(self, mine: str) -> None:
        """What a process said last is part of the error."""
        record = reference(config(f"{mine}:broken", (8, 1), steps=2), "replicas")
        assert record.error is not None
        assert "ended with status 7: " in record.error.message
        assert record.error.message.endswith("a last word")

    def test_a_module_that_cannot_be_had_is_no_failure(self, mine: str, tmp_path: Path) -> None:
        """A target that a fresh process cannot import is not evaluated there."""
        asked = config(f"{mine}:build_trainer", (8, 1), steps=2)
        runner.resolve(asked.target)
        (tmp_path / "mine_alone.py").unlink()
        assert "a fresh process cannot build it" in (reference(asked, "replicas").not_run or "")

    def test_processes_that_hang_are_ended(self, mine: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """No process is left behind, and the run says that it took too long."""
        monkeypatch.setattr(replicas, "_TIMEOUT_S", 12.0)
        started: list[subprocess.Popen[bytes]] = []
        plain = subprocess.Popen

        def remembered(*args: Any, **kwargs: Any) -> Any:
            started.append(plain(*args, **kwargs))
            return started[-1]

        monkeypatch.setattr(replicas.subprocess, "Popen", remembered)
        record = reference(config(f"{mine}:hanging", (8, 1), steps=2), "replicas")
        assert record.error is not None
        assert record.error.type == "TimeoutError"
        assert [p.poll() is not None for p in started] == [True, True]

    def test_nothing_of_them_stays(self) -> None:
        """The environment of this process is what it was."""
        before = dict(os.environ)
        reference(config("one_row", (8, 1), steps=1), "replicas")
        assert dict(os.environ) == before
