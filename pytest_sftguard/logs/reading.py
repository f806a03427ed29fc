"""Reading: from the file that a training left to a series of plain numbers."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from pytest_sftguard.logs.series import Entry, Log

TRACKED = ("events.out.tfevents.*", "*/events.out.tfevents.*", "runs/*/events.out.tfevents.*")
"""Where TensorBoard's files lie in a folder."""
NAMES = {
    "lr": "learning_rate",
    "global_step": "step",
    "current_steps": "step",
    "global_step/max_steps": "step",
    "train/global_step": "step",
}
"""Names of other tools, and the Trainer's for the same number."""
SHOWN = re.compile(r"loss|grad_norm|train_loss|train_runtime|eval_.+")
"""Names of which an entry has at least one; a printed configuration has none."""

_PRINTED = re.compile(r"^\{.*\}[ \t]*$|\{[^{}]*\}", re.MULTILINE)
_PAIR = re.compile(r"""(["'])([^"'\n]{1,200})\1\s*:\s*(?:[\w.]{1,40}\()?(["']?)([^"',(){}\s]{1,400})\3""")
_BAR = re.compile(r"\|\s*(\d{1,12})/(\d{1,12}) \[")
_FOUR_DIGITS = 4


class LogError(Exception):
    """A file cannot be read as a log; the message says why."""


def read(path: Path) -> Log:
    """Read a log: a file, or a folder with a `trainer_state.json` or TensorBoard's files in it.

    Raises LogError where the file is missing, cannot be read or holds no entry of a log.
    """
    try:
        file = _inside(path) if path.is_dir() else path
        if "tfevents" in file.name:
            return _events(file)
        data = file.read_bytes()
    except (OSError, ValueError) as error:
        raise LogError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    # PowerShell's > writes UTF-16
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    return parse(data.decode(encoding, errors="replace").replace("\r\n", "\n"), str(file))


def parse(text: str, source: str) -> Log:
    """Read the text of a log. Raises LogError where there is no entry in it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if source.endswith(".json"):
            raise LogError(f"{source} is not JSON: {error}") from None
        return _lines(text, source)
    if isinstance(data, dict) and isinstance(data.get("log_history"), list):
        return Log(
            source=source,
            form="trainer_state.json",
            entries=_entries(data["log_history"], source, may_be_empty=not data["log_history"]),
            global_step=_whole(data.get("global_step")),
            max_steps=_whole(data.get("max_steps")),
            logging_steps=_number(data.get("logging_steps")),
        )
    items = data if isinstance(data, list) else [data]
    return Log(source=source, form="a log_history in JSON", entries=_entries(items, source))


def _inside(folder: Path) -> Path:
    """The log in a folder: its own, else that of its newest checkpoint, else TensorBoard's newest file."""
    if (own := folder / "trainer_state.json").is_file():
        return own
    states = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: _whole(p.parent.name[11:]) or 0)
    events = sorted((p for pattern in TRACKED for p in folder.glob(pattern)), key=lambda p: p.stat().st_mtime)
    if not states and not events:
        raise ValueError("there is no trainer_state.json in this folder or in a checkpoint-* of it, and no event file")
    return (states or events)[-1]


def _lines(text: str, source: str) -> Log:
    """The entries that stand in a text: JSON lines, or dicts that the Trainer printed among anything else."""
    found: list[tuple[int, Mapping[str, Any]]] = []
    json_lines = 0
    for match in _PRINTED.finditer(text):
        try:
            item = json.loads(match[0])
            json_lines += 1
        except (ValueError, RecursionError):
            item = {name: f"{quote}{value}{quote}" for _, name, quote, value in _PAIR.findall(match[0])}
        if _is_entry(item):
            found.append((match.end(), item))
    items = [dict(item) for _, item in found]
    total = _count_by_bars(text, [end for end, _ in found], items)
    crash = re.findall(r"^Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*(\S.*)", text, re.MULTILINE)
    return Log(
        source=source,
        form="JSON lines" if found and json_lines >= len(found) else "printed output",
        entries=_entries(items, source),
        max_steps=total,
        crash=crash[-1][:200] if crash else "",
    )


