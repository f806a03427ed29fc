"""Rows alone and in a batch: the logits of a token must depend on nothing but the tokens before it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pytest_sftguard.engine.adapter.adapters import config_of, eager
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Started, Trained
from pytest_sftguard.records import ComparisonRecord, ContextRecord, Names

_MICRO_BATCHES = 2
_ROWS = 4
"""Rows of each micro-batch: every row costs one forward pass per attention implementation."""
_LEAST_WIDTH = 16
"""Below 16 tokens sdpa on a CPU hides NaN (pytorch#141128)."""
_SCORES = 1 << 28
"""Logits of single rows that are kept, 1 GB in float32: rows beyond are not compared, except for the first."""
_LENGTH_DEPENDENT = ("dynamic", "longrope")
_RECURRENT = ("linear_attention", "mamba", "recurrent", "conv")
"""Parts of the names that configurations give to layers with a state."""
_LEAST_SEEN = -5e3
"""Numbers below are those of a mask that is added to the scores: what they hide is not seen. Float16's least is -65504,
and biases by distance stay above."""
_ALONE_ALREADY = "rows came alone and whole, under masks of their own: there is nothing to compare them with"


class Context(Look[Trained]):
    """Runs the trained model on rows of the training as they were batched, alone, and padded on either side."""

    def attach(self, started: Started) -> None:
        """Remember what the model is given in training: the Trainer may drop or change what was collated."""
        self._given: list[dict[str, Any]] = []
        self._hooks: list[Any] = []

        def remember(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            if module.training and len(self._given) < _MICRO_BATCHES and torch.is_grad_enabled():
                with self.aside():
                    self._given.append(_as_given(module, args, kwargs))

        # a hook would be compiled too
        if not started.trainer.args.torch_compile:
            self._hooks.append(started.trainer.model.register_forward_pre_hook(remember, with_kwargs=True))

    def conclude(self, reached: Trained) -> dict[str, Any]:
        """Compare logits, and check rotary frequencies and masks."""
        for hook in self._hooks:
            hook.remove()
        trained: Any = reached.trained_model
        # the model was compiled, or its forward method was called without its hooks
        if not self._given:
            accepted = forwards.accepts(trained)
            self._given = [
                _as_given(trained, (), {k: v for k, v in batch.items() if k in accepted})
                for batch in reached.batches[:_MICRO_BATCHES]
            ]
        masks = [m for given in self._given for m in given.values() if isinstance(m, Tensor) and m.ndim == 4]
        record = ContextRecord(
            arithmetic="", asked=0, masks=len(masks), blind_queries=sum(map(_blind, masks)), **_rotary(trained)
        )
        names = {k for given in self._given for k, v in given.items() if isinstance(v, Tensor)}
        record = dataclasses.replace(
            record,
            left_out=_incomparable(trained, self._given),
            inputs=tuple(sorted(names)),
            padding_seen=sum(_padding_seen(trained, given) for given in self._given),
            recurrent=_recurrent(trained),
        )
        if record.left_out:
            return self._without_comparisons(record)
        autocast: Any = reached.trainer.accelerator.autocast
        with forwards.evaluating(trained), autocast():
            record = dataclasses.replace(record, overflowed=self._overflowed(trained))
        with forwards.widened(trained, reached.mode) as arithmetic:
            # flash attention has no float32
            if "flash" in forwards.attention_of(trained):
                arithmetic = reached.mode.compute_dtype
            else:
                autocast = contextlib.nullcontext
            with forwards.evaluating(trained), autocast():
                return self._compare(reached, dataclasses.replace(record, arithmetic=arithmetic))

    def _compare(self, reached: Trained, record: ContextRecord) -> dict[str, Any]:
        model: Any = reached.trained_model
        if record.arithmetic in ("bfloat16", "float16") and forwards.has_experts(model):
            return {"context": dataclasses.replace(record, left_out="rounding changes which experts are chosen")}
        given = [forwards.in_float32(g) if record.arithmetic == "float32" else g for g in self._given]
        batches = [_Batch(model, g) for g in given]
        if any(_others(b.given) and s.packed for b in batches for s in b.segments):
            return self._without_comparisons(
                dataclasses.replace(
                    record, left_out="this look needs to know what else belongs to which packed sequence"
                )
            )
        comparisons = [c for batch in batches for c in batch.compare()]
        if not comparisons:
            return self._without_comparisons(dataclasses.replace(record, left_out=_ALONE_ALREADY))
        return {"context": dataclasses.replace(record, asked=len(comparisons), comparisons=tuple(comparisons))}

    def _without_comparisons(self, record: ContextRecord) -> dict[str, Any]:
        """Return the record for its rotary frequencies; raises InapplicableError where there are none."""
        if not record.rotary:
            raise InapplicableError(record.left_out)
        return {"context": record}

    def _overflowed(self, model: Any) -> int:
        bad = 0
        for given in self._given:
            batch = _Batch(model, given)
            logits = batch.forward(**given)
            bad += sum(int(forwards.nonfinite(logits[s.row, s.places]).sum()) for s in batch.segments)
        return bad


def _as_given(model: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return what `forwards.given` does, with `use_cache` made explicit."""
    given = forwards.given(model, args, kwargs)
    if "use_cache" in forwards.accepts(model) and "use_cache" not in given:
        # with a cache, transformers does not recognise packed rows by their positions; checkpointing uses none
        without = forwards.checkpointing(model)
        given["use_cache"] = not without and bool(getattr(forwards.inner(model).config, "use_cache", False))
    return given


def _incomparable(model: Any, given: list[dict[str, Any]]) -> str:
    """Return why the rows of this model cannot be compared; empty where they can."""
    config = getattr(forwards.inner(model), "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if not given:
        return "no forward pass of the model was seen in training"
    if not all(isinstance(g.get("input_ids"), Tensor) and g["input_ids"].ndim == 2 for g in given):
        return "the model is not given rows of input_ids"
    model_class = type(forwards.inner(model))
    generates = hasattr(model_class, "prepare_inputs_for_generation") and "MaskedLM" not in model_class.__name__
    if not generates or getattr(config, "is_encoder_decoder", False):
        return "the model is not a causal language model: it does not predict each token from those before it"
    if rope.get("rope_type") in _LENGTH_DEPENDENT:
        return f"rotary frequencies of the type {rope['rope_type']} depend on the length of the batch by design"
    if any("capacity" in name for name in vars(config)):
        return "experts of limited capacity drop tokens depending on the rest of the batch, by design"
    if not all(_is_known_mask(g.get("attention_mask"), g["input_ids"]) for g in given):
        return "the attention mask does not show which tokens of a row see each other"
    if any(g["position_ids"].ndim != 2 for g in given if isinstance(g.get("position_ids"), Tensor)):
        return "positions of several dimensions do not show where packed sequences begin"
    if getattr(config_of(model), "is_prompt_learning", False) and any(map(_pads_in_front, given)):
        return "rows are padded on the left, between a learned prompt and their tokens, which the padding moves away"
    for name, value in (pair for g in given for pair in _others(g) if len(pair[1]) != len(g["input_ids"])):
        return f"this look needs to know which part of {name}, of length {len(value)}, belongs to which row"
    return ""


def _pads_in_front(given: dict[str, Any]) -> bool:
    """Whether a row begins with tokens that its mask hides."""
    mask = given.get("attention_mask")
    return isinstance(mask, Tensor) and mask.ndim == 2 and bool(((mask[:, 0] == 0) & mask.any(1)).any())


def _others(given: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors beside those with a part per token, by name, such as pictures."""
    ids = given["input_ids"]
    of_tokens = ("input_ids", "attention_mask", "position_ids")
    named = [(k, v) for k, v in given.items() if k not in of_tokens and isinstance(v, Tensor) and v.ndim]
    return [(k, v) for k, v in named if v.shape[:2] != ids.shape]


def _is_known_mask(mask: Any, ids: Tensor) -> bool:
    """Whether there is no mask, one number per token, or one per query and key for each row."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor):
        return False
    rows, tokens = ids.shape
    square = mask.ndim == 4 and mask.shape[0] in (1, rows) and mask.shape[2:] == (tokens, tokens)
    return mask.shape == ids.shape or square


@dataclass
class _Segment:
    """Tokens of one row that belong together."""

    row: int
    """The row of the batch."""
    places: Tensor
    """Places of the tokens in the row, of shape (tokens,)."""
    packed: bool
    """Whether the row holds other segments beside it."""


class _Batch:
    """One micro-batch as the model was given it, and its rows alone."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.given = model, given
        self.ids: Tensor = given["input_ids"]
        self.accepts = forwards.accepts(model)
        self.mask = given.get("attention_mask")
        self.positions = given.get("position_ids")
        if self.positions is not None and len(self.positions) != len(self.ids):
            self.positions = self.positions.expand(len(self.ids), -1)
        self.pad = forwards.padding_id(model)
        self.segments = [s for row in range(min(_ROWS, len(self.ids))) for s in self._segments(row)]
        self.segments = _affordable(self.segments[: 2 * _ROWS], model)
        prompt = getattr(config_of(model), "is_prompt_learning", False)
        self.sides = ("right",) if prompt else ("left", "right")
        """Sides to pad on. A learned prompt stays in front of the padding, so that its distance to the row changes."""
        if prompt:
            # peft warns of positions, and leaves them out
            self.accepts.discard("position_ids")
        self.reference: list[Tensor] = []

    def compare(self) -> Iterator[ComparisonRecord]:
        """Compare rows as trained on, and padded on either side, under the model's own attention and under eager."""
        with torch.no_grad():
            self.reference = [self._alone(s) for s in self.segments]
            own = forwards.attention_of(self.model)
            yield from self._settings(own)
            if own and own != "eager":
                with eager(self.model):
                    if forwards.attention_of(self.model) == "eager":
                        yield self._compared("alone", "eager", [self._alone(s) for s in self.segments])
                        yield from self._settings("eager")

    def _settings(self, attention: str) -> Iterator[ComparisonRecord]:
        if not self._alone_already:
            logits = self.forward(**self.given)
            rows = [logits[s.row, s.places] for s in self.segments]
            yield self._compared("as trained on", attention, rows)
            del logits
        if "attention_mask" in self.accepts and not self._square:
            for side in self.sides:
                yield self._compared(f"padded {side}", attention, self._padded(side))

    @property
    def _square(self) -> bool:
        """Whether the mask has a number for each query and key, and so says itself which tokens belong together."""
        return isinstance(self.mask, Tensor) and self.mask.ndim == 4

    @property
    def _alone_already(self) -> bool:
        """Whether the batch is one whole row, so that taking it out of the batch changes nothing."""
        return self._square and len(self.ids) == 1 and [len(s.places) for s in self.segments] == [self.ids.shape[1]]

    def _compared(self, setting: str, attention: str, rows: list[Tensor]) -> ComparisonRecord:
        bad, largest, where = 0, 0.0, ""
        for segment, row, alone in zip(self.segments, rows, self.reference, strict=True):
            bad += int((forwards.nonfinite(row) | forwards.nonfinite(alone)).sum())
            far, at = forwards.distance(row, alone).max(0)
            if not far.item() <= largest:
                largest, where = far.item(), f"row {segment.row}, token {segment.places[at].item()}"
        counts = {"rows": len(rows), "packed": sum(s.packed for s in self.segments), "nonfinite": bad}
        return ComparisonRecord(setting=setting, attention=attention, max_change=largest, where=where, **counts)

    def _alone(self, segment: _Segment) -> Tensor:
        places = segment.places
        more = {k: v[segment.row, places][None] for k, v in self._per_token()}
        if self._square and self.mask is not None:
            own = self.mask[segment.row % len(self.mask)]
            more["attention_mask"] = own[:, places][:, :, places][None]
        more |= self._of_rows([segment])
        return self.forward(input_ids=self.ids[segment.row, places][None], **more, **self._switches())[0]

    def _padded(self, side: str) -> list[Tensor]:
        """Run the segments in one batch, padded on `side` with at least three tokens each."""
        width = max(_LEAST_WIDTH, max(len(s.places) for s in self.segments) + 3)
        count = len(self.segments)
        ids = self.ids.new_full((count, width), self.pad)
        mask = torch.zeros_like(ids)
        spans = []
        for i, s in enumerate(self.segments):
            begin = width - len(s.places) if side == "left" else 0
            spans.append(slice(begin, begin + len(s.places)))
            ids[i, spans[-1]] = self.ids[s.row, s.places]
            mask[i, spans[-1]] = 1
        more: dict[str, Tensor] = {}
        for key, value in self._per_token():
            more[key] = value.new_zeros((count, width, *value.shape[2:]))
            for i, s in enumerate(self.segments):
                more[key][i, spans[i]] = value[s.row, s.places]
        if "position_ids" in self.accepts and "position_ids" not in more:
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        more |= self._of_rows(self.segments)
        logits = self.forward(input_ids=ids, attention_mask=mask, **more, **self._switches())
        return [logits[i, span] for i, span in enumerate(spans)]

    def _per_token(self) -> list[tuple[str, Tensor]]:
        """Return the arguments with a part per token beside the ids, such as positions, token types or boxes."""
        named = [(k, v) for k, v in self.given.items() if k not in ("input_ids", "attention_mask")]
        found = [(k, v) for k, v in named if isinstance(v, Tensor) and v.shape[:2] == self.ids.shape]
        if self.positions is not None and "position_ids" not in dict(found):
            found.append(("position_ids", self.positions))
        return found

    def _of_rows(self, segments: list[_Segment]) -> dict[str, Tensor]:
        """Return the arguments with one part per row, such as its picture, for the rows of `segments`."""
        rows = [s.row for s in segments]
        return {k: v[rows] for k, v in _others(self.given)}

    def _switches(self) -> dict[str, Any]:
        return {k: v for k, v in self.given.items() if isinstance(v, bool)}

    def forward(self, **given: Any) -> Tensor:
        """Return the logits of the given tokens, of shape (rows, tokens, vocabulary), without those of a prompt."""
        logits: Tensor = self.model(**given).logits
        return logits[:, -given["input_ids"].shape[1] :]

    def _segments(self, row: int) -> Iterator[_Segment]:
        places = self._attended(row)
        if not len(places):
            return
        starts = self._starts(row, places)
        if self._square:
            # positions that begin anew say where a sequence begins, whatever the mask lets it see
            starts = sorted({*self._starts_in_mask(row, places), *(starts if self.positions is not None else ())})
        bounds = [0, *starts, len(places)]
        for begin, end in itertools.pairwise(bounds):
            # padding that the mask puts into a sequence of its own
            if not (self._square and bool((self.ids[row, places[begin:end]] == self.pad).all())):
                yield _Segment(row, places[begin:end], packed=bool(starts))

    def _starts_in_mask(self, row: int, places: Tensor) -> list[int]:
        """Return where, among `places`, a token sees none of those before it, and none of those after it sees them."""
        assert self.mask is not None
        heads = self.mask[row % len(self.mask)][:, places][:, :, places]
        seen = (heads > _LEAST_SEEN if heads.is_floating_point() else heads != 0).any(0)
        # the first key that a query from here on sees
        first = torch.where(seen.any(-1), seen.int().argmax(-1), torch.arange(len(places), device=seen.device))
        ahead = first.flip(0).cummin(0).values.flip(0)
        return [i for i in range(1, len(places)) if int(ahead[i]) >= i]

    def _attended(self, row: int) -> Tensor:
        """Return the places of a row that do not hold padding."""
        ids = self.ids[row]
        if isinstance(self.mask, Tensor) and self.mask.ndim == 2 and self.mask.shape == self.ids.shape:
            return self.mask[row].nonzero()[:, 0]
        if self.pad in _ends(self.model):
            return torch.arange(len(ids), device=ids.device)
        held = (ids != self.pad).nonzero()[:, 0]
        return torch.arange(int(held[0]), int(held[-1]) + 1, device=ids.device) if len(held) else held

    def _starts(self, row: int, places: Tensor) -> list[int]:
        """Return where, among `places`, another sequence begins, by its positions or the mask's numbers.

        Texts that are told apart by a token alone are one sequence to the model, as in most pretraining.
        """
        if self.positions is not None:
            at = self.positions[row, places]
            restarts = ((at[1:] - at[:-1]) != 1).nonzero()[:, 0] + 1
            if len(restarts):
                # one position for all, or positions that jump, do not make a packed row
                return [int(i) for i in restarts] if bool((at[restarts] == at[0]).all()) else []
        if isinstance(self.mask, Tensor) and self.mask.ndim == 2 and int(self.mask[row].max()) > 1:
            held = self.mask[row, places]
            return [int(i) + 1 for i in (held[1:] != held[:-1]).nonzero()[:, 0]]
        return []


def _affordable(segments: list[_Segment], model: Any) -> list[_Segment]:
    room = _SCORES // max(1, int(getattr(forwards.inner(model).config, "vocab_size", 0) or 1))
    ends = itertools.accumulate(len(s.places) for s in segments)
    return [s for i, (s, end) in enumerate(zip(segments, ends, strict=True)) if i == 0 or end <= room]


def _ends(model: Any) -> set[Any]:
    """Return the ids that begin or end a sequence; also the padding id, where the model does not declare it."""
    config = getattr(forwards.inner(model), "config", None)
    pad = getattr(config, "pad_token_id", None)
    end = getattr(config, "eos_token_id", None)
    known = {*(end if isinstance(end, (list, tuple)) else [end]), getattr(config, "bos_token_id", None)}
    return known | ({forwards.padding_id(model)} if pad is None else set())


def _padding_seen(model: Any, given: dict[str, Any]) -> int:
    """Return how many padding tokens stand in front of a row's first token and are let through by the mask."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if not (isinstance(ids, Tensor) and ids.ndim == 2) or forwards.padding_id(model) in _ends(model):
        return 0
    if isinstance(mask, Tensor) and mask.shape != ids.shape:
        return 0
    in_front = (ids != forwards.padding_id(model)).int().cumsum(-1) == 0
    return int((in_front if mask is None else in_front & (mask != 0)).sum())


def _recurrent(model: Any) -> str:
    """Return the first type of layer in the configuration that carries a state; empty where it names none."""
    types = getattr(getattr(forwards.inner(model), "config", None), "layer_types", None) or ()
    return next((str(t) for t in types if any(word in str(t) for word in _RECURRENT)), "")


def _blind(mask: Tensor) -> int:
    """Return how many queries of a mask of shape (rows, heads, queries, keys) may see no key."""
    seen = mask if mask.dtype == torch.bool else ~torch.isneginf(mask) if mask.is_floating_point() else mask != 0
    return int((~seen.any(-1)).sum())


def _rotary(model: nn.Module) -> dict[str, Any]:
    """Return the number of rotary buffers, those in half precision, and the largest relative error of the others."""
    low, count, error = [], 0, 0.0
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if not key.endswith("inv_freq"):
                continue
            count += 1
            if buffer.is_floating_point() and buffer.element_size() < 4:
                low.append(f"{name}.{key}" if name else key)
            elif key == "inv_freq":
                error = max(error, _error(module, buffer))
    return {"rotary": count, "low_rotary": Names.of(low), "rotary_error": error}


def _error(module: Any, buffer: Tensor) -> float:
    """Return the relative error of frequencies against the architecture's; 0 where those are not known."""
    config, rope_type = getattr(module, "config", None), getattr(module, "rope_type", None)
    compute = ROPE_INIT_FUNCTIONS.get(str(rope_type), getattr(module, "compute_default_rope_parameters", None))
    if config is None or compute is None or rope_type in _LENGTH_DEPENDENT:
        return 0.0
    try:
        with warnings.catch_warnings():
            # transformers 5.17 takes the device, and warns of it
            warnings.simplefilter("ignore", FutureWarning)
            wanted = compute(config, device=buffer.device)[0].to(buffer)
    # an architecture with another signature
    except Exception:
        return 0.0
    if wanted.shape != buffer.shape:
        return 0.0
    return float(((buffer - wanted).abs() / wanted.abs().clamp_min(1e-30)).max())
