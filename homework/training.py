"""The Trainer of the app: the arithmetic of the plain one, without its wasted work.

- Padding is computed only in attention (see `speed/packing`).
- Logits are computed only where there is a label: the head is a quarter of a small model.
- Below float32, a little padding fills a micro-batch up to a size that others share, for which oneDNN has a kernel.
- No key-value cache is filled: training generates nothing.
- LoRA's sums, norms, rotary embeddings and the loss take fewer passes (see `speed/fused`).
- Frozen matrices can be held in the dtype that autocast casts them to at every use (`hold`).

The same rows form each optimizer step, and losses and gradients differ only by the order of their sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from .speed.fused import fuse, join_siblings, rotaries, rotated, token_losses
from .speed.packing import Rows, base_of, bucket_padding, can_pack, packed
from .task.data import IGNORED

_KEYS = {"input_ids", "attention_mask", "labels"}


# mypy takes transformers' Trainer for Any
class AnswerTrainer(Trainer):  # type: ignore[misc]
    """A Trainer for rows of which only the answer is supervised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        batch = self._first_rows()
        fuse(model)
        join_siblings(model, base_of(model), batch)
        self._can_checkpoint = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        on_cpu = model.device.type == "cpu"
        # on a GPU, finding the tokens would wait for the device; the second forward pass of gradient checkpointing
        # would come after the rows are forgotten
        self._packs = on_cpu and not self.args.gradient_checkpointing and bool(batch) and can_pack(model, batch)
        self._rotaries = rotaries(model) if self._packs else []
        # below float32 oneDNN makes a kernel for each new size of a product, which takes longer than the product
        small = self.args.bf16 or self.args.fp16 or next(model.parameters()).dtype.itemsize < 4
        self._bucketed = small and on_cpu

    def _first_rows(self) -> dict[str, Tensor]:
        """Return two rows as a batch for trials; empty where the dataset is a stream, whose rows it would use up."""
        rows = self.train_dataset
        known = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
        return self.data_collator([rows[i] for i in range(min(2, len(rows)))]) if known and len(rows) else {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the mean loss of the supervised tokens, from their logits alone where the model's loss allows it."""
        own = return_outputs or self.label_smoother or self.compute_loss_func or inputs.keys() != _KEYS
        head = None if own or not model.training else _head(self.accelerator.unwrap_model(model))
        if head is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # the Trainer's own method does the rest: it knows by what to multiply a loss among several processes
        return super().compute_loss(partial(self._supervised, model, head), inputs, return_outputs, num_items_in_batch)

    def _supervised(
        self, model: Any, head: nn.Module, *, num_items_in_batch: Any = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """Return what the model would return for `inputs`, without the logits that no label needs."""
        outer = self.accelerator.unwrap_model(model)
        given, following, within = self._forward_inputs(outer, inputs)
        following = following.flatten()
        wanted = (following != IGNORED).nonzero()[:, 0]
        supervised = len(wanted)
        # the bucket is filled with copies of the first token, whose losses are dropped
        if self._bucketed:
            wanted = torch.cat([wanted, wanted[:1].expand(bucket_padding(supervised))])
        targets = following[wanted]
        found: list[Tensor] = []

        def find(module: nn.Module, called_with: Any, output: Any) -> None:
            """Reach the logits before accelerate copies all of them, and leave those of the labels to other hooks."""
            if not found:
                found.append(token_losses(output.logits.squeeze(0), targets)[:supervised])
                output.logits = output.logits[:, :supervised]

        inner = base_of(outer)
        # depending on the adapter's task, peft calls the base model with its hooks, or a wrapper of its layers
        places = [outer] if inner is outer else [inner, outer.base_model, outer]
        hooks = [module.register_forward_hook(find, prepend=True) for module in places]
        hooks.append(head.register_forward_pre_hook(lambda _, hidden: (hidden[0].flatten(0, 1)[wanted][None],)))
        try:
            with within:
                model(**given, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        [losses] = found
        # as in transformers' own loss: the mean of this micro-batch, or its share of the mean of the step
        loss = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        return {"loss": loss}

    def _forward_inputs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor, Any]:
        """Return the model's inputs, the label that follows each token, and the context to call the model in."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        following = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        # checkpointing can also be switched on at the model; a label on padding would be lost
        checkpointed = any(m.gradient_checkpointing for m in self._can_checkpoint)
        if not self._packs or checkpointed or ((following != IGNORED) & (mask == 0)).any():
            return {"input_ids": ids, "attention_mask": mask}, following, contextlib.nullcontext()
        rows = Rows.of(mask, bucketed=self._bucketed)
        inputs = {"input_ids": rows.flat(ids), "position_ids": rows.positions()}
        return inputs, rows.flat(following), self._unpadded(model, rows)

    @contextlib.contextmanager
    def _unpadded(self, model: Any, rows: Rows) -> Iterator[None]:
        with packed(model, rows), rotated(self._rotaries):
            yield


def _head(model: Any) -> nn.Module | None:
    """Return the layer that computes the logits; None where the model's loss needs all of them."""
    inner = base_of(model)
    if getattr(inner, "loss_function", None) is not ForCausalLMLoss or inner.config.is_encoder_decoder:
        return None
    # the model would add its router's loss to that of the tokens
    if getattr(inner.config, "output_router_logits", False):
        return None
    head: nn.Module | None = inner.get_output_embeddings()
    return head


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the frozen matrices of linear layers to `dtype`, the one that autocast computes them in.

    Embeddings, norms and adapters keep theirs: autocast leaves their arithmetic alone. A head that shares its matrix
    with the embedding gets a copy.
    """
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not any(p.requires_grad for p in layer.parameters()):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                setattr(layer, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
