"""Pretrain the embedded model on statements of conversion facts; about half an hour on two CPU cores.

    python -m homework.making.pretrain [--output-dir homework/model] [--steps N] [--seed 7] [--threads 2]

Statements are drawn from a seed (`homework/task/statements.py`): the number comes last, no statement is a question,
none holds the answer tag, and none states a triple of the validation set. From time to time the model completes the 500
validation triples as plain statements, none of which it is trained on, which shows how well the facts generalise.
The folder receives the weights, the tokenizer, the configuration, `pretrain.log` and `SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..base import EMBEDDED
from ..task.answers import is_right, read_number
from ..task.statements import Speaker, Statement, plain_statement
from ..task.units import Triple, convert
from .build_data import split
from .build_tokenizer import CONTEXT, build

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STEPS = 6_000
BATCH = 128
POOL = 32
"""Batches that are drawn together and sorted by length, so that they need little padding."""
SEED = 7
KNOWN_WEIGHT = 0.05
"""Weight of the loss on the text before the number; the number itself has weight 1."""
MATRIX_LEARNING_RATE = 4e-3
"""For the weight matrices, which Muon updates; far better than AdamW on this task (see the README)."""
OTHER_LEARNING_RATE = 2e-3
"""For embeddings and norms, which AdamW updates."""
WARM_UP = 200
EVAL_EVERY = 500


def new_model(vocabulary: int, pad: int, bos: int, eos: int) -> LlamaForCausalLM:
    """Return the untrained model: a Llama of 2.4 million parameters with tied embeddings, in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.03,
        pad_token_id=pad,
        bos_token_id=bos,
        eos_token_id=eos,
    )
    return LlamaForCausalLM(config)


def batches(
    speaker: Speaker, tokenizer: PreTrainedTokenizerFast, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and loss weights without end, one statement per row, padded on the right."""
    import torch

    order = random.Random(seed)
    pad, eos = tokenizer.convert_tokens_to_ids([tokenizer.pad_token, tokenizer.eos_token])
    while True:
        drawn: list[Statement] = [speaker.draw() for _ in range(BATCH * POOL)]
        known = tokenizer([s.known for s in drawn])["input_ids"]
        told = tokenizer([s.told for s in drawn], add_special_tokens=False)["input_ids"]
        rows = sorted(zip(known, told, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        chunks = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        order.shuffle(chunks)
        for chunk in chunks:
            width = max(len(a) + len(b) for a, b in chunk) + 1
            ids = torch.full((len(chunk), width), pad)
            weights = torch.zeros((len(chunk), width))
            for i, (a, b) in enumerate(chunk):
                whole = [*a, *b, eos]
                ids[i, : len(whole)] = torch.tensor(whole)
                weights[i, : len(a)] = KNOWN_WEIGHT
                weights[i, len(a) : len(whole)] = 1.0
            yield ids, weights


def statement_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, triples: Sequence[Triple], *, target_first: bool
) -> float:
    """Return the share of triples whose plain statement the model completes within 5 % of pint's number."""
    import torch

    groups: dict[int, list[tuple[Triple, list[int]]]] = {}
    for triple in triples:
        ids = tokenizer(plain_statement(triple, target_first=target_first))["input_ids"]
        groups.setdefault(len(ids), []).append((triple, ids))
    right = 0
    with torch.inference_mode():
        for group in groups.values():
            given = torch.tensor([ids for _, ids in group])
            made = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=12, do_sample=False)
            texts = tokenizer.batch_decode(made[:, given.shape[1] :], skip_special_tokens=True)
            for (triple, _), text in zip(group, texts, strict=True):
                right += is_right(read_number(text.split(" ")[0].rstrip(".")), convert(*triple))
    return right / len(triples)


def learning_rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up, then a cosine down to one hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, lines: Sequence[str], folder: Path) -> str:
    """Write all files beside `folder`, then move each into it; return the sha256 of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pretrain-", dir=folder.parent) as work:
        made = Path(work)
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "pretrain.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
        kept = [path for path in sorted(made.iterdir()) if path.suffix != ".log"]
        sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}
        listing = "".join(f"{total}  {name}\n" for name, total in sums.items())
        (made / "SHA256SUMS").write_text(listing, encoding="utf-8")
        for path in made.iterdir():
            os.replace(path, folder / path.name)
    return sums["model.safetensors"]


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for the embeddings and norms."""
    import torch

    if not hasattr(torch.optim, "Muon"):
        raise SystemExit(
            f"error: pretraining needs torch 2.9 or newer for its Muon optimizer; this is {torch.__version__}"
        )
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    muon = torch.optim.Muon(matrices, lr=MATRIX_LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    return [muon, adamw]


@click.command(help=__doc__.partition("\n")[0])
@click.option("--output-dir", type=Path, default=EMBEDDED, help="folder to write into")
@click.option("--steps", type=click.IntRange(1), default=STEPS, show_default=True, help="optimizer steps")
@click.option("--seed", type=int, default=SEED, show_default=True, help="seed of weights and statements")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="CPU threads")
def main(output_dir: Path, steps: int, seed: int, threads: int) -> None:
    """Train from a seed, and save at every evaluation."""
    import torch
    from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = build()
    model = new_model(
        len(tokenizer),
        *tokenizer.convert_tokens_to_ids([tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token]),
    )
    unseen = split()[1]
    lines = [
        f"parameters {sum(p.numel() for p in model.parameters())}; vocabulary {len(tokenizer)}; steps {steps}; "
        f"statements a step {BATCH}; seed {seed}; threads {threads}; excluded triples {len(unseen)}"
    ]
    click.echo(lines[-1])
    optimizers = new_optimizers(model)
    factor = partial(learning_rate, steps=steps)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    source = batches(Speaker(seed, unseen), tokenizer, seed)
    started = time.monotonic()
    recent = tokens = 0.0
    for step in tqdm(range(steps), unit="step", mininterval=5, disable=None):
        ids, weights = next(source)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
        )
        weight = weights[:, 1:].flatten()
        loss = (losses * weight).sum() / weight.sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            scheduler.step()
        recent += float(loss.detach())
        tokens += ids.numel()
        if (step + 1) % EVAL_EVERY and step + 1 < steps:
            continue
        model.eval()
        scores = [statement_accuracy(model, tokenizer, unseen, target_first=first) for first in (False, True)]
        model.train()
        took = time.monotonic() - started
        lines.append(
            f"step {step + 1:6d}  loss {recent / (step % EVAL_EVERY + 1):.4f}  unseen triples right: "
            f"source first {scores[0]:.3f}, target first {scores[1]:.3f}  {tokens / took:.0f} tokens/s  {took:.0f} s"
        )
        click.echo(lines[-1])
        if not math.isfinite(recent):
            raise RuntimeError(f"the loss is not finite at step {step + 1}")
        recent = 0.0
        total = save(model, tokenizer, lines, output_dir)
    click.echo(f"{output_dir}: model.safetensors sha256 {total}")


if __name__ == "__main__":
    main()
