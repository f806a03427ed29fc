"""Write `train.json` and `valid.json`: the same bytes for the same seed.

    python -m homework.making.build_data [--output-dir homework/task] [--seed 20]

pint gives the numbers. No (value, from-unit, to-unit), in canonical units, is in both files.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import click

from ..task.data import TRAIN_FILE
from ..task.questions import ask
from ..task.units import VALUES, Triple, convert, pairs

TRAIN_ROWS = 1_000
VALID_ROWS = 500
SEED = 20


def split(seed: int = SEED) -> tuple[list[Triple], list[Triple]]:
    """Return the canonical triples of the training rows and of the validation rows; the two share none."""
    triples = [(value, a, b) for a, b in pairs() for value in VALUES]
    random.Random(seed).shuffle(triples)
    return triples[:TRAIN_ROWS], triples[TRAIN_ROWS : TRAIN_ROWS + VALID_ROWS]


def rows(triples: Sequence[Triple], seed: int) -> list[tuple[str, float]]:
    """Return a `(question, answer)` for each triple, the answer to ten significant digits."""
    chance = random.Random(seed)
    return [(ask(triple, chance), float(f"{convert(*triple):.9e}")) for triple in triples]


def as_text(pairs_of_rows: Sequence[tuple[str, float]]) -> str:
    """Return rows as JSON, one per line."""
    lines = ",\n".join(json.dumps([question, answer]) for question, answer in pairs_of_rows)
    return f"[\n{lines}\n]\n"


@click.command(help=__doc__.partition("\n")[0])
@click.option("--output-dir", type=Path, default=TRAIN_FILE.parent, help="folder to write into")
@click.option("--seed", type=int, default=SEED, show_default=True, help="seed of the draw")
def main(output_dir: Path, seed: int) -> None:
    """Write both files."""
    train, valid = split(seed)
    for name, triples, its_seed in (("train", train, seed + 1), ("valid", valid, seed + 2)):
        path = output_dir / f"{name}.json"
        path.write_text(as_text(rows(triples, its_seed)), encoding="utf-8", newline="\n")
        click.echo(f"{path}: {len(triples)} rows")


if __name__ == "__main__":
    main()