def _count_by_bars(text: str, ends: list[int], items: list[dict[str, Any]]) -> int | None:
    """Give entries without a step that of the progress bar behind them; return the bar's number of steps.

    tqdm draws the bar again below each line that it writes. Where the output was buffered, bars and lines are out of
    order: their steps are taken only where they rise from one entry to the next.
    """
    total = max((int(n) for _, n in _BAR.findall(text)), default=None)
    bars = [(m.start(), int(m[1])) for m in _BAR.finditer(text) if int(m[2]) == total]
    steps: list[int | None] = []
    place = 0
    for end, following in pairwise([*ends, len(text)]):
        while place < len(bars) and bars[place][0] < end:
            place += 1
        steps.append(bars[place][1] if place < len(bars) and bars[place][0] < following else None)
    trained = [s for s, item in zip(steps, items, strict=True) if "loss" in item]
    known = [s for s in trained if s is not None]
    if known and len(known) == len(trained) and all(a < b for a, b in pairwise(known)):
        for step, item in zip(steps, items, strict=True):
            if "loss" in item:
                item.setdefault("step", step)
        return total
    return None


def _entries(items: Iterable[Any], source: str, *, may_be_empty: bool = False) -> tuple[Entry, ...]:
    entries = tuple(_entry(place, item) for place, item in enumerate(filter(_is_entry, items), 1))
    if not entries and not may_be_empty:
        raise LogError(f"{source}: there is no line of a training's log in it, such as {{'loss': 2.5, 'epoch': 0.1}}")
    return entries


def _is_entry(item: Any) -> bool:
    return isinstance(item, dict) and any(SHOWN.fullmatch(_name(key)) for key in item)


def _entry(place: int, item: Mapping[str, Any]) -> Entry:
    named = {_name(key): value for key, value in item.items()}
    step = _whole(named.pop("step", None))
    # the regular expression that reads printed dicts keeps quotes, so that texts stay texts
    texts = {n: v for n, v in named.items() if isinstance(v, str)}
    numbers = {name: number for name, value in named.items() if (number := _number(value)) is not None}
    digits = [len(re.sub(r"e.*|[^\d]", "", v).lstrip("0")) for n, v in texts.items() if n in numbers and v[:1] in "'\""]
    return Entry(
        place=place,
        step=step,
        values=numbers,
        empty=tuple(n for n, v in named.items() if v is None or v in ("None", "null")),
        rounded=bool(digits) and max(digits) <= _FOUR_DIGITS,
    )


def _name(key: Any) -> str:
    """The Trainer's name for what a tool calls `key`: `eval_loss` for TensorBoard's `eval/loss`."""
    name = str(key)
    name = NAMES.get(name, name)
    group, slash, rest = name.partition("/")
    if slash and group == "train":
        return NAMES.get(rest, rest)
    return f"eval_{rest}" if slash and group == "eval" else name


def _number(value: Any) -> float | None:
    """A number, also from a text such as "nan", "Infinity" or "10/80"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value.strip("'\" ").partition("/")[0] if isinstance(value, str) else value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def _whole(value: Any) -> int | None:
    number = _number(value)
    return int(number) if number is not None and math.isfinite(number) else None


def _events(path: Path) -> Log:
    """Scalars of a TensorBoard event file, those of one step in one entry."""
    if not path.is_file():
        raise ValueError("No such file or directory")
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util import tensor_util
    except ImportError:
        message = (
            'event files need TensorBoard: pip install "pytest-sftguard[tensorboard]", or hand over trainer_state.json'
        )
        raise LogError(f"{path}: {message}") from None

    def scalars() -> Iterator[tuple[int, str, float]]:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    yield event.step, value.tag, float(tensor_util.make_ndarray(value.tensor))

    steps: defaultdict[tuple[int, bool], dict[str, Any]] = defaultdict(dict)
    try:
        for step, tag, number in scalars():
            # an evaluation is an entry of its own, as in log_history
            steps[step, tag.startswith("eval/")] |= {tag: number, "step": step}
    # whatever the file holds, the library must not end in a traceback of its own
    except Exception as error:
        raise LogError(f"{path} cannot be read as an event file: {error}") from None
    return Log(source=str(path), form="a TensorBoard event file", entries=_entries(steps.values(), str(path)))
