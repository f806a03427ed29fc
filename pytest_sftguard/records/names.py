"""Names: how a record counts tensors and keeps what they are called."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_NAMES_KEPT = 1024
"""More than a large model has trainable tensors, so that a list is whole, and a file bounded."""


@dataclass(frozen=True)
class Names:
    """A count of tensors, and their names."""

    count: int = 0
    """How many there are."""
    first: tuple[str, ...] = ()
    """Their names, 1,024 at the most."""

    @classmethod
    def of(cls, names: Iterable[str]) -> Names:
        """Count `names` and keep them, up to the bound."""
        every = tuple(names)
        return cls(len(every), every[:_NAMES_KEPT])

    def __bool__(self) -> bool:
        return self.count != 0

    def __str__(self) -> str:
        if not self.first:
            return f"{self.count} tensors"
        more = self.count - 1
        return self.first[0] + (f" and {more} more" if more > 0 else "")


NONE = Names()
"""No tensor at all."""
