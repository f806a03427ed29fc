"""Which adapted layers a token passed through, and which of the others may rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from pytest_sftguard.engine.adapter import routing
from pytest_sftguard.engine.adapter.adapters import lora_layers
from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.looks import InapplicableError, Look
from pytest_sftguard.engine.stages import Started
from pytest_sftguard.records import Names, ReachRecord


class Reach(Look[Started]):
    """Compares the layers that were used with the structure of the model."""

    def conclude(self, reached: Started) -> dict[str, Any]:
        """Name the layers that no token passed through in any step."""
        recorder = reached.recorder
        layers = lora_layers(recorder.model)
        if not layers:
            raise InapplicableError("the model has no adapted layer")
        used, unused = recorder.ever_used, set(recorder.unused)
        modules = dict(recorder.model.named_modules())
        # a frozen adapter beside the active one has nothing to learn
        idle = [n for n in layers if n not in used and any(p.startswith(f"{n}.") for p in unused)]
        resting = [n for n in idle if _is_routed(n, modules, used)]
        return {
            "reach": ReachRecord(
                layers=len(layers),
                unreached=Names.of(n for n in idle if n not in resting),
                resting=Names.of(resting),
                dropped_layers=_drops_layers(forwards.inner(recorder.model)),
            )
        }


def _is_routed(name: str, modules: dict[str, nn.Module], used: set[str]) -> bool:
    """Whether the layer `name` is in one of the elements of a list that a router chooses from, and others were used."""
    return any(used.intersection(layers) for _, layers in routing.choices(name, modules))


def _drops_layers(model: Any) -> bool:
    """Whether the configuration asks for whole layers to be left out at random."""
    config = getattr(model, "config", None)
    values = {} if config is None else vars(config)
    names = ("layerdrop", "layer_drop", "drop_path")
    return any(isinstance(v, float) and v > 0 for k, v in values.items() if any(n in k for n in names))
