"""Generated faults: a draw of the grammar, put around a target like a fault of the library.

`pytest_sftguard.engine.generated.faults:draw_17_42` is the fault with the number 42 of seed 17, in any process.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

from transformers import Trainer

from pytest_sftguard.engine.building.targets import Target
from pytest_sftguard.engine.faults.fault import Fault
from pytest_sftguard.engine.generated import stations
from pytest_sftguard.engine.generated.grammar import Draw, compose


class Generated(Fault):
    """One draw of the grammar."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.subject = ""
        """What the fault was limited to, once a Trainer was built."""

    @contextlib.contextmanager
    def inject(self, target: Target) -> Iterator[Target]:
        """Yield `target` with the fault in it, which also changes how peft loads or transformers generates."""
        with stations.around(self.draw, self._found), super().inject(target) as faulty:
            yield faulty

    def trainer(self, build: Callable[..., Trainer], **arguments: Any) -> Trainer:
        """The Trainer that `build` makes, with the fault in it."""
        trainer = build(**arguments)
        stations.within(self.draw, trainer, self._found)
        return trainer

    def _found(self, subject: str) -> None:
        self.subject = self.subject or subject


def path_of(draw: Draw) -> str:
    """The dotted path of `draw`, by which other processes find it."""
    return f"{__name__}:draw_{draw.seed}_{draw.number}"


def __getattr__(name: str) -> Callable[[], Generated]:
    found = re.fullmatch(r"draw_(\d+)_(\d+)", name)
    if found is None:
        raise AttributeError(name)
    return functools.partial(Generated, compose(int(found[1]), int(found[2])))
