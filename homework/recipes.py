"""The hyper-parameters of the training: those that depend on the base, and those that do not."""

from __future__ import annotations

from dataclasses import dataclass

from .base import is_embedded
from .task.answers import FOUR_DIGITS, TWO_DIGITS, Notation

TARGET_BATCH = 32
"""Rows per optimizer step that batch and accumulation aim at."""
SEED = 11


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The hyper-parameters that depend on the base."""

    learning_rate: float
    """Peak of the schedule, reached at the first step; it falls linearly to 0."""
    epochs: float
    """Passes over the training rows where no number of steps is given."""
    rank: int
    """Rank of each LoRA pair."""
    alpha: int
    """LoRA's alpha; the update is scaled by alpha / rank."""
    adam_beta2: float = 0.999
    """AdamW's decay rate of the mean of squared gradients."""
    notation: Notation = FOUR_DIGITS
    """How the answers that it learns are written."""
    tables: int = 0
    """How often the command adds the table of each pair of units of the training file (see `task/tables.py`)."""


EMBEDDED_RECIPE = Recipe(learning_rate=4e-3, epochs=3, rank=16, alpha=32)
OTHER_RECIPE = Recipe(learning_rate=2e-4, epochs=3, rank=16, alpha=32)
"""For any base that has no recipe of its own."""
RECIPES = {
    "smollm2-135m": Recipe(
        learning_rate=2e-3, epochs=1, rank=32, alpha=64, adam_beta2=0.99, notation=TWO_DIGITS, tables=6
    )
}
"""For bases known by name. What SmolLM2 learns from other rows and in other notations: docs/smollm2.md."""


def recipe_for(model: str | None) -> Recipe:
    """Return the hyper-parameters for a base."""
    return EMBEDDED_RECIPE if is_embedded(model) else RECIPES.get(str(model), OTHER_RECIPE)


def defaults_of(field: str) -> str:
    """Return what each recipe says of one hyper-parameter, for the help."""
    named = {"the embedded model": EMBEDDED_RECIPE, **RECIPES, "another": OTHER_RECIPE}
    return "default " + ", ".join(f"{getattr(recipe, field):g} for {name}" for name, recipe in named.items())
