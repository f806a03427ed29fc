"""The Trainer of the app: the arithmetic of the plain one, without what it does in vain.

- Rows of like length share a micro-batch, so that little is padded. Which rows form an optimizer step stays as drawn.
- Logits are computed where a label is, and nowhere else: the head is as large as half of a small model.
- No cache of keys and values is filled: nothing is generated while training.
- Frozen matrices are held in the type that autocast would cast them to at every use.

None of it changes the loss or a gradient by more than the order of its sums does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from itertools import islice
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import nn
from torch.utils.data import Sampler
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from .data import IGNORED


class StepsByLength(Sampler[int]):
    """Row numbers in the order of `drawn`, but that the `step` rows of each optimizer step go from long to short.

    The longest first, so that memory that does not suffice is missed at once.
    """

    def __init__(self, drawn: SeedableRandomSampler, lengths: Sequence[int], step: int) -> None:
        self.drawn, self.lengths, self.step = drawn, lengths, step

    def __len__(self) -> int:
        return len(self.drawn)

    def __iter__(self) -> Iterator[int]:
        rows = iter(self.drawn)
        while group := list(islice(rows, self.step)):
            yield from sorted(group, key=self.lengths.__getitem__, reverse=True)

    def set_epoch(self, epoch: int) -> None:
        """Another pass: another order."""
        self.drawn.set_epoch(epoch)


class AnswerTrainer(Trainer):
    """A Trainer for rows of which only the answer is supervised."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "random" or not isinstance(dataset, Sized) or self.args.world_size > 1:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        drawn = SeedableRandomSampler(dataset, data_seed=seed)  # as accelerate would draw for the plain Trainer
        lengths = [len(row["input_ids"]) for row in dataset]  # type: ignore[attr-defined]
        return StepsByLength(drawn, lengths, self.args.train_batch_size * self.args.gradient_accumulation_steps)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the supervised tokens, from their logits alone where the model's own loss allows it."""
        inner = self.accelerator.unwrap_model(model)
        head = None if return_outputs or self.label_smoother or self.compute_loss_func else supervised_head(inner)
        labels = inputs.get("labels")
        if head is None or labels is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        following = labels[:, 1:]
        wanted = following != IGNORED
        with_labels = head.register_forward_pre_hook(lambda _, given: (given[0][:, :-1][wanted].unsqueeze(0),))
        try:
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
        finally:
            with_labels.remove()
        return ForCausalLMLoss(
            outputs.logits,
            None,
            vocab_size=outputs.logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
            shift_labels=following[wanted].unsqueeze(0),
        )


def supervised_head(model: Any) -> nn.Module | None:
    """The layer that gives logits, where each position's are computed alone and the loss is the common one; else None.

    A model with a loss of its own, or with an encoder, gets all of its logits.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(inner, "loss_function", None) is not ForCausalLMLoss or inner.config.is_encoder_decoder:
        return None
    head: nn.Module | None = inner.get_output_embeddings()
    return head


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Hold the frozen matrices of linear layers in `dtype`, the type that autocast computes them in.

    Embeddings, norms and adapters stay as they are: autocast leaves their arithmetic alone. A head that shares its
    matrix with the embedding gets its own.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))


