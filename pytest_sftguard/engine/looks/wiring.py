"""How the adapter sits on its base before the first step: what trains, from where, and on what."""

from __future__ import annotations

from typing import Any

from pytest_sftguard.engine.adapter import adapters, attachment, foundation, initial
from pytest_sftguard.engine.looks import InapplicableError, Look, Scene
from pytest_sftguard.engine.looks._rows import attended_ids, micro_batches
from pytest_sftguard.records import FoundationRecord, InitialRecord, Names, WiringRecord


class Wiring(Look):
    """Reads what is there before the training, and asks the model that was built for reloading."""

    def __init__(self) -> None:
        self._wiring: WiringRecord | None = None
        self._start: initial.Start | None = None
        self._compared: initial.Comparison | str = "the run ended before a second model was built"
        self._base: dict[str, Any] = {}

    def prepare(self, scene: Scene) -> None:
        """Read the tensors; no forward pass goes through the model that is to be trained."""
        assert scene.trainer is not None
        model = scene.trainer.model
        config = adapters.config_of(model)
        if getattr(config, "is_prompt_learning", False):
            raise InapplicableError("the adapter is a prompt, and attached to no layer")
        self._wiring = attachment.wiring(model, scene.trainer.optimizer)
        self._start = initial.start(model)
        tensors, bad = foundation.nonfinite(model)
        self._base = {
            "tensors": tensors,
            "nonfinite": Names.of(bad),
            "not_loaded": Names.of(scene.loads.not_loaded(model)),
            "zero_magnitudes": Names.of(foundation.zero_magnitudes(model)),
        }

    def rebuilt(self, scene: Scene) -> None:
        """Ask the second model, as it was built, with its adapter and without."""
        assert scene.fresh_trainer is not None
        self._compared = initial.compare(scene.fresh_trainer.model)

    def conclude(self, scene: Scene) -> dict[str, Any]:
        """The three records."""
        assert scene.trainer is not None
        assert self._start is not None
        ids = attended_ids(micro_batches(scene.watch.batches if scene.watch else []))
        zero = foundation.zero_embeddings(scene.trainer.model, ids)
        return {
            "wiring": self._wiring,
            "initial": self._initial(self._start, scene),
            "foundation": FoundationRecord(**self._base, zero_embeddings=Names.of(zero)),
        }

    def _initial(self, start: initial.Start, scene: Scene) -> InitialRecord:
        redrawn = scene.redrawn
        compared = self._compared
        return InitialRecord(
            factors=start.factors,
            init=start.init,
            identical=start.identical,
            neutral=start.neutral,
            loaded=None if redrawn is None else bool(start.nonzero_b) and not redrawn.intersection(start.nonzero_b),
            zero_a=Names.of(start.zero_a),
            nonzero_b=Names.of(start.nonzero_b),
            wrong_scaling=Names.of(start.wrong_scaling),
            **(
                {"uncompared": compared}
                if isinstance(compared, str)
                else {
                    "logits": compared.logits, "changed_logits": compared.changed,
                    "max_logit_change": compared.max_change, "max_abs_logit": compared.largest,
                }
            ),
        )  # fmt: skip
