"""A checkpoint of an optimizer whose state is large, as it is where all weights train, saved and loaded."""

from __future__ import annotations

from typing import Any

from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.looks.checkpoints import LARGEST, compared, size_of
from pytest_sftguard.engine.stages import Trained


class LargeCheckpoints(Look[Trained]):
    """Saves and loads what the look `checkpoints` leaves out."""

    def conclude(self, reached: Trained) -> dict[str, Any]:
        """Compare the state after loading with the state before."""
        if (size := size_of(reached.trainer)) <= LARGEST:
            raise InapplicableError("the optimizer's state is small enough for the look `checkpoints`")
        return {"checkpoint": compared(reached, size)}
