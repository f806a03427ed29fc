"""Which extra looks a run was asked for, and what became of each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LookRecord:
    """One extra look of the engine, called as its file in `engine/looks`."""

    name: str
    """Its name."""
    inapplicable: str = ""
    """Why there is nothing to look at here, such as a target without questions; empty where there is."""
    error: str = ""
    """The exception that it ended in, `Type: message`; empty where it came to its end."""

    @property
    def done(self) -> bool:
        """Whether it came to its end."""
        return not self.inapplicable and not self.error
