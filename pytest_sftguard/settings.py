"""One table of options, resolved in one place: marker, then option, then environment, then ini, then default."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

    from pytest_sftguard.matrix import RunConfig

BUILT_IN_TARGET = "pytest_sftguard.engine.models.tiny:build_trainer"
"""Target where none is named: a tiny random-weight model on synthetic rows."""


class SettingError(ValueError):
    """A setting with a value that it cannot have; the message quotes it, names its source and lists what is valid."""


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    """As in the marker; the option is `--sftguard-NAME`, the ini key `sftguard_NAME`, the variable `SFTGUARD_NAME`."""
    read: Callable[[Any], Any]
    """Turns a text, or a marker's value, into the setting's type; ValueError says what is valid."""
    default: Any
    """Value where nothing else is said."""
    help: str
    """What it does, for `pytest --help` and the documentation."""
    marker: bool = True
    """Whether the marker takes it."""
    flag: bool = False
    """Whether the option takes no value."""

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


def _items(value: Any) -> list[Any]:
    items = value.replace(",", " ").split() if isinstance(value, str) else value
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    if not items:
        raise ValueError("it is empty: name at least one")
    return items


def _precisions(value: Any) -> tuple[str, ...]:
    from pytest_sftguard.precision import mode_named

    return tuple(mode_named(item).name for item in _items(value))


def _batches(value: Any) -> tuple[Any, ...]:
    from pytest_sftguard.matrix import parse_batch

    return tuple(parse_batch(item) for item in _items(value))


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in _items(value))


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        text = str(value).strip()
        if isinstance(value, (bool, float)) or not (text.isascii() and text.isdigit() and int(text) >= least):
            raise ValueError(f"give a whole number from {least} on")
        return int(text)

    return read


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("give a text that is not empty")
    return value.strip()


def _truth(value: Any) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if str(value).lower() not in words:
        raise ValueError("give true or false")
    return words[str(value).lower()]


def _device(value: Any) -> str:
    valid = ("auto", "cpu", "cuda", "mps", "xpu")
    if value not in valid:
        raise ValueError(f"choose from {', '.join(valid)}")
    return str(value)


def _margin(value: Any) -> float | str:
    if value in ("auto", "off"):
        return str(value)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if isinstance(value, bool) or not 0 <= number < 1:
        raise ValueError("give auto, off or a share of the free memory from 0 up to 1, such as 0.1")
    return number


def _tier(value: Any) -> str:
    from pytest_sftguard.tiers import TIERS

    if value not in TIERS:
        raise ValueError(f"choose from {', '.join(TIERS)}")
    return str(value)


def _looks(value: Any) -> tuple[str, ...]:
    from pytest_sftguard.tiers import LOOKS, REFERENCES

    items = _texts(value)
    for item in items:
        if item not in (*LOOKS, *REFERENCES):
            raise ValueError(f"there is no look {item!r}: choose from {', '.join((*LOOKS, *REFERENCES))}")
    return items


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        import json

        try:
            value = json.loads(value)
        except ValueError:
            value = None
    if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
        raise ValueError('give TrainingArguments by name, for example {"learning_rate": 1e-4}')
    return dict(value)


def _thresholds(value: Any) -> dict[str, Any]:
    try:
        found = _mapping(value)
    except ValueError:
        found = {"": None}
    if not all(re.fullmatch(r"\w+\.\w+", k) and isinstance(v, (int, float)) for k, v in found.items()):
        raise ValueError('give thresholds by name, for example {"strict_answers.min_parsed_fraction": 1.0}')
    return found


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "precision",
        _precisions,
        None,
        "precision modes of the matrix: fp32, tf32, bf16-mixed, fp16-mixed, bf16-true, fp16-true"
        " (default: fp32 bf16-mixed fp16-mixed, and tf32 where the device is set to cuda)",
    ),
    Setting(
        "batch",
        _batches,
        None,
        "per-device batches, such as `2 8`, or 2x4 for 4 micro-batches of 2 (default: 2 8)",
    ),
    Setting(
        "effective_batch",
        _whole(1),
        None,
        "rows per optimizer step, shared by all batches of the matrix"
        " (default: the least common multiple of the per-device batches)",
    ),
    Setting("steps", _whole(1), 8, "optimizer steps of each cell (default: 8)"),
    Setting(
        "target",
        _text,
        BUILT_IN_TARGET,
        "the code under test, module:function; the function builds a ready Trainer"
        " (default: a tiny random-weight model that needs no network)",
    ),
    Setting("model", _text, None, "folder or hub id of the model that the target loads (default: the target's own)"),
    Setting("seed", _whole(0), 0, "seed of weights, data order and dropout (default: 0)"),
    Setting(
        "device",
        _device,
        "auto",
        "auto (the first CUDA device, or else the CPU), cpu, cuda, mps or xpu (default: auto)",
    ),
    Setting(
        "questions",
        _whole(0),
        8,
        "questions that the trained, reloaded adapter is asked, where the target has any (default: 8)",
    ),
    Setting(
        "training_arguments",
        _mapping,
        {},
        'further TrainingArguments for the target, as JSON such as {"learning_rate": 1e-4}; they win',
    ),
    Setting(
        "tier",
        _tier,
        "quick",
        "how much is looked at beyond the training: quick, standard (a few forward passes and short runs more) or"
        " thorough (whole trainings more) (default: quick)",
    ),
    Setting("looks", _looks, (), "looks and reference runs beside those of the tier, by name, such as `merging rerun`"),
    Setting(
        "waive",
        _texts,
        (),
        "invariants that you know not to hold, such as fp32_master: reported as waived, and no failure",
    ),
    Setting(
        "thresholds",
        _thresholds,
        {},
        'thresholds of invariants, as JSON such as {"strict_answers.min_parsed_fraction": 1.0}',
    ),
    Setting("invariants", _texts, (), "your own invariants, module:Class, judged beside the built-in ones"),
    Setting(
        "fit_margin",
        _margin,
        "auto",
        "a cell whose predicted memory does not leave this share of the free memory is not trained: auto (0.1 on CUDA,"
        " off elsewhere), off, or a number such as 0.1 (default: auto)",
    ),
    Setting(
        "strict",
        _truth,
        False,
        "a cell that is not evaluated fails, instead of being skipped with its reason",
        marker=False,
        flag=True,
    ),
    Setting("require_gpu", _truth, False, "train on CUDA, and fail if nothing ran there", marker=False, flag=True),
    Setting(
        "dir",
        _text,
        ".sftguard",
        "folder for the records, below pytest's root (default: .sftguard)",
        marker=False,
    ),
)
"""The whole table."""


@dataclass(frozen=True)
class Settings:
    """Resolved settings of one marked test, or of the session."""

    values: dict[str, Any]
    """By name, in the types that the table's readers give."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def configs(self) -> list[RunConfig]:
        """One RunConfig for each cell of the matrix. SettingError where the axes do not go together."""
        from pytest_sftguard.matrix import RunConfig, expand, parse_batch
        from pytest_sftguard.tiers import asked

        device = "cuda" if self.require_gpu and self.device == "auto" else self.device
        default = ("fp32", *(("tf32",) if device == "cuda" else ()), "bf16-mixed", "fp16-mixed")
        batches = self.batch or (parse_batch(2), parse_batch(8))
        try:
            cells = expand(self.precision or default, batches, self.effective_batch)
        except ValueError as error:
            raise SettingError(str(error)) from None
        looks, _ = asked(self.tier, self.looks)
        return [
            RunConfig(
                cell=cell, target=self.target, steps=self.steps, model=self.model, seed=self.seed, device=device,
                looks=looks, questions=self.questions, training_arguments=self.training_arguments,
                fit_margin=self.fit_margin,
            )
            for cell in cells
        ]  # fmt: skip

    @property
    def references(self) -> tuple[str, ...]:
        """Kinds of reference runs that are trained for the purpose, in the order of the table of tiers."""
        from pytest_sftguard.tiers import asked

        return asked(self.tier, self.looks)[1]


