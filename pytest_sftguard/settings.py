"""The settings: one row for each, resolved in one place. Marker, then option, then environment, then ini, then default.

A new setting is one more field of `Settings`. Options, ini keys, variables and `pytest --markers` follow from it, and a
field of the same name in `RunConfig` hands it to the engine.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import pytest

    from pytest_sftguard.matrix import Batch, RunConfig

T = TypeVar("T")
D = TypeVar("D")

BUILT_IN_TARGET = "pytest_sftguard.engine.models.tiny:build_trainer"
"""Target where none is named: a tiny random-weight model on synthetic rows."""

_SHARE = "a share of the memory, at least 0 and below 1, such as 0.1"


class SettingError(ValueError):
    """A setting has a value that it cannot have; the message quotes it, names its source and lists what is valid."""


def _items(value: Any) -> list[Any]:
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    if not items:
        raise ValueError("it is empty: name at least one")
    return items


def precisions(value: Any) -> tuple[str, ...]:
    """Names of precision modes."""
    from pytest_sftguard.precision import mode_named

    return tuple(mode_named(item).name for item in _items(value))


def batches(value: Any) -> tuple[Batch, ...]:
    """Per-device batches, with an accumulation or without."""
    from pytest_sftguard.matrix import parse_batch

    return tuple(parse_batch(item) for item in _items(value))


def whole(least: int) -> Callable[[Any], int]:
    """A reader of whole numbers that are not below `least`."""

    def read(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, (bool, float)) or not (text.isascii() and text.isdigit() and int(text) >= least):
            raise ValueError(f"give a whole number, at least {least}")
        return int(text)

    return read


def share(value: Any) -> float:
    """A share of the memory, at least 0 and below 1."""
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 <= number < 1:
        raise ValueError(f"give {_SHARE}")
    return number


def _margin(value: Any) -> float | str:
    if value in ("auto", "off"):
        return str(value)
    try:
        return share(value)
    except ValueError:
        raise ValueError(f"give auto, off or {_SHARE}") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("give a text that is not empty")
    return value.strip()


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_text, _items(value)))


def _truth(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError("give true or false")
    return words[str(value).lower()]


def _one_of(*valid: str) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in valid:
            raise ValueError(f"choose from {', '.join(valid)}")
        return str(value)

    return read


def _tier(value: Any) -> str:
    from pytest_sftguard.tiers import TIERS

    return _one_of(*TIERS)(value)


def _looks(value: Any) -> tuple[str, ...]:
    from pytest_sftguard.tiers import LOOKS, REFERENCES

    items = _texts(value)
    for item in items:
        if item not in (*LOOKS, *REFERENCES):
            raise ValueError(f"there is no look {item!r}: choose from {', '.join((*LOOKS, *REFERENCES))}")
    return items


def _by_name(example: str, names: str = r"\w+", types: Any = object) -> Callable[[Any], dict[str, Any]]:
    def read(value: Any) -> dict[str, Any]:
        if isinstance(value, str):
            import json

            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if isinstance(value, Mapping) and all(
            isinstance(k, str) and re.fullmatch(names, k) and isinstance(v, types) for k, v in value.items()
        ):
            return dict(value)
        raise ValueError(f"give {example}")

    return read


@dataclass(frozen=True)
class Setting:
    """What a row of `Settings` says, and the names that follow from it."""

    name: str
    """Name in the marker, and of the field."""
    read: Callable[[Any], Any]
    """Turns a text, or a marker's value, into the field's type; raises ValueError that says what is valid."""
    help: str
    """What it does, for `pytest --help`."""
    shown: str
    """What the help says of the default."""
    marker: bool = True
    """Whether the marker takes it."""
    flag: bool = False
    """Whether the option takes no value."""
    loop: bool = False
    """Whether `sft_observer` takes it, too."""

    @property
    def option(self) -> str:
        """The command-line option."""
        return "--sftguard-" + self.name.replace("_", "-")

    @property
    def ini(self) -> str:
        """The ini key, and the option's name in `config`."""
        return "sftguard_" + self.name

    @property
    def variable(self) -> str:
        """The environment variable."""
        return "SFTGUARD_" + self.name.upper()


