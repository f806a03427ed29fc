"""Axes of the generated trainings: architecture, task, adapter, optimizer, schedule, collator, precision, batch split.

A training is replayed from its seed and its number. Rules say which values go together; whether a training is healthy
is measured.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

CAUSAL, CLASSIFY, TAG, MASKED, SEQ2SEQ, IMAGES, SPEECH = (
    "causal",
    "classify",
    "tag",
    "masked",
    "seq2seq",
    "images",
    "speech",
)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of models."""

    name: str
    """Name of its configuration in transformers: `llama` is configured by `LlamaConfig`."""
    tasks: tuple[str, ...]
    """What it is trained for."""
    targets: tuple[str, ...] = ()
    """Modules that an adapter is put on; every linear one if there are none."""
    scaled: tuple[str, ...] = ("k_proj", "v_proj")
    """Modules whose outputs IA3 scales."""
    scaled_inputs: tuple[str, ...] = ("down_proj",)
    """Modules of the feed-forward part whose inputs IA3 scales."""
    rotary: bool = False
    """Whether positions can be given, so that rows without padding can be laid end to end."""
    prompts: bool = True
    """Whether virtual tokens can be put in front of the rows."""
    checkpointing: bool = True
    """Whether its layers can be checkpointed."""
    attention: tuple[str, ...] = ("eager", "sdpa")
    """Kernels that it has."""
    linear: bool = True
    """Whether its projections are `nn.Linear`; those of GPT-2 are not."""
    counts_padding: bool = False
    """Whether its learned positions count the padding in front of a row, unless they are given."""


_TEXT = (CAUSAL, CAUSAL, CLASSIFY, TAG)
_LLAMA = {"tasks": _TEXT, "rotary": True}
_BERT = {"tasks": (CLASSIFY, TAG, MASKED), "prompts": False}

ARCHITECTURES: dict[str, Architecture] = {
    a.name: a
    for a in (
        Architecture(name="llama", **_LLAMA),  # type: ignore[arg-type]
        Architecture(name="qwen2", **_LLAMA),  # type: ignore[arg-type]
        Architecture(name="qwen3", **_LLAMA),  # type: ignore[arg-type]
        Architecture(name="gemma", **_LLAMA),  # type: ignore[arg-type]
        Architecture(name="gemma2", **_LLAMA, attention=("eager",)),  # type: ignore[arg-type]
        Architecture(name="mistral", **_LLAMA),  # type: ignore[arg-type]
        Architecture(name="phi", tasks=_TEXT, rotary=True, scaled_inputs=("fc2",)),
        Architecture(name="olmo2", tasks=(CAUSAL,), rotary=True),
        Architecture(name="mixtral", tasks=(CAUSAL,), rotary=True, scaled_inputs=()),
        Architecture(name="qwen2_moe", tasks=(CAUSAL,), rotary=True, scaled_inputs=()),
        Architecture(
            name="gpt2",
            tasks=_TEXT,
            scaled=("c_attn",),
            scaled_inputs=("mlp.c_proj",),
            linear=False,
            counts_padding=True,
        ),
        Architecture(
            name="gpt_neox", tasks=_TEXT, scaled=("query_key_value",), scaled_inputs=("dense_4h_to_h",), rotary=True
        ),
        Architecture(name="opt", tasks=(CAUSAL, CLASSIFY), scaled_inputs=("fc2",)),
        Architecture(name="falcon", tasks=_TEXT, scaled=("query_key_value",), scaled_inputs=("dense_4h_to_h",)),
        # peft refuses the modules whose weights its kernels read past the module
        Architecture(
            name="mamba",
            tasks=(CAUSAL,),
            targets=("in_proj", "x_proj"),
            attention=("none",),
            scaled=("in_proj",),
            scaled_inputs=(),
            prompts=False,
        ),
        Architecture(name="bert", **_BERT, scaled=("key", "value"), scaled_inputs=("output.dense",)),  # type: ignore[arg-type]
        Architecture(name="roberta", **_BERT, scaled=("key", "value"), scaled_inputs=("output.dense",)),  # type: ignore[arg-type]
        Architecture(name="modernbert", **_BERT, scaled=("Wqkv",), scaled_inputs=("mlp.Wo",)),  # type: ignore[arg-type]
        Architecture(name="distilbert", **_BERT, scaled=("k_lin", "v_lin"), scaled_inputs=("lin2",)),  # type: ignore[arg-type]
        Architecture(name="electra", **_BERT, scaled=("key", "value"), scaled_inputs=("output.dense",)),  # type: ignore[arg-type]
        Architecture(name="t5", tasks=(SEQ2SEQ,), scaled=("k", "v"), scaled_inputs=("wo",)),
        Architecture(name="bart", tasks=(SEQ2SEQ,), scaled_inputs=("fc2",)),
        Architecture(name="vit", tasks=(IMAGES,), scaled_inputs=("fc2",), prompts=False),
        Architecture(name="whisper", tasks=(SPEECH,), scaled_inputs=("fc2",), prompts=False),
    )
}
"""Every architecture by its name."""

