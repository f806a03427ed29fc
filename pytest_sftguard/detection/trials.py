"""Trials: one generated fault or healthy training, what it does to a plain run, and what the guard said of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

EFFECT = 2.0
"""An effect counts from so many noise floors on."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the guard said of a training in one tier."""

    reported: tuple[str, ...] = ()
    """Invariants that reported something which they do not report of the training as it is."""
    named: tuple[str, ...] = ()
    """Names of the mechanisms in the diagnosis, the most probable first."""
    message: str = ""
    """The first finding."""
    seconds: float = 0.0
    """Wall time of the training, of its references and of the verdict."""
    error: str = ""
    """Why it could not be judged: an exception of the guard's own; empty if it was."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Seen:
        """From what `asdict` made."""
        return cls(**{**data, "reported": tuple(data["reported"]), "named": tuple(data["named"])})


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One generated fault, or one generated training without a fault."""

    id: str
    """The seed and the number, with which it is replayed, after `fault-` or `healthy-`."""
    where: str = ""
    """Station of the fault; empty for a healthy training."""
    what: str = ""
    """Operation of the fault."""
    magnitude: float = 0.0
    """How much: a share of the entries, or a size relative to the value's root mean square."""
    description: str = ""
    """The fault, or the training, in one sentence."""
    training: str = ""
    """The training that the fault was put into."""
    axes: dict[str, str] = field(default_factory=dict)
    """What a healthy training was composed of."""
    measure: str = ""
    """What the effect shows in: weights, losses, file, logits, ids or the resumed run."""
    effect: float | None = None
    """Relative distance of the plain run with the fault from the one without, by `measure`; None if not measured."""
    floor: float | None = None
    """Noise floor of `measure`: how far two sound runs are apart."""
    discarded: str = ""
    """Why it is not judged: no effect, an exception, a training that does not learn; empty if it is."""
    seen: dict[str, Seen] = field(default_factory=dict)
    """What the guard said of it, by tier."""
    seconds: float = 0.0
    """Wall time of the plain runs."""

    def detected(self, tier: str) -> bool | None:
        """Whether something was reported in `tier`; None if it was not judged there."""
        seen = self.seen.get(tier)
        return None if seen is None or seen.error else bool(seen.reported)

    @property
    def ratio(self) -> float | None:
        """The effect in noise floors."""
        return None if self.effect is None or not self.floor else self.effect / self.floor

    def to_dict(self) -> dict[str, Any]:
        """As plain types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trial:
        """From what `to_dict` made."""
        return cls(**{**data, "seen": {tier: Seen.from_dict(s) for tier, s in data["seen"].items()}})
