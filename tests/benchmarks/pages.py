"""Putting what was measured into a page of the documentation."""

from __future__ import annotations

from pathlib import Path


def put(path: Path, name: str, made: str) -> None:
    """Write `made` between `<!-- name -->` and the next `<!-- end -->` of a page. Raises SystemExit without them."""
    head, opening, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, closing, tail = rest.partition("<!-- end -->")
    if not closing:
        raise SystemExit(f"{path.name} has no place for a {name}: <!-- {name} --> and <!-- end -->, each on its line")
    path.write_text(f"{head}{opening}{made}\n{closing}{tail}", encoding="utf-8")
