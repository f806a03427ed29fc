"""Settings: one row for each, five sources in one order, and an error for each bad value that names its source."""

from __future__ import annotations

import itertools
import types
from dataclasses import fields

import pytest

from pytest_sftguard.matrix import Batch, RunConfig
from pytest_sftguard.settings import BUILT_IN_TARGET, SETTINGS, SettingError, Settings, resolve
from pytest_sftguard.tiers import TIERS

ROWS = {s.name: s for s in SETTINGS}
SOURCES = ["marker", "option", "environment", "ini", "default"]


class Config:
    """What resolving asks of pytest's config."""

    def __init__(self, options=None, ini=None):
        self.options, self.ini = options or {}, ini or {}
        self.inipath = types.SimpleNamespace(name="pytest.ini")

    def getoption(self, name):
        return self.options.get(name)

    def getini(self, name):
        return self.ini.get(name)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for setting in SETTINGS:
        monkeypatch.delenv(setting.variable, raising=False)


def resolved(monkeypatch, name, **values):
    """What `name` resolves to where the sources in `values` set it."""
    setting = ROWS[name]
    if "environment" in values:
        monkeypatch.setenv(setting.variable, values["environment"])
    config = Config({setting.ini: values.get("option")}, {setting.ini: values.get("ini")})
    return getattr(resolve(config, {name: values.get("marker")} if setting.marker else {}, "t.py::test_it"), name)


@pytest.mark.parametrize(("winner", "loser"), [*itertools.combinations(SOURCES[:-1], 2)], ids="-over-".join)
def test_precedence(monkeypatch, winner, loser):
    """Marker, then option, then environment, then ini."""
    assert resolved(monkeypatch, "steps", **{winner: "3", loser: "5"}) == 3


@pytest.mark.parametrize("source", SOURCES[:-1])
def test_any_source_wins_over_the_default(monkeypatch, source):
    """A setting that is set anywhere is not the default."""
    assert resolved(monkeypatch, "steps", **{source: "3"}) == 3


@pytest.mark.parametrize("source", ["option", "environment", "ini"])
def test_empty_text_is_unset(monkeypatch, source):
    """An empty option, variable or key says nothing."""
    assert resolved(monkeypatch, "steps", **{source: ""}) == 8


def test_none_in_the_marker_is_unset(monkeypatch):
    """A marker that passes None on leaves the setting to the other sources."""
    assert resolved(monkeypatch, "steps", marker=None, option="3") == 3


def test_zero_is_set(monkeypatch):
    """0 is a value: it does not fall through to the next source."""
    assert resolved(monkeypatch, "seed", marker=0, option="3") == 0


@pytest.mark.parametrize("flag", ["strict", "require_gpu"])
def test_flag_can_be_taken_back(monkeypatch, flag):
    """The environment's `false` wins over the ini file's `true`."""
    assert resolved(monkeypatch, flag, environment="false", ini="true") is False


GOOD = [
    ("precision", "fp32 bf16-mixed", ("fp32", "bf16-mixed")),
    ("precision", "fp32,bf16-mixed", ("fp32", "bf16-mixed")),
    ("precision", ["fp32"], ("fp32",)),
    ("batch", "2 8", (Batch(2), Batch(8))),
    ("batch", "2x4", (Batch(2, 4),)),
    ("batch", 4, (Batch(4),)),
    ("batch", [2, "4x2"], (Batch(2), Batch(4, 2))),
    ("effective_batch", 8, 8),
    ("steps", " 3 ", 3),
    ("device", "cpu", "cpu"),
    ("questions", 0, 0),
    ("training_arguments", '{"learning_rate": 1e-4}', {"learning_rate": 1e-4}),
    ("training_arguments", {"warmup_steps": 2}, {"warmup_steps": 2}),
    ("invariants", "a:B c:D", ("a:B", "c:D")),
    ("fit_margin", "off", "off"),
    ("fit_margin", "0.25", 0.25),
    ("fit_margin", 0, 0.0),
]


