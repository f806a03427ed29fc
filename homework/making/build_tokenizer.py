"""Build the tokenizer of the embedded model: byte-level BPE in which digits and punctuation always stand alone.

    python -m homework.making.build_tokenizer [--output-dir homework/model]

A word, with the space before it, is the only thing that merges, so the seam between a prompt and an answer never does.
The byte alphabet makes every text come back as it went in.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
"""Longest sequence, in tokens, that the model is made for."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Write the tokenizer and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m homework.making.build_tokenizer",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, default=EMBEDDED, help="folder to write into")
    options = parser.parse_args(argv)
    tokenizer = build()
    tokenizer.save_pretrained(options.output_dir)
    print(f"{options.output_dir}: {len(tokenizer)} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
