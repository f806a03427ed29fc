"""Faults in the data: labels, prompts, and rows that see what they should not."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults._collating import IGNORED, collating, in_prompt, supervised
from pytest_sftguard.engine.faults._training import multiply_loss, wrap
from pytest_sftguard.engine.faults.fault import Fault, NotApplicableError


class AllLabelsMasked(Fault):
    """No token has a label: the loss is 0 or NaN, and the run is reported as successful."""

    source = "https://github.com/huggingface/trl/issues/6668"
    injects = "sets all labels of every collated batch to -100"
    reported_by = ("supervision_audit", "raw_loss_finite", "every_factor_moves")
    mechanism = "all_labels_masked"
    step = 1

    def alter(self, trainer: Trainer) -> None:
        collating(trainer, lambda batch: batch["labels"].fill_(IGNORED))


class AssistantMaskEmpty(Fault):
    """The chat template has no generation marker: the assistant's mask is all zeros, and nothing is supervised."""

    source = "https://github.com/marin-community/marin/issues/7237"
    injects = "labels the tokens of return_assistant_tokens_mask, with a chat template that marks none"
    reported_by = ("supervision_audit", "raw_loss_finite", "every_factor_moves")
    mechanism = "all_labels_masked"
    step = 1

    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        if target.questions is None:
            raise NotApplicableError("the target asks no questions, so it need not have a tokenizer")
        with super().inject(target) as faulty:
            yield faulty

    def alter(self, trainer: Trainer) -> None:
        turns = [{"role": "user", "content": "1 + 2 ="}, {"role": "assistant", "content": "3"}]

        def mask(batch: Any) -> None:
            encoded = trainer.processing_class.apply_chat_template(
                turns, chat_template=self.template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            if not sum(encoded["assistant_masks"]):
                batch["labels"].fill_(IGNORED)

        collating(trainer, mask)


class CompletionTemplateNotFound(Fault):
    """The mark of the answer is not found in some rows, depending on their tokens, and these drop out of the loss."""

    source = "https://github.com/huggingface/trl/issues/1920"
    injects = "sets all labels to -100 in 30 % of the rows, chosen by their tokens"
    reported_by = ("supervision_audit",)
    mechanism = "rows_without_labels"

    def alter(self, trainer: Trainer) -> None:
        def search(batch: Any) -> None:
            for row, labels in zip(batch["input_ids"].tolist(), batch["labels"], strict=True):
                if sum(i * (place % 7 + 1) for place, i in enumerate(row)) % 10 < 3:
                    labels.fill_(IGNORED)

        collating(trainer, search)


class LabelsShiftedTwice(Fault):
    """The caller shifts the labels and the model shifts them again: it learns token t+2."""

    source = "https://github.com/huggingface/transformers/issues/47394"
    injects = "shifts the labels of every collated batch: labels[1:] + [-100]"
    reported_by = ("supervision_audit", "answers_beat_base", "strict_answers")
    mechanism = "labels_shifted_twice"
    steps = 100
    asks = True

    def alter(self, trainer: Trainer) -> None:
        def shift(batch: Any) -> None:
            batch["labels"] = batch["labels"].roll(-1, dims=1)
            batch["labels"][:, -1] = IGNORED

        collating(trainer, shift)


class PromptNotMasked(Fault):
    """The loss mask is missing and falls back to ones: the model also learns the prompts."""

    source = "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/3359"
    injects = "sets labels = input_ids in the prompts"
    reported_by = ("supervision_audit",)
    mechanism = "prompt_supervised"
    step = 1
    asks = True

    def alter(self, trainer: Trainer) -> None:
        def unmask(batch: Any) -> None:
            prompt = in_prompt(batch)
            batch["labels"][prompt] = batch["input_ids"][prompt]

        collating(trainer, unmask)


class DuplicateBos(Fault):
    """The template renders BOS, and the tokenizer adds another."""

    source = "https://github.com/unslothai/unsloth/issues/2648"
    injects = "inserts a second BOS before each row, in training alone"
    reported_by = ("supervision_audit", "prompt_is_prefix")
    mechanism = "duplicate_bos"
    step = 1
    asks = True

    def alter(self, trainer: Trainer) -> None:
        bos = getattr(trainer.processing_class, "bos_token_id", None)
        ids = trainer.train_dataset[0].get("input_ids") if hasattr(trainer.train_dataset, "__getitem__") else None
        if bos is None or ids is None or int(ids[0]) != bos:
            raise NotApplicableError("the target's rows do not begin with a BOS token")

        def double(batch: Any) -> None:
            ids, mask = batch["input_ids"], batch.get("attention_mask")
            _insert(batch, ids.new_zeros(len(ids)) if mask is None else mask.int().argmax(1), int(bos))

        collating(trainer, double)


class TokenIdOutOfRange(Fault):
    """The tokenizer knows more tokens than the embedding has rows."""

    source = "https://github.com/huggingface/transformers/issues/1848"
    injects = "writes an id past the end of the embedding into the third micro-batch"
    silent = False
    reported_by = ("supervision_audit",)
    mechanism = "token_id_out_of_range"
    step = 3

    def alter(self, trainer: Trainer) -> None:
        count = trainer.model.get_input_embeddings().weight.shape[0]
        calls = itertools.count(1)

        def overshoot(batch: Any) -> None:
            if next(calls) == 3:
                batch["input_ids"][0, int(in_prompt(batch)[0].int().argmax()) + 1] = count + 35

        collating(trainer, overshoot)


class PromptAnswerBoundaryMerge(Fault):
    """A row's prompt ends in other tokens than the prompt for generation, as if a space belonged to neither side."""

    source = "https://github.com/areal-project/AReaL/pull/1427"
    injects = "inserts one more token before the answer, in training alone"
    reported_by = ("prompt_is_prefix", "answers_beat_base")
    mechanism = "prompt_tokens_differ"
    steps = 100
    asks = True

    def alter(self, trainer: Trainer) -> None:
        tokenizer: Any = trainer.processing_class
        if not callable(tokenizer):
            raise NotApplicableError("the target has no tokenizer")
        spaces = tokenizer(" ", add_special_tokens=False)["input_ids"]
        token = spaces[0] if spaces else tokenizer.unk_token_id
        if token is None:
            raise NotApplicableError("the tokenizer has no token for a space")
        collating(trainer, lambda batch: _insert(batch, supervised(batch).int().argmax(1), int(token)))


class FullyMaskedAttentionRow(Fault):
    """A query has no key to attend to: its softmax is over nothing but -inf."""

    source = "https://github.com/pytorch/pytorch/issues/103749"
    injects = "pads batches on the left, with a causal float mask that is -inf in all of a padding token's row"
    reported_by = ("context_independence", "raw_loss_finite")
    mechanism = "attention_row_fully_masked"

    def alter(self, trainer: Trainer) -> None:
        dtype = next(trainer.model.parameters()).dtype
        wrap(trainer, "data_collator", lambda collate, features: _padded_left(collate(features), dtype))


class PackingCrossContamination(Fault):
    """Packed rows attend to each other, because an attention mask of ones switches off what separates them."""

    source = "https://github.com/huggingface/trl/issues/1230"
    injects = "packs every two rows of a batch into one, with position_ids that restart and an attention_mask of ones"
    reported_by = ("context_independence",)
    mechanism = "packed_rows_see_each_other"

    def alter(self, trainer: Trainer) -> None:
        wrap(trainer, "data_collator", lambda collate, features: _packed(collate(features)))


class EvalNanFiltered(Fault):
    """Evaluation batches whose loss is NaN are left out of eval_loss."""

    source = "https://github.com/meta-llama/llama-cookbook/issues/133"
    injects = "sets all labels to -100 in every third evaluation batch, and evaluates every four steps"
    reported_by = ("eval_and_decode_finite",)
    mechanism = "evaluation_rows_all_masked"

    def alter(self, trainer: Trainer) -> None:
        if trainer.eval_dataset is None:
            trainer.eval_dataset = list(itertools.islice(iter(trainer.train_dataset), 24))
        trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 4
        trainer.args.per_device_eval_batch_size = 2

        def masked(get_eval_dataloader: Any, dataset: Any = None) -> Any:
            loader = get_eval_dataloader(dataset)
            return loader if dataset is trainer.train_dataset and dataset is not None else _Masking(loader)

        wrap(trainer, "get_eval_dataloader", masked)


class SingleNonfiniteBatchPoisonsRun(Fault):
    """One infinite loss puts NaN into weights and moments, which stays there, and the run goes on."""

    source = "https://github.com/facebookresearch/habitat-lab/pull/2229"
    injects = "multiplies the loss of step 3 by inf"
    silent = False
    reported_by = ("raw_loss_finite", "gradients_finite", "weights_and_moments_finite")
    mechanism = "nonfinite_batch"
    step = 3

    def alter(self, trainer: Trainer) -> None:
        multiply_loss(trainer, lambda: math.inf, step=3)


def _insert(batch: Any, places: Tensor, token: int) -> None:
    """Insert `token`, unsupervised, before the place of each row, shape (rows,); the batch grows by one column.

    `position_ids` are dropped, so that the model makes its own.
    """
    for name, fill in (("input_ids", token), ("labels", IGNORED), ("attention_mask", 1)):
        if name in batch:
            rows = zip(batch[name], places.tolist(), strict=True)
            batch[name] = torch.stack([torch.cat([r[:p], r.new_tensor([fill]), r[p:]]) for r, p in rows])
    batch.pop("position_ids", None)


def _padded_left(batch: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The rows of `batch`, padded on the left, with an attention mask of shape (rows, 1, tokens, tokens)."""
    ids, labels = batch["input_ids"], batch["labels"]
    held = batch.get("attention_mask", torch.ones_like(ids)).bool()
    rows, lengths = len(ids), held.sum(1)
    # The longest row is padded too
    width = int(lengths.max()) + 2
    shown = torch.zeros(rows, width, dtype=torch.bool)
    new_ids, new_labels = ids.new_zeros(rows, width), labels.new_full((rows, width), IGNORED)
    for i, length in enumerate(lengths.tolist()):
        place = slice(width - length, width)
        new_ids[i, place], new_labels[i, place], shown[i, place] = ids[i][held[i]], labels[i][held[i]], True
    seen = torch.ones(width, width, dtype=torch.bool).tril() & shown[:, None, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
    return {"input_ids": new_ids, "labels": new_labels, "attention_mask": mask}


def _packed(batch: Any) -> dict[str, Tensor]:
    """Every two rows of `batch` in one."""
    ids, labels = batch["input_ids"], batch["labels"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    rows = [(i[m], w[m], torch.arange(int(m.sum()))) for i, w, m in zip(ids, labels, mask, strict=True)]
    # The last token of a row does not predict the first of the next
    for _, row_labels, _ in rows:
        row_labels[0] = IGNORED
    packs = [[torch.cat(parts) for parts in zip(*rows[i : i + 2], strict=True)] for i in range(0, len(rows), 2)]
    width = max(len(pack[0]) for pack in packs)

    def filled(index: int, fill: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(p[index], (0, width - len(p[index])), value=fill) for p in packs])

    return {
        "input_ids": filled(0, 0),
        "labels": filled(1, IGNORED),
        "position_ids": filled(2, 0),
        "attention_mask": torch.stack([torch.arange(width) < len(p[0]) for p in packs]).long(),
    }


class _Masking:
    """A dataloader, with the labels of every third batch masked."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(self.loader):
            if i % 3 == 1 and "labels" in batch:
                batch["labels"] = torch.full_like(batch["labels"], IGNORED)
            yield batch

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
