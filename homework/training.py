"""The Trainer of the app: the arithmetic of the plain one, without what it does in vain.

- No padding is computed where tokens do not meet (see packing/).
- Logits are computed where a label is, and nowhere else: the head is a quarter of a small model.
- Below float32 a few more of both fill a micro-batch up to a size that others have, for which there is a kernel.
- No cache of keys and values is filled: nothing is generated while training.
- LoRA's sums, norms, rotary positions and the loss take fewer passes (see fused/).
- Frozen matrices can be held in the type that autocast casts them to at every use (`hold`).

None of it changes which rows form an optimizer step, nor a loss or a gradient by more than the order of its sums does.
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
from .speed.packing import Rows, base_of, can_pack, missing, packed
from .task.data import IGNORED

_KEYS = {"input_ids", "attention_mask", "labels"}


class AnswerTrainer(Trainer):  # type: ignore[misc] # transformers' is Any to mypy
    """A Trainer for rows of which only the answer is supervised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model: Any = self.model
        batch = self._first_rows()
        fuse(model)
        join_siblings(model, base_of(model), batch)
        self._can_checkpoint = [m for m in model.modules() if hasattr(m, "gradient_checkpointing")]
        self._packs = (
            model.device.type == "cpu"  # elsewhere finding the tokens would wait for the device
            and not self.args.gradient_checkpointing  # whose second forward pass comes when it is too late
            and bool(batch)
            and can_pack(model, batch)
        )
        self._rotaries = rotaries(model) if self._packs else []
        # below float32 oneDNN makes a kernel for each new size of a product, which takes longer than the product
        small = self.args.bf16 or self.args.fp16 or next(model.parameters()).dtype.itemsize < 4
        self._like_sizes = small and model.device.type == "cpu"

    def _first_rows(self) -> dict[str, Tensor]:
        """A batch to try things out on; empty where rows cannot be had without beginning to read them."""
        rows = self.train_dataset
        known = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
        return self.data_collator([rows[i] for i in range(min(2, len(rows)))]) if known and len(rows) else {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the supervised tokens, from their logits alone where the model's own loss allows it."""
        own = return_outputs or self.label_smoother or self.compute_loss_func or inputs.keys() != _KEYS
        head = None if own or not model.training else _head(self.accelerator.unwrap_model(model))
        if head is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # the Trainer's own method does the rest: what a loss is multiplied by among several processes is its to know
        return super().compute_loss(partial(self._supervised, model, head), inputs, return_outputs, num_items_in_batch)

    def _supervised(
        self, model: Any, head: nn.Module, *, num_items_in_batch: Any = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """What the model itself would return for `inputs`, but for the logits that nobody asks for."""
        outer = self.accelerator.unwrap_model(model)
        given, following, within = self._forward_inputs(outer, inputs)
        following = following.flatten()
        wanted = (following != IGNORED).nonzero()[:, 0]
        supervised = len(wanted)
        if self._like_sizes:  # the first one some times more, whose losses are dropped
            wanted = torch.cat([wanted, wanted[:1].expand(missing(supervised))])
        targets = following[wanted]
        found: list[Tensor] = []

        def find(module: nn.Module, called_with: Any, output: Any) -> None:
            """First at the logits: above, accelerate copies all of them, and whoever looks finds those of labels."""
            if not found:
                found.append(token_losses(output.logits.squeeze(0), targets)[:supervised])
                output.logits = output.logits[:, :supervised]

        inner = base_of(outer)
        # by the task of an adapter, peft calls the model with its hooks, or what is wrapped around its layers
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
        # as transformers' own loss: the mean of this micro-batch, or its share of the mean of the step
        loss = losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
        return {"loss": loss}

    def _forward_inputs(self, model: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Any], Tensor, Any]:
        """What the model is called with, the label that follows each of its tokens, and in which context."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        following = nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED)
        checkpointed = any(m.gradient_checkpointing for m in self._can_checkpoint)  # by the model's own switch
        if not self._packs or checkpointed or ((following != IGNORED) & (mask == 0)).any():  # a label after padding
            return {"input_ids": ids, "attention_mask": mask}, following, contextlib.nullcontext()
        rows = Rows.of(mask, like_sizes=self._like_sizes)
        return (
            {"input_ids": rows.flat(ids), "position_ids": rows.positions()},
            rows.flat(following),
            self._in_line(model, rows),
        )

    @contextlib.contextmanager
    def _in_line(self, model: Any, rows: Rows) -> Iterator[None]:
        with packed(model, rows), rotated(self._rotaries):
            yield


def _head(model: Any) -> nn.Module | None:
    """The layer that gives logits, where the model's loss is the common one; else None, and all logits are needed."""
    inner = base_of(model)
    if getattr(inner, "loss_function", None) is not ForCausalLMLoss or inner.config.is_encoder_decoder:
        return None
    if getattr(inner.config, "output_router_logits", False):  # the model adds its router's loss to that of the tokens
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
