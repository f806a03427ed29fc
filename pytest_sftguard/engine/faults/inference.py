"""Faults in kernels and buffers of the model, and in how answers are generated and read."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults._collating import IGNORED
from pytest_sftguard.engine.faults._training import wrap
from pytest_sftguard.engine.faults.fault import Fault


class FlashAttentionBackwardNan(Fault):
    """A fused attention kernel is right in the forward pass, and gives NaN gradients of the queries."""

    source = "https://github.com/Dao-AILab/flash-attention/issues/1052"
    injects = "attends with a kernel of its own, sdpa with a backward pass that gives NaN for the queries"
    reported_by = ("path_equivalence", "gradients_finite")
    mechanism = "attention_kernel_backward_not_finite"
    step = 1
    tensor = "q_proj"
    silent = False

    kernel = "varlen_kernel"

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        ALL_ATTENTION_FUNCTIONS.register(self.kernel, _nan_backward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(self.kernel, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        try:
            with super().inject(target) as faulty:
                yield faulty
        finally:
            for table in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
                type(table)._global_mapping.pop(self.kernel, None)

    def alter(self, trainer: Trainer) -> None:
        model = trainer.model
        (model.get_base_model() if hasattr(model, "get_base_model") else model).set_attn_implementation(self.kernel)


class FusedLossWrongGradient(Fault):
    """A fused cross-entropy gives the right loss and a wrong gradient."""

    source = "https://github.com/linkedin/Liger-Kernel/issues/968"
    injects = "computes cross-entropy with a backward pass that weighs every token like the first supervised one"
    reported_by = ("path_equivalence", "answers_beat_base")
    mechanism = "loss_gradient_wrong"

    def alter(self, trainer: Trainer) -> None:
        def fused(
            compute_loss: Any,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
            **kwargs: Any,
        ) -> Any:
            labels = inputs.get("labels")
            if labels is None or labels.ndim != 2:
                return compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
            outputs = model(**{k: v for k, v in inputs.items() if k != "labels"})
            wanted = labels[:, 1:]
            cross_entropy: Any = _CrossEntropy.apply
            losses = cross_entropy(outputs.logits[:, :-1].float(), wanted)
            count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            loss = losses.sum() / count
            return (loss, outputs) if return_outputs else loss

        wrap(trainer, "compute_loss", fused)


class RopeLowPrecision(Fault):
    """A finished model is cast with its rotary frequencies, and positions above 256 cannot be told apart."""

    source = "https://github.com/huggingface/transformers/pull/29285"
    injects = "casts every buffer of rotary frequencies to bfloat16, as model.to(torch.bfloat16) does"
    reported_by = ("context_independence", "precision_agreement")
    mechanism = "rotary_frequencies_in_half_precision"
    precision = "bf16-true"

    def alter(self, trainer: Trainer) -> None:
        for module in trainer.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if name.endswith("inv_freq"):
                    setattr(module, name, buffer.to(torch.bfloat16))


class RightPaddedGeneration(Fault):
    """A batch of prompts is padded on the right, and the next token is predicted from padding."""

    source = "https://github.com/huggingface/transformers/issues/26569"
    injects = "pads batches of prompts on the right, in the tokenizer and in the target's own `generate`"
    reported_by = ("decode_batch_invariance", "answers_beat_base", "strict_answers")
    mechanism = "padded_on_the_right"
    asks = True

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        with super().inject(target) as faulty:
            own = target.generate
            yield faulty if own is None else dataclasses.replace(faulty, generate=_padding_right(own))

    def alter(self, trainer: Trainer) -> None:
        tokenizer: Any = trainer.processing_class
        if hasattr(tokenizer, "padding_side"):
            original = type(tokenizer)

            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                if "padding_side" in kwargs:
                    kwargs["padding_side"] = "right"
                return original.__call__(self, *args, **kwargs)

            always_right = property(lambda self: "right", lambda self, side: None)
            members = {"padding_side": always_right, "__call__": call}
            tokenizer.__class__ = type(original.__name__, (original,), members)


class NanSlipsThroughComparison(Fault):
    """`abs(nan - right) > limit` is False: a NaN answer passes every comparison that looks for the error."""

    source = "https://github.com/huggingface/trl/issues/6702"
    injects = "replaces parse_answer with one that returns NaN for every text"
    reported_by = ("strict_answers", "evidence_complete")
    mechanism = "nan_taken_for_a_number"
    asks = True

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        own = target.parse_answer
        yield target if own is None else dataclasses.replace(target, parse_answer=lambda text: math.nan)


class AnswerParserAcceptsJunk(Fault):
    """A parser of answers finds a number in every text, wherever it stands."""

    source = "https://github.com/EleutherAI/lm-evaluation-harness/issues/2707"
    injects = "replaces parse_answer with float() of the last match of a generous pattern, and 0.0 without a match"
    reported_by = ("strict_answers",)
    mechanism = "parser_accepts_junk"
    asks = True

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        def parse_answer(text: str) -> float:
            found = re.findall(r"nan|inf|[-+]?[0-9]+\.?[0-9]*", text, re.IGNORECASE)
            return float(found[-1]) if found else 0.0

        yield dataclasses.replace(target, parse_answer=parse_answer)


def _nan_backward(module: Any, query: Any, *args: Any, **kwargs: Any) -> Any:
    if query.requires_grad:
        query = query.clone()
        query.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *args, **kwargs)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token, 0 for ignored ones: shapes (rows, tokens, vocabulary) and (rows, tokens)."""

    @staticmethod
    def forward(context: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the right losses."""
        context.save_for_backward(logits, labels)
        log_probabilities = logits.log_softmax(-1)
        losses = -log_probabilities.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        return torch.where(labels == IGNORED, 0.0, losses)

    @staticmethod
    def backward(context: Any, grad_losses: Tensor) -> Any:
        """Return the wrong gradient: that of the first supervised token's loss stands for all."""
        logits, labels = context.saved_tensors
        first = grad_losses[labels != IGNORED].reshape(-1)
        wanted = torch.nn.functional.one_hot(labels.clamp_min(0), logits.shape[-1])
        return (logits.softmax(-1) - wanted) * (first[0] if len(first) else 0.0), None


def _padding_right(original: Callable[..., Any]) -> Callable[..., Any]:
    """The target's `generate`, with the padding of its batches moved behind the prompts."""

    def generate(model: Any, tokenizer: Any, prompts: list[str]) -> Any:
        def moved(own: Any, *args: Any, **kwargs: Any) -> Any:
            ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
            if ids is not None and mask is not None:
                kwargs |= {"input_ids": ids.clone(), "attention_mask": mask.clone()}
                for i, row in enumerate(mask):
                    shift = -int(row.argmax())
                    kwargs["input_ids"][i] = ids[i].roll(shift)
                    kwargs["attention_mask"][i] = row.roll(shift)
                args = ()
            return own(*args, **kwargs)

        wrap(model, "generate", moved)
        try:
            return original(model=model, tokenizer=tokenizer, prompts=prompts)
        finally:
            del model.generate

    return generate