@pytest.mark.parametrize(("name", "value", "read"), GOOD, ids=[f"{n}-{v}" for n, v, _ in GOOD])
def test_value_is_read(monkeypatch, name, value, read):
    """A marker may say a value as text or as Python."""
    assert resolved(monkeypatch, name, marker=value) == read


BAD = [
    ("precision", "fp8", "unknown precision 'fp8': choose from fp32, tf32, bf16-mixed"),
    ("precision", [], "it is empty"),
    ("precision", 32, "unknown precision 32"),
    ("precision", ["fp32", None], "unknown precision None"),
    ("batch", 0, "it must be at least 1"),
    ("batch", "many", "give a whole number such as 8, or 2x4"),
    ("batch", "2 0x4", "it must be at least 1"),
    ("batch", " ", "it is empty"),
    ("effective_batch", "0", "give a whole number, at least 1"),
    ("steps", 0, "give a whole number, at least 1"),
    ("steps", "-1", "give a whole number, at least 1"),
    ("steps", 1.5, "give a whole number, at least 1"),
    ("steps", 8.0, "give a whole number, at least 1"),
    ("steps", True, "give a whole number, at least 1"),
    ("steps", "٣", "give a whole number, at least 1"),
    ("steps", "eight", "give a whole number, at least 1"),
    ("target", " ", "give a text that is not empty"),
    ("target", 3, "give a text that is not empty"),
    ("model", ["a"], "give a text that is not empty"),
    ("seed", "-1", "give a whole number, at least 0"),
    ("device", "gpu", "choose from auto, cpu, cuda, mps, xpu"),
    ("device", ["cpu"], "choose from auto"),
    ("questions", "some", "give a whole number, at least 0"),
    ("fit_margin", "1", "give auto, off or a share of the memory, at least 0 and below 1"),
    ("fit_margin", "nan", "give auto, off or a share of the memory, at least 0 and below 1"),
    ("fit_margin", "10%", "give auto, off or a share of the memory, at least 0 and below 1"),
    ("fit_margin", True, "give auto, off or a share of the memory, at least 0 and below 1"),
    ("training_arguments", "lr=1", "give TrainingArguments by name"),
    ("training_arguments", "[1]", "give TrainingArguments by name"),
    ("training_arguments", {1: 2}, "give TrainingArguments by name"),
    ("invariants", [3], "give a text that is not empty"),
]


@pytest.mark.parametrize(("name", "value", "wording"), BAD, ids=[f"{n}-{v}" for n, v, _ in BAD])
def test_bad_value_is_refused(monkeypatch, name, value, wording):
    """A value that a setting cannot have is refused, with what is valid."""
    with pytest.raises(SettingError, match=wording):
        resolved(monkeypatch, name, marker=value)


@pytest.mark.parametrize("name", ["precision", "batch", "steps", "device", "strict", "require_gpu", "questions"])
@pytest.mark.parametrize(
    ("source", "called"),
    [
        ("option", lambda s: s.option),
        ("environment", lambda s: s.variable),
        ("ini", lambda s: f"{s.ini} in pytest.ini"),
    ],
    ids=["option", "environment", "ini"],
)
def test_error_names_its_source(monkeypatch, name, source, called):
    """The error begins with the place that the bad value comes from, and quotes it."""
    with pytest.raises(SettingError) as caught:
        resolved(monkeypatch, name, **{source: "no-such-thing"})
    assert str(caught.value).startswith(f"{called(ROWS[name])}: 'no-such-thing' cannot be used: ")


def test_error_names_the_fixture():
    """A bad value that a loop's test hands to its fixture is not told as the marker's."""
    with pytest.raises(SettingError, match=r"^t\.py::test_it: waive= of sft_observer: 3 cannot be used"):
        resolve(Config(), {"waive": 3}, "t.py::test_it", "sft_observer")


