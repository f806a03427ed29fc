"""Subjects: which tensors or modules a generated fault is limited to, and their names for people."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pytest_sftguard.engine.generated.grammar import Draw

_LAYER = re.compile(r"\.(\d+)\.")
_WRAPPERS = re.compile(r"^(?:base_model\.model\.|model\.|module\.|transformer\.)+")


def chosen(draw: Draw, names: Iterable[str], *, same_role: bool = False) -> list[str]:
    """The names that `draw` is limited to: one, those of one layer, or all.

    With `same_role`, all are those that do the same in each layer, such as every `q_proj`.
    """
    every = list(names)
    if not every:
        return []
    one = every[min(len(every) - 1, int(draw.choice * len(every)))]
    if draw.whom == "layer" and (found := _layer(one)) is not None:
        return [n for n in every if _layer(n) == found]
    if draw.whom == "all":
        return [n for n in every if _role(n) == _role(one)] if same_role else every
    return [one]


def told(draw: Draw, names: list[str], *, same_role: bool = False) -> str:
    """The chosen `names` in words: `layer 1's q_proj.lora_B`, `a row of ...`, `all of layer 1`, `every q_proj`."""
    if not names:
        return "nothing"
    if draw.whom == "row":
        return f"one row of {_short(names[0])}"
    if draw.whom == "layer" and _layer(names[0]) is not None:
        return f"all of layer {_layer(names[0])}"
    if draw.whom == "all":
        return f"every {_role(names[0])}" if same_role and len(names) > 1 else "every tensor" if names[1:] else names[0]
    return _short(names[0])


def _layer(name: str) -> int | None:
    found = _LAYER.search(f".{name}.")
    return int(found[1]) if found else None


def _role(name: str) -> str:
    """The last parts of a name that are neither numbers nor the adapter's."""
    parts = [p for p in name.split(".") if not p.isdigit() and p not in ("default", "weight", "base_layer")]
    return ".".join(parts[-2:]) if "lora_" in parts[-1] else parts[-1]


def _short(name: str) -> str:
    """`layer 1's self_attn.q_proj.lora_B` for the whole path of a tensor or module."""
    short = _WRAPPERS.sub("", name).removesuffix(".weight").removesuffix(".default")
    found = _LAYER.search(f".{short}.")
    return f"layer {found[1]}'s {short[found.end() - 1 :]}" if found else short
