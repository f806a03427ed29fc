"""Putting what was measured into a page of the documentation."""

from __future__ import annotations

import platform
from pathlib import Path

from pytest_sftguard.hardware import usable_cores


def publish(path: Path, name: str, made: str, *, write: bool) -> None:
    """Print `made`, and `write` it to its place in a page where that is asked for."""
    print(made, flush=True)
    if write:
        put(path, name, made)


def put(path: Path, name: str, made: str) -> None:
    """Write `made` between `<!-- name -->` and the next `<!-- end -->` of a page. Raises SystemExit without them."""
    head, opening, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, closing, tail = rest.partition("<!-- end -->")
    if not closing:
        raise SystemExit(f"{path.name} has no place for a {name}: <!-- {name} --> and <!-- end -->, each on its line")
    path.write_text(f"{head}{opening}{made}\n{closing}{tail}", encoding="utf-8")


def where(device: str = "cpu") -> str:
    """The machine, its device of that kind, and the versions that something is measured with."""
    import torch
    import transformers

    from pytest_sftguard.engine.machine.profiles import device_profile

    there = "" if device == "cpu" else f"{device_profile(device).name}; "
    return (
        f"{there}{device_profile('cpu').name}, {usable_cores()} cores, {torch.get_num_threads()} of them used,"
        f" Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
