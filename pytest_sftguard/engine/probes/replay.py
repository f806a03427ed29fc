"""To be written."""

from __future__ import annotations

from pytest_sftguard.engine.probes import Probe


class Replay(Probe):
    """To be written."""
