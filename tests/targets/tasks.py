"""Healthy trainings of every task, on tiny models that are made locally: one target each.

A model has 2 layers of 32 numbers, and its rows are drawn from a fixed seed. `dtype` is the type of the base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer, TrainingArguments, set_seed

from pytest_sftguard.engine.models import sums, tiny

_WORDS = 64
_TEXT = {
    "vocab_size": _WORDS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
_BERT = _TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_LLAMA = _TEXT | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.1,
}


def made(model_class: Any, config: Any, dtype: str) -> Any:
    """A model with the same weights each time, in `dtype`."""
    torch.manual_seed(0)
    return tiny.in_dtype(model_class(config), getattr(torch, dtype))


def tuned(base: Any, targets: list[str] | str, arguments: TrainingArguments, **lora: Any) -> Any:
    """`base` with LoRA on `targets`, drawn under the training's seed."""
    set_seed(arguments.seed)
    return get_peft_model(base, LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": targets} | lora))


def sentences(count: int = 32, begin: int = 3) -> Iterator[list[int]]:
    """Rows of token ids, 6 to 11 long."""
    drawn = torch.Generator().manual_seed(0)
    for i in range(count):
        yield torch.randint(begin, _WORDS, (6 + i % 6,), generator=drawn).tolist()


def padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Rows as a batch, padded on the right; labels of tokens with -100."""
    width = max(len(r["input_ids"]) for r in rows)
    fills = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    batch = {}
    for name, first in rows[0].items():
        values = [r[name] for r in rows]
        if isinstance(first, list):
            values = [v + [fills[name]] * (width - len(v)) for v in values]
        batch[name] = torch.tensor(values)
    return batch


def _text(label: Callable[[list[int]], Any], **more: Any) -> list[dict[str, Any]]:
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label(ids)} for ids in sentences(**more)]


def _arguments(given: dict[str, Any], arguments_class: Any = TrainingArguments, **more: Any) -> Any:
    return arguments_class(**{"learning_rate": 2e-3, **more} | given)


def sequence_classification(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """BERT tells which half of the vocabulary a row begins with; its new head is saved with the adapter."""
    args = _arguments(arguments)
    base = made(hf.BertForSequenceClassification, hf.BertConfig(**_BERT, num_labels=2), dtype)
    net = tuned(base, ["query", "value"], args, task_type="SEQ_CLS")
    data = _text(lambda ids: int(ids[0] > _WORDS // 2))
    return Trainer(model=net, args=args, train_dataset=data, data_collator=padded)


def causal_classification(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """The same with a decoder, as most classifiers of today are."""
    args = _arguments(arguments)
    base = made(hf.LlamaForSequenceClassification, hf.LlamaConfig(**_LLAMA, num_labels=2), dtype)
    net = tuned(base, ["q_proj", "v_proj"], args, task_type="SEQ_CLS")
    data = _text(lambda ids: int(ids[0] > _WORDS // 2))
    return Trainer(model=net, args=args, train_dataset=data, data_collator=padded)


def regression(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """One number for each row, by mean squared error."""
    args = _arguments(arguments)
    config = hf.BertConfig(**_BERT, num_labels=1, problem_type="regression")
    net = tuned(made(hf.BertForSequenceClassification, config, dtype), ["query", "value"], args, task_type="SEQ_CLS")
    data = _text(lambda ids: ids[0] / _WORDS)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = padded(rows)
        return batch | {"labels": batch["labels"].to(getattr(torch, dtype))}

    return Trainer(model=net, args=args, train_dataset=data, data_collator=collate)


def token_classification(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """A label for each token: whether its id is large."""
    args = _arguments(arguments)
    base = made(hf.BertForTokenClassification, hf.BertConfig(**_BERT, num_labels=2), dtype)
    net = tuned(base, ["query", "value"], args, task_type="TOKEN_CLS")
    data = _text(lambda ids: [int(i > _WORDS // 2) for i in ids])
    return Trainer(model=net, args=args, train_dataset=data, data_collator=padded)


def question_answering(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """BERT points at where an answer begins and ends; the gradient of its head's bias is zero but for rounding."""
    args = _arguments(arguments)
    base = made(hf.BertForQuestionAnswering, hf.BertConfig(**_BERT), dtype)
    net = tuned(base, ["query", "value"], args, task_type="QUESTION_ANS")
    data = [
        {"input_ids": ids, "attention_mask": [1] * len(ids), "start_positions": ids[0] % 3, "end_positions": 3}
        for ids in sentences()
    ]
    return Trainer(model=net, args=args, train_dataset=data, data_collator=padded)


def masked_language_model(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """BERT fills in tokens that the collator masks anew in each batch."""
    args = _arguments(arguments)
    words = sums.tokenizer()
    words.add_special_tokens({"mask_token": words.unk_token})
    config = hf.BertConfig(**_BERT | {"vocab_size": len(words)})
    net = tuned(made(hf.BertForMaskedLM, config, dtype), ["query", "value"], args)
    data = [{"input_ids": [3 + i % (len(words) - 3) for i in ids]} for ids in sentences()]
    collate = hf.DataCollatorForLanguageModeling(words, mlm=True, mlm_probability=0.3)
    return Trainer(model=net, args=args, train_dataset=data, data_collator=collate)


def _translated(base: Any, targets: list[str], arguments: dict[str, Any]) -> Trainer:
    args = _arguments(arguments, hf.Seq2SeqTrainingArguments)
    net = tuned(base, targets, args, task_type="SEQ_2_SEQ_LM")
    rows = [
        {"input_ids": [*ids, 2], "attention_mask": [1] * (len(ids) + 1), "labels": [*ids[::-1][:4], 2]}
        for ids in sentences()
    ]

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        own = [f | {"labels": f["labels"] + [-100] * (len(f["input_ids"]) - len(f["labels"]))} for f in features]
        batch = padded(own)
        longest = int((batch["labels"] != -100).sum(1).max())
        return batch | {"labels": batch["labels"][:, :longest].contiguous()}

    return hf.Seq2SeqTrainer(model=net, args=args, train_dataset=rows, data_collator=collate)


def t5(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """An encoder-decoder with relative positions writes a row backwards."""
    config = hf.T5Config(
        vocab_size=_WORDS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _translated(made(hf.T5ForConditionalGeneration, config, dtype), ["q", "v"], arguments)


def bart(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """An encoder-decoder with learned positions does the same."""
    sides = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = hf.BartConfig(
        vocab_size=_WORDS,
        d_model=32,
        dropout=0.0,
        max_position_embeddings=64,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        **sides,
        **heads,
    )
    return _translated(made(hf.BartForConditionalGeneration, config, dtype), ["q_proj", "v_proj"], arguments)


def _images(count: int, dtype: str) -> Iterator[tuple[Tensor, int]]:
    drawn = torch.Generator().manual_seed(0)
    for i in range(count):
        yield (torch.rand(3, 16, 16, generator=drawn) + i % 2).to(getattr(torch, dtype)), i % 2


def image_classification(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """ViT tells dark images from bright ones."""
    args = _arguments(arguments, remove_unused_columns=False)
    base = made(hf.ViTForImageClassification, hf.ViTConfig(**_VISION, num_labels=2), dtype)
    net = tuned(base, ["q_proj", "v_proj"], args, modules_to_save=["classifier"])
    data = [{"pixel_values": image, "labels": label} for image, label in _images(32, dtype)]
    return Trainer(model=net, args=args, train_dataset=data)


def _vision_language(targets: str, dtype: str, arguments: dict[str, Any]) -> Trainer:
    args = _arguments(arguments, remove_unused_columns=False)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_VISION),
        text_config=hf.LlamaConfig(**_LLAMA),
        image_token_index=3,
        vision_feature_layer=-1,
        image_seq_length=4,
    )
    base = made(hf.LlavaForConditionalGeneration, config, dtype)
    net = tuned(base, targets, args, task_type="CAUSAL_LM")
    data = []
    for (image, label), ids in zip(_images(32, dtype), sentences(begin=4), strict=True):
        row = [1, *[3] * 4, *ids[:4]]
        labels = [-100] * len(row) + [10 + label, 2]
        row += [10 + label, 2]
        data.append(
            {"input_ids": row, "attention_mask": [1] * len(row), "labels": labels, "pixel_values": image.tolist()}
        )

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
        return batch | {"pixel_values": batch["pixel_values"].to(getattr(torch, dtype))}

    return Trainer(model=net, args=args, train_dataset=data, data_collator=collate)


def vision_tower(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """LLaVA with LoRA on its vision tower alone."""
    return _vision_language(r".*vision_tower.*\.(q_proj|v_proj)", dtype, arguments)


def language_model(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """LLaVA with LoRA on its language model alone."""
    return _vision_language(r".*language_model.*\.(q_proj|v_proj)", dtype, arguments)


def vision_and_language(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """LLaVA with LoRA on both."""
    return _vision_language(r".*\.(q_proj|v_proj)", dtype, arguments)


def speech(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """Whisper writes two tokens for a spectrogram."""
    args = _arguments(arguments, remove_unused_columns=False)
    sides = {f"{s}_{w}": n for s in ("encoder", "decoder") for w, n in (("layers", 1), ("ffn_dim", 64))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = hf.WhisperConfig(
        vocab_size=_WORDS,
        d_model=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        init_std=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sides,
        **heads,
    )
    net = tuned(made(hf.WhisperForConditionalGeneration, config, dtype), ["q_proj", "v_proj"], args)
    drawn = torch.Generator().manual_seed(0)
    data = [
        {
            "input_features": torch.rand(8, 32, generator=drawn).to(getattr(torch, dtype)),
            "labels": torch.tensor([40, 30 + i % 10, 2]),
        }
        for i in range(32)
    ]
    return Trainer(model=net, args=args, train_dataset=data)


def sounds(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """Wav2Vec2 classifies waveforms: a model without tokens, whose head is saved with the adapter."""
    args = _arguments(arguments, remove_unused_columns=False)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    convolutions = {"conv_dim": [16, 16], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    still = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
    config = hf.Wav2Vec2Config(
        **shape,
        **convolutions,
        **positions,
        **still,
        layerdrop=0.0,
        apply_spec_augment=False,
        classifier_proj_size=16,
        num_labels=2,
        initializer_range=0.1,
    )
    base = made(hf.Wav2Vec2ForSequenceClassification, config, dtype)
    net = tuned(base, ["q_proj", "v_proj"], args, modules_to_save=["classifier", "projector"])
    drawn = torch.Generator().manual_seed(0)
    data = [
        {"input_values": (torch.rand(400, generator=drawn) - 0.5).to(getattr(torch, dtype)), "labels": i % 2}
        for i in range(32)
    ]
    return Trainer(model=net, args=args, train_dataset=data)


def two_towers(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """CLIP holds images against their texts: two encoders, and a loss over the whole batch without labels."""
    args = _arguments(arguments, remove_unused_columns=False)
    text = {k: v for k, v in _TEXT.items() if k != "initializer_range"} | {"bos_token_id": 1, "eos_token_id": 2}
    base = made(hf.CLIPModel, hf.CLIPConfig(text_config=text, vision_config=dict(_VISION), projection_dim=16), dtype)
    net = tuned(base, ["q_proj", "v_proj"], args)
    data = [
        {"pixel_values": image, "input_ids": torch.tensor([1, *ids[:4], 2])}
        for (image, _), ids in zip(_images(32, dtype), sentences(), strict=True)
    ]

    def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
        return {k: torch.stack([r[k] for r in rows]) for k in rows[0]} | {"return_loss": True}

    return Trainer(model=net, args=args, train_dataset=data, data_collator=collate)


def time_series(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """PatchTST forecasts two channels: neither tokens nor labels."""
    args = _arguments(arguments, remove_unused_columns=False)
    still = dict.fromkeys(("attention_dropout", "ff_dropout", "path_dropout", "head_dropout"), 0.0)
    config = hf.PatchTSTConfig(
        num_input_channels=2,
        context_length=32,
        prediction_length=8,
        patch_length=8,
        patch_stride=8,
        d_model=32,
        num_attention_heads=4,
        num_hidden_layers=2,
        ffn_dim=64,
        norm_type="layernorm",
        **still,
    )
    net = tuned(made(hf.PatchTSTForPrediction, config, dtype), ["q_proj", "v_proj"], args)
    drawn = torch.Generator().manual_seed(0)
    lengths = {"past_values": 32, "future_values": 8}
    data = [
        {k: torch.rand(n, 2, generator=drawn).to(getattr(torch, dtype)) for k, n in lengths.items()} for _ in range(32)
    ]
    return Trainer(model=net, args=args, train_dataset=data)


class _Pairs(Trainer):
    """Two sentences in a row of each batch belong together; the others are negatives."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        def embedded(side: str) -> Tensor:
            own = {k.removeprefix(side): v for k, v in inputs.items() if k.startswith(side)}
            states = model(**own).last_hidden_state
            last = own["attention_mask"].sum(1) - 1
            return functional.normalize(states[torch.arange(len(states)), last].float(), dim=-1)

        query, document = embedded("q_"), embedded("d_")
        loss = functional.cross_entropy(query @ document.T / 0.05, torch.arange(len(query)))
        return (loss, {"query": query}) if return_outputs else loss


def pairs(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """An embedding model, contrastive: inputs named for two sides, and no labels."""
    args = _arguments(arguments, remove_unused_columns=False)
    net = tuned(
        made(hf.LlamaModel, hf.LlamaConfig(**_LLAMA), dtype),
        ["q_proj", "v_proj"],
        args,
        task_type="FEATURE_EXTRACTION",
    )
    data = [{"query": ids, "document": ids[::-1]} for ids in sentences()]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        sides = {"q_": "query", "d_": "document"}
        batches = {
            side: padded([{"input_ids": r[name], "attention_mask": [1] * len(r[name])} for r in rows])
            for side, name in sides.items()
        }
        return {side + k: v for side, batch in batches.items() for k, v in batch.items()}

    return _Pairs(model=net, args=args, train_dataset=data, data_collator=collate)


def sentence_transformer(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """Sentence-transformers: its own Trainer, in-batch negatives, LoRA by `add_adapter`."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    args = _arguments(arguments, SentenceTransformerTrainingArguments)
    words, folder = sums.tokenizer(), args.output_dir
    made(hf.BertModel, hf.BertConfig(**_BERT | {"vocab_size": len(words)}), dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    encoder = Transformer(folder, model_args={"dtype": getattr(torch, dtype)})
    net = SentenceTransformer(modules=[encoder, Pooling(32)], device=str(args.device))
    set_seed(args.seed)
    net.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"]))
    rows = [{"anchor": p, "positive": f"{p} {int(n)}"} for p, n in sums.questions()]
    return SentenceTransformerTrainer(
        model=net, args=args, train_dataset=Dataset.from_list(rows), loss=MultipleNegativesRankingLoss(net)
    )


def add_adapter(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """LoRA without a PeftModel: transformers' own `add_adapter`."""
    args = _arguments(arguments)
    base = made(hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA, tie_word_embeddings=False), dtype)
    set_seed(args.seed)
    base.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return Trainer(model=base, args=args, train_dataset=_text(lambda ids: ids), data_collator=padded)


def full(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """Every weight of a Llama trains; there is no adapter."""
    args = _arguments(arguments, learning_rate=3e-4)
    base = made(hf.LlamaForCausalLM, hf.LlamaConfig(**_LLAMA, tie_word_embeddings=False), dtype)
    return Trainer(model=base, args=args, train_dataset=_text(lambda ids: ids), data_collator=padded)


def head_alone(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """A frozen BERT under a head that trains; there is no adapter."""
    args = _arguments(arguments)
    base = made(hf.BertForSequenceClassification, hf.BertConfig(**_BERT, num_labels=2), dtype)
    base.bert.requires_grad_(False)
    data = _text(lambda ids: int(ids[0] > _WORDS // 2))
    return Trainer(model=base, args=args, train_dataset=data, data_collator=padded)


def module(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """A torch module of the user's own that returns its loss: no configuration, no adapter."""

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(_WORDS, 16), nn.Linear(16, 2)

        def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            states = self.embedding(input_ids) * attention_mask[..., None]
            logits = self.head(states.sum(1))
            if labels is None:
                return {"logits": logits}
            return {"loss": functional.cross_entropy(logits.float(), labels), "logits": logits}

    args = _arguments(arguments)
    torch.manual_seed(0)
    net = Classifier().to(getattr(torch, dtype))
    data = _text(lambda ids: int(ids[0] > _WORDS // 2))
    return Trainer(model=net, args=args, train_dataset=data, data_collator=padded)


def _preferences(trainer_class: Any, config_class: Any, rows: list[dict[str, Any]], base: Any, **more: Any) -> Any:
    from datasets import Dataset

    args, task = more.pop("args"), more.pop("task_type")
    set_seed(args.seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type=task)
    return trainer_class(
        model=base,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=sums.tokenizer(),
        peft_config=lora,
        **more,
    )


def _speaker(dtype: str) -> Any:
    return made(hf.LlamaForCausalLM, tiny.llama(len(sums.tokenizer()), 0.1), dtype)


def _asked(count: int = 32) -> list[tuple[str, str]]:
    return [(prompt + " ", str(int(number))) for prompt, number in sums.questions()][:count]


def reward(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """TRL's reward model: the right answer is worth more than a wrong one."""
    from trl import RewardConfig, RewardTrainer

    args = _arguments(arguments, RewardConfig, max_length=None)
    config = tiny.llama(len(sums.tokenizer()), 0.1)
    config.num_labels = 1
    base = made(hf.LlamaForSequenceClassification, config, dtype)
    rows = [{"chosen": p + right, "rejected": f"{p}7 7"} for p, right in _asked()]
    return _preferences(RewardTrainer, RewardConfig, rows, base, args=args, task_type="SEQ_CLS")


def dpo(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """TRL's direct preference optimisation."""
    from trl import DPOConfig, DPOTrainer

    args = _arguments(arguments, DPOConfig, max_length=None)
    rows = [{"prompt": p, "chosen": right, "rejected": "7 7"} for p, right in _asked()]
    return _preferences(DPOTrainer, DPOConfig, rows, _speaker(dtype), args=args, task_type="CAUSAL_LM")


def kto(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """TRL's Kahneman-Tversky optimisation, on rows that are good or bad."""
    from trl import KTOConfig, KTOTrainer

    args = _arguments(arguments, KTOConfig, max_length=None)
    rows = [
        {"prompt": p, "completion": c, "label": good}
        for p, right in _asked()
        for c, good in ((right, True), ("7 7", False))
    ]
    return _preferences(KTOTrainer, KTOConfig, rows, _speaker(dtype), args=args, task_type="CAUSAL_LM")


def grpo(*, model: str | None = None, dtype: str = "float32", **arguments: Any) -> Trainer:
    """TRL's group relative policy optimisation, on completions that the model samples."""
    from trl import GRPOConfig, GRPOTrainer

    batch = int(arguments.get("per_device_train_batch_size", 4)) * int(arguments.get("gradient_accumulation_steps", 1))
    args = _arguments(
        arguments,
        GRPOConfig,
        num_generations=next(n for n in (4, 2, 3, 5, batch) if batch % n == 0),
        max_completion_length=8,
        beta=0.04,
    )

    def short(completions: list[str], **_: Any) -> list[float]:
        return [-float(len(c)) / 10 for c in completions]

    rows = [{"prompt": p} for p, _ in _asked()]
    return _preferences(
        GRPOTrainer, GRPOConfig, rows, _speaker(dtype), args=args, task_type="CAUSAL_LM", reward_funcs=short
    )


TASKS: dict[str, Callable[..., Any]] = {
    f.__name__: f
    for f in (
        sequence_classification,
        causal_classification,
        regression,
        token_classification,
        question_answering,
        masked_language_model,
        t5,
        bart,
        image_classification,
        vision_tower,
        language_model,
        vision_and_language,
        speech,
        sounds,
        two_towers,
        time_series,
        pairs,
        sentence_transformer,
        reward,
        dpo,
        kto,
        grpo,
        add_adapter,
        full,
        head_alone,
        module,
    )
}
"""Every target of this module by its name."""
