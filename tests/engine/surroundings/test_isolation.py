"""Isolation: a run takes its changes back, and shows the warnings that are meant for the user."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from pytest_sftguard.engine.models import tiny
from pytest_sftguard.engine.surroundings.isolation import isolated

RENAMED = "`is_gradient_checkpointing` is deprecated and will be removed in v6."


def test_building_warns_of_nothing(tmp_path: Path) -> None:
    """What peft asks of transformers is no warning for the user, also where warnings are errors."""
    with warnings.catch_warnings(), isolated():
        warnings.simplefilter("error")
        with isolated():
            tiny.build_trainer(output_dir=str(tmp_path), report_to="none", use_cpu=True)


@pytest.mark.parametrize(
    ("text", "category", "module"),
    [
        (RENAMED, FutureWarning, "mine"),
        ("my own", UserWarning, "mine"),
        ("another", FutureWarning, "transformers.mine"),
    ],
    ids=["same-text", "own", "other-text"],
)
def test_every_other_warning_is_shown(text: str, category: type[Warning], module: str) -> None:
    """The user's code is heard, and so are the libraries on anything else."""
    with pytest.warns(category, match=text), isolated():
        warnings.warn_explicit(text, category, f"{module}.py", 1, module=module)


def test_filters_are_put_back() -> None:
    """A target's own filters end with the run."""
    before = list(warnings.filters)
    with isolated():
        warnings.simplefilter("ignore")
    assert warnings.filters == before
