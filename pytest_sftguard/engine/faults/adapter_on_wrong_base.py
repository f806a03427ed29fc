"""The adapter is loaded onto weights that it was not trained on."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults import Fault, wrapped


class AdapterOnWrongBase(Fault):
    """The base's weights are drawn anew each time it is built: nobody fixed its seed, or its revision."""

    id = "adapter-on-wrong-base"
    source = "https://github.com/unslothai/unsloth-zoo/pull/810"
    injects = "builds a base of other weights each time, with the same names and shapes"
    reported_by: ClassVar = ("round_trip",)
    mechanism = "other_base"

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Count the bases that are built."""
        counter = itertools.count()

        def trainer(build: Any, **arguments: Any) -> Any:
            made = build(**arguments)
            generator = torch.Generator().manual_seed(next(counter))
            for parameter in made.model.parameters():
                if not parameter.requires_grad and parameter.is_floating_point() and parameter.dim() > 1:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.data.add_(noise * parameter.data.std())
            return made

        yield wrapped(target, trainer)