def _row(read: Callable[[Any], T], default: D, text: str, shown: str = "", **more: bool) -> T | D:
    """A field of `Settings` that is described by a `Setting`; without `shown`, the default is shown as it prints."""
    described = {"read": read, "help": text, "shown": shown or str(default), **more}
    return field(default_factory=lambda: default, metadata=described)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The resolved settings of one marked test, or of the session."""

    precision: tuple[str, ...] | None = _row(
        precisions,
        None,
        "precision modes of the matrix, such as `fp32 bf16-mixed`",
        "fp32 bf16-mixed fp16-mixed, and tf32 where the device is set to cuda",
    )
    batch: tuple[Batch, ...] | None = _row(
        batches, None, "per-device batches; 2x4 is a batch of 2 with 4 accumulated micro-batches", "2 8"
    )
    effective_batch: int | None = _row(
        whole(1), None, "rows per optimizer step, the same in all cells", "least common multiple of the batches"
    )
    steps: int = _row(whole(1), 8, "optimizer steps of each cell")
    target: str = _row(
        _text,
        BUILT_IN_TARGET,
        "the code under test, module:function; the function builds a ready Trainer",
        "built-in tiny model",
    )
    model: str | None = _row(_text, None, "folder or hub id of the model that the target loads", "the target's own")
    seed: int = _row(whole(0), 0, "seed of adapter weights, data order and dropout")
    device: str = _row(
        _one_of("auto", "cpu", "cuda", "mps", "xpu"),
        "auto",
        "auto (first CUDA device, or else the CPU), cpu, cuda, mps or xpu",
    )
    questions: int = _row(whole(0), 8, "questions for the trained, reloaded adapter, if the target has any")
    training_arguments: Mapping[str, Any] = _row(
        _by_name('TrainingArguments by name, for example {"learning_rate": 1e-4}'),
        {},
        'further TrainingArguments, as JSON such as {"learning_rate": 1e-4}; they override the guard\'s own',
        "none",
    )
    tier: str = _row(
        _tier,
        "quick",
        "how much is examined: quick (the training), standard (also a few forward passes and short runs) or thorough"
        " (also whole trainings)",
    )
    looks: tuple[str, ...] = _row(
        _looks, (), "looks and reference runs to add to those of the tier, such as `merging rerun`", "none"
    )
    waive: tuple[str, ...] = _row(
        _texts,
        (),
        "invariants whose violation you accept, such as fp32_master: it is reported, and fails no test",
        "none",
        loop=True,
    )
    thresholds: Mapping[str, Any] = _row(
        _by_name(
            'thresholds by name, for example {"strict_answers.min_parsed_fraction": 1.0}', r"\w+\.\w+", (int, float)
        ),
        {},
        'thresholds of invariants, as JSON such as {"strict_answers.min_parsed_fraction": 1.0}',
        "none",
        loop=True,
    )
    invariants: tuple[str, ...] = _row(
        _texts, (), "your own invariants, module:Class, judged beside the built-in ones", "none", loop=True
    )
    fit_margin: float | str = _row(
        _margin,
        "auto",
        "share of the free memory that a cell must leave unused, or else it is not trained: auto (0.1 on CUDA, off"
        " elsewhere), off, or a number such as 0.1",
    )
    strict: bool = _row(
        _truth, False, "fail a cell that is not evaluated, instead of skipping it", "off", marker=False, flag=True
    )
    require_gpu: bool = _row(
        _truth,
        False,
        "train on CUDA; fail if nothing ran there, or if a cell is not evaluated",
        "off",
        marker=False,
        flag=True,
    )
    dir: str = _row(_text, ".sftguard", "folder for the records, below pytest's root", marker=False)

    @property
    def training_device(self) -> str:
        """The device that cells are trained on: CUDA where a GPU is required and `device` names none."""
        return "cuda" if self.require_gpu and self.device == "auto" else self.device

    @property
    def fails_unevaluated(self) -> bool:
        """Whether a test fails, and is not skipped, where its run is not evaluated."""
        return self.strict or self.require_gpu

    @property
    def references(self) -> tuple[str, ...]:
        """Names of the reference runs that are trained for the purpose."""
        from pytest_sftguard.tiers import asked

        return asked(self.tier, self.looks)[1]

    def configs(self) -> list[RunConfig]:
        """One RunConfig for each cell of the matrix. SettingError where the axes do not go together."""
        from pytest_sftguard.matrix import RunConfig, expand
        from pytest_sftguard.tiers import asked

        tf32 = ("tf32",) if self.training_device == "cuda" else ()
        default = ("fp32", *tf32, "bf16-mixed", "fp16-mixed")
        try:
            cells = expand(self.precision or default, self.batch or batches("2 8"), self.effective_batch)
        except ValueError as error:
            raise SettingError(str(error)) from None
        same = {f.name: getattr(self, f.name) for f in fields(RunConfig) if hasattr(self, f.name)}
        same |= {"device": self.training_device, "looks": asked(self.tier, self.looks)[0]}
        return [RunConfig(cell=cell, **same) for cell in cells]


SETTINGS = tuple(Setting(f.name, **f.metadata) for f in fields(Settings))
"""Every setting, in the order of the rows."""


def marker_line(name: str) -> str:
    """The marker's entry in `pytest --markers`."""
    keywords = ", ".join(f"{s.name}=" for s in SETTINGS if s.marker)
    return (
        f"{name}({keywords}): train one LoRA adapter for each cell of a precision x batch matrix, and judge its "
        "numbers; the test takes the fixture sft_run. All keywords are optional."
    )


def add_options(parser: pytest.Parser) -> None:
    """Register the options and ini keys."""
    group = parser.getgroup("sftguard", "numerical stability of LoRA fine-tuning (pytest-sftguard)")
    for setting in SETTINGS:
        text = f"{setting.help} (default: {setting.shown})"
        how: dict[str, Any] = {"action": "store_true"} if setting.flag else {"metavar": setting.name.upper()}
        group.addoption(setting.option, dest=setting.ini, default=None, help=text, **how)
        parser.addini(setting.ini, text, default=None)


def resolve(
    config: pytest.Config, keywords: Mapping[str, Any] | None = None, where: str = "", of: str = "gpu_stability"
) -> Settings:
    """Settle every setting; `keywords` are those that the test `where` gave to `of`, a marker or fixture.

    Raises SettingError for an unknown keyword, and for a value that a setting cannot have.
    """
    keywords = keywords or {}
    known = sorted(s.name for s in SETTINGS if s.marker)
    for keyword in keywords:
        if keyword not in known:
            raise SettingError(f"{where}: {of} has no keyword {keyword!r}: choose from {', '.join(known)}")
    found: dict[str, Any] = {}
    for s in SETTINGS:
        sources = (
            (f"{where}: {s.name}= of {of}", keywords.get(s.name)),
            (s.option, config.getoption(s.ini)),
            (s.variable, os.environ.get(s.variable)),
            (f"{s.ini} in {config.inipath.name if config.inipath else 'the ini file'}", config.getini(s.ini)),
        )
        given = next(((source, value) for source, value in sources if value is not None and value != ""), None)
        if given is not None:
            source, value = given
            try:
                found[s.name] = s.read(value)
            except ValueError as error:
                raise SettingError(f"{source}: {value!r} cannot be used: {error}") from None
    return Settings(**found)
