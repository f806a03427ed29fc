"""Build the tokenizer of the embedded model: byte-level BPE in which digits and punctuation always stand alone.

    python -m homework.making.build_tokenizer [--output-dir homework/model]

Only a word and the space before it merge, so no token spans the boundary of prompt and answer. The byte alphabet makes
decoding lossless.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..base import EMBEDDED
from ..task.questions import PHRASINGS
from ..task.statements import FILLERS, JOINS, LEADS, MARKS, SOURCE_FIRST, TARGET_FIRST
from ..task.units import canonical_names

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 832
PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
WORD = r" ?[A-Za-z]+"
CONTEXT = 128
"""Longest sequence of the model, in tokens."""


def corpus() -> list[str]:
    """Return the words that should be whole tokens, each with and without a space before it."""
    texts = [*PHRASINGS, *SOURCE_FIRST, *TARGET_FIRST, *JOINS, *LEADS, *FILLERS, *canonical_names(), "answer"]
    words = {word for text in texts for word in re.findall(r"[A-Za-z]+", re.sub(r"\{[vft]\}", " ", text))}
    spaced = [f" {word}" for word in sorted(words)]
    openings = (re.match("[A-Za-z]+", text) for text in (*PHRASINGS, *LEADS, *FILLERS, *TARGET_FIRST))
    starts = sorted({match[0] for match in openings if match})
    return spaced + starts + ["answer", "e", *MARKS]


def build() -> PreTrainedTokenizerFast:
    """Return the tokenizer; the same one each time."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{WORD}|[^A-Za-z]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


@click.command(help=__doc__.partition("\n")[0])
@click.option("--output-dir", type=Path, default=EMBEDDED, help="folder to write into")
def main(output_dir: Path) -> None:
    """Write the tokenizer."""
    tokenizer = build()
    tokenizer.save_pretrained(output_dir)
    click.echo(f"{output_dir}: {len(tokenizer)} tokens")


if __name__ == "__main__":
    main()
