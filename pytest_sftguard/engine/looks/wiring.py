"""How the adapter is attached to its base before the first step: what trains, from which values, on which base."""

from __future__ import annotations

import dataclasses
from typing import Any

from pytest_sftguard.engine.adapter import adapters, attachment, families, foundation, initial
from pytest_sftguard.engine.after import finiteness
from pytest_sftguard.engine.data.rows import micro_batches
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Built, Rebuilt, Started
from pytest_sftguard.records import FoundationRecord, Names, WiringRecord


class Wiring(Look[Started]):
    """Reads the model before the training, and runs the second model, which was built for reloading."""

    def __init__(self) -> None:
        self._compared: dict[str, Any] = {"uncompared": "the run ended before a second model was built"}
        self._redrawn: set[str] | None = None

    def prepare(self, built: Built) -> None:
        """Read the tensors; no forward pass goes through the model that is to be trained."""
        model = built.trainer.model
        if getattr(adapters.config_of(model), "is_prompt_learning", False):
            raise InapplicableError("the adapter is a prompt, and attached to no layer")
        attached = attachment.wiring(model, built.trainer.optimizer)
        reached: dict[str, Any] = {"families": families.families(model), **families.missed(model)}
        self._wiring: WiringRecord = dataclasses.replace(attached, **reached)
        self._start = initial.start(model)
        tensors, bad = foundation.nonfinite(model)
        self._base: dict[str, Any] = {
            "tensors": tensors,
            "nonfinite": Names.of(bad),
            "not_loaded": Names.of(built.loads.not_loaded(model)),
            "zero_magnitudes": Names.of(foundation.zero_magnitudes(model)),
        }

    def rebuilt(self, rebuilt: Rebuilt) -> None:
        """Compare the second model with its adapter and without, as it was built."""
        self._redrawn = rebuilt.redrawn
        model = rebuilt.fresh_trainer.model
        self._compared = initial.compare(model, finiteness.probe_of(rebuilt.given, model).plain)

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Return the three records."""
        model = reached.trainer.model
        pad = foundation.padding_id(model, reached.trainer.processing_class)
        ids = {i for _, rows in micro_batches(reached.batches, pad) for row in rows for i in row.ids}
        zero = foundation.zero_embeddings(model, ids)
        start, redrawn = self._start, self._redrawn
        loaded = None if redrawn is None else bool(start.nonzero_b) and not redrawn.intersection(start.nonzero_b.first)
        return {
            "wiring": self._wiring,
            "initial": dataclasses.replace(start, loaded=loaded, **self._compared),
            "foundation": FoundationRecord(**self._base, zero_embeddings=Names.of(zero)),
        }