def marker_line(name: str) -> str:
    """The marker's entry in `pytest --markers`."""
    keywords = ", ".join(f"{s.name}=" for s in SETTINGS if s.marker)
    return (
        f"{name}({keywords}): train one LoRA adapter for each cell of a precision x batch matrix, and judge its "
        "numbers; the test takes the fixture sft_run. All keywords are optional."
    )


def add_options(parser: pytest.Parser) -> None:
    """Register the options and ini keys of the table."""
    group = parser.getgroup("sftguard", "numerical stability of LoRA fine-tuning (pytest-sftguard)")
    for setting in SETTINGS:
        how: dict[str, Any] = {"action": "store_true"} if setting.flag else {"metavar": setting.name.upper()}
        group.addoption(setting.option, dest=setting.ini, default=None, help=setting.help, **how)
        parser.addini(setting.ini, setting.help, default=None)


def resolve(config: pytest.Config, marker: Mapping[str, Any] | None = None, where: str = "") -> Settings:
    """Settle every setting; `marker` holds the keywords of a gpu_stability marker, `where` its test.

    Raises SettingError for an unknown keyword, and for a value that a setting cannot have.
    """
    marker = marker or {}
    known = {s.name for s in SETTINGS if s.marker}
    for keyword in marker:
        if keyword not in known:
            raise SettingError(
                f"{where}: gpu_stability has no keyword {keyword!r}: choose from {', '.join(sorted(known))}"
            )
    return Settings({s.name: _settle(s, config, marker, where) for s in SETTINGS})


def _settle(setting: Setting, config: pytest.Config, marker: Mapping[str, Any], where: str) -> Any:
    sources = (
        (f"{where}: {setting.name}= of gpu_stability", marker.get(setting.name)),
        (setting.option, config.getoption(setting.ini)),
        (setting.variable, os.environ.get(setting.variable) or None),
        (f"{setting.ini} in {config.inipath.name if config.inipath else 'the ini file'}", config.getini(setting.ini)),
    )
    for source, value in sources:
        if value is not None and value != "":
            try:
                return setting.read(value)
            except ValueError as error:
                raise SettingError(f"{source}: {value!r} cannot be used: {error}") from None
    return setting.default