def test_error_names_the_marked_test(monkeypatch):
    """A bad value in a marker is told with its test and its keyword."""
    with pytest.raises(SettingError, match=r"^t\.py::test_it: steps= of gpu_stability: 0 cannot be used"):
        resolved(monkeypatch, "steps", marker=0)


@pytest.mark.parametrize("keyword", ["stepps", "strict", "dir", "require_gpu"])
def test_unknown_keyword_is_refused(keyword):
    """A keyword that the marker does not take is refused, with those that it takes."""
    with pytest.raises(SettingError, match=f"no keyword '{keyword}': choose from .*batch, device, effective_batch"):
        resolve(Config(), {keyword: 1}, "t.py::test_it")


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_one_prefix(setting):
    """Option, variable and ini key of a setting are its name with our prefix."""
    words = setting.name.split("_")
    assert (setting.option, setting.variable, setting.ini) == (
        "--sftguard-" + "-".join(words),
        "SFTGUARD_" + "_".join(words).upper(),
        "sftguard_" + "_".join(words),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_default_can_be_read(setting):
    """Every default is a value that its own reader accepts and keeps, or None or empty where nothing is set."""
    default = getattr(Settings(), setting.name)
    assert not default or setting.read(default) == default


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
def test_help_tells_the_default(setting):
    """What the help says of a default is the default, or words where it does not print well."""
    default = getattr(Settings(), setting.name)
    assert setting.shown == str(default) or not default or default == BUILT_IN_TARGET


USUAL = ("fp32", "bf16-mixed", "fp16-mixed")
USUAL_ON_CUDA = ("fp32", "tf32", "bf16-mixed", "fp16-mixed")
FP32 = {"precision": "fp32"}


def configs(**options):
    return resolve(Config({f"sftguard_{k}": v for k, v in options.items()})).configs()


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        pytest.param({"batch": "2 8"}, [f"{p}-b{b}" for p in USUAL for b in ("2x4", "8x1")], id="usual"),
        pytest.param({**FP32, "batch": "2 4x3"}, ["fp32-b2x2", "fp32-b4x3"], id="written-accumulation"),
        pytest.param({**FP32, "batch": "2 4", "effective_batch": "8"}, ["fp32-b2x4", "fp32-b4x2"], id="effective"),
        pytest.param({"batch": "1", "device": "cuda"}, [f"{p}-b1x1" for p in USUAL_ON_CUDA], id="cuda"),
        pytest.param({"batch": "1", "require_gpu": True}, [f"{p}-b1x1" for p in USUAL_ON_CUDA], id="require-gpu"),
        pytest.param(FP32, ["fp32-b2x4", "fp32-b8x1"], id="usual-batches"),
    ],
)
def test_matrix_of_the_settings(options, ids):
    """The settings give one run for each cell, in order, without a look at the hardware."""
    assert [str(c.cell) for c in configs(**options)] == ids


def test_required_gpu_is_the_device():
    """With require_gpu cells train on CUDA, and are not left to what is there."""
    assert {c.device for c in configs(require_gpu=True)} == {"cuda"}


def test_batch_that_does_not_divide_is_refused():
    """Axes that do not go together are one SettingError."""
    with pytest.raises(SettingError, match="batch 3 does not divide the effective batch 8"):
        configs(batch="3", effective_batch="8")


@pytest.mark.parametrize("name", sorted({f.name for f in fields(RunConfig)} & ROWS.keys() - {"looks"}))
def test_setting_of_a_run_arrives(name):
    """A setting that is called like a field of RunConfig gets there by its name."""
    given = object()
    assert {getattr(c, name) for c in Settings(**{name: given}).configs()} == {given}


def test_looks_of_a_run_are_those_of_its_tier():
    """The tier's looks and the further ones that are named, without the reference runs."""
    (config,) = configs(precision="fp32", batch="2", looks="rerun,merging")
    assert config.looks == (*TIERS["quick"].looks, "merging")