LORA = ("lora", "rslora", "dora", "pissa", "olora", "lora with dropout", "lora and head", "lora and token rows")
"""LoRA and its variants."""
OTHERS = ("adalora", "loha", "lokr", "vera", "oft", "ia3", "lora-fa", "lora+", "none")
"""Other methods that change or replace weights, and none: the whole model is trained."""
PROMPTS = ("prefix", "prompt", "p-tuning")
"""Methods that put virtual tokens in front."""

RATES = {
    "ia3": 5e-2,
    "vera": 5e-2,
    "oft": 5e-3,
    "prefix": 3e-2,
    "prompt": 5e-2,
    "p-tuning": 1e-2,
    "none": 2e-3,
    "pissa": 5e-3,
    "olora": 5e-3,
}
"""Learning rates of AdamW at which the tiny models learn in some steps; LoRA's is the default."""
LORA_RATE = 1e-2
OPTIMIZERS = {
    "adamw_torch": 1.0,
    "adamw_torch_fused": 1.0,
    "adafactor": 1.0,
    "sgd with momentum": 10.0,
    "rmsprop": 0.2,
    "adagrad": 2.0,
}
"""Optimizers, and the factor of their learning rates to AdamW's."""
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt", "linear with warm-up")
PRECISIONS = ("fp32", "bf16-mixed", "bf16-true", "fp16-mixed")
NOT_IN = {"none": ("bf16-true",), "adalora": ("bf16-true",)}
"""Precisions in which a method is not sound: bfloat16 swallows the updates of norms, whose weights are about 1; and in
a base of bfloat16, peft 0.21 trains the number of AdaLoRA's ranks, which divides the update and is in no file."""
BATCHES = ((1, 1), (1, 4), (2, 2), (3, 1), (4, 1), (4, 2), (8, 1))


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """One composed training."""

    seed: int
    """Seed of the study."""
    number: int
    """Its number in the study, from 0."""
    architecture: str
    """Name of the architecture."""
    task: str
    """What it is trained for."""
    adapter: str
    """Method of peft, or `none`."""
    optimizer: str
    """Name of the optimizer."""
    schedule: str
    """Schedule of the learning rate."""
    rate: float
    """Learning rate."""
    collator: str
    """How rows become batches."""
    precision: str
    """Precision mode."""
    batch: tuple[int, int]
    """Micro-batch and gradient accumulation."""
    attention: str
    """Kernel of the attention."""
    extras: tuple[str, ...] = ()
    """What else is switched on."""
    steps: int = 8
    """Optimizer steps."""

    @property
    def id(self) -> str:
        """The seed and the number, with which it is replayed."""
        return f"{self.seed}-{self.number}"

    def axes(self) -> dict[str, str]:
        """The value of each axis, as text."""
        return {
            "architecture": self.architecture,
            "task": self.task,
            "adapter": self.adapter,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "collator": self.collator,
            "precision": self.precision,
            "batch": "x".join(map(str, self.batch)),
            "attention": self.attention,
            "extras": " and ".join(self.extras) or "-",
        }

    def describe(self) -> str:
        """The training in one sentence."""
        extras = f", with {' and '.join(self.extras)}" if self.extras else ""
        adapter = "whole" if self.adapter == "none" else f"with {self.adapter}"
        return (
            f"{self.architecture} ({self.task}) trained {adapter} by {self.optimizer} at {self.rate:.2g} "
            f"({self.schedule}), {self.collator}, {self.precision}, batch {'x'.join(map(str, self.batch))}, "
            f"{self.attention} attention{extras}"
        )


def compose(seed: int, number: int) -> Healthy:
    """The training with this number of the study with this seed."""
    # a text seeds it alike in every process
    draw = random.Random(f"healthy {seed} {number}")
    architecture = draw.choice(list(ARCHITECTURES.values()))
    task = draw.choice(architecture.tasks)
    adapter = draw.choice(_adapters(architecture, task))
    optimizer = "adamw_torch" if adapter in ("lora-fa", "lora+") else draw.choice(list(OPTIMIZERS))
    # half a decade around a rate at which it learns
    rate = RATES.get(adapter, LORA_RATE) * OPTIMIZERS[optimizer] * 3.0 ** draw.uniform(-0.5, 0.5)
    collator = draw.choice(_collators(architecture, task, adapter))
    return Healthy(
        seed=seed,
        number=number,
        architecture=architecture.name,
        task=task,
        adapter=adapter,
        optimizer=optimizer,
        schedule=draw.choice(SCHEDULES),
        rate=float(f"{rate:.2g}"),
        collator=collator,
        precision=draw.choice([p for p in PRECISIONS if p not in NOT_IN.get(adapter, ())]),
        # rows that are laid end to end are one row of tokens, and packs are as long as a batch
        batch=draw.choice(BATCHES),
        attention=draw.choice(architecture.attention),
        extras=_drawn(draw, _extras(architecture, task, adapter)),
    )


def _adapters(architecture: Architecture, task: str) -> list[str]:
    """The methods that the architecture can be trained with; LoRA and its variants are drawn more often."""
    found = [*LORA, *LORA, *OTHERS]
    if architecture.prompts and task in (CAUSAL, SEQ2SEQ):
        found += PROMPTS
    left_out = set()
    if not architecture.linear:
        left_out |= {"loha", "lokr", "oft", "pissa", "olora"}
    if task in (IMAGES, SPEECH, SEQ2SEQ):
        left_out |= {"lora and token rows"}
    return [a for a in found if a not in left_out]


def _collators(architecture: Architecture, task: str, adapter: str) -> list[str]:
    if task != CAUSAL:
        return ["padded"]
    found = ["padded on the right", "padded on the left", "packed"]
    # peft gives no positions to a model with virtual tokens
    if architecture.counts_padding and adapter in PROMPTS:
        found.remove("padded on the left")
    # positions that start again belong to another row, unless virtual tokens shift them
    return [*found, "end to end"] if architecture.rotary and adapter not in PROMPTS else found


EITHER = (("clipping", "no clipping"), ("checkpointing", "re-entrant checkpointing"))
"""Extras of which a training has one at most."""


def _drawn(draw: random.Random, extras: list[str]) -> tuple[str, ...]:
    found = [x for x in extras if draw.random() < 0.2]
    return tuple(x for x in found if not any(x == second and first in found for first, second in EITHER))


def _extras(architecture: Architecture, task: str, adapter: str) -> list[str]:
    found = ["weight decay", "clipping", "no clipping", "dropout"]
    if task in (CAUSAL, CLASSIFY, TAG, MASKED, SEQ2SEQ):
        found += ["label smoothing"]
    if task in (CAUSAL, CLASSIFY, TAG) and adapter not in PROMPTS:
        found += ["NEFTune"]
    # a prefix takes the place of the cache that checkpointing switches off
    if architecture.checkpointing and adapter not in PROMPTS:
        found += ["checkpointing", "re-entrant checkpointing"]
    return found
