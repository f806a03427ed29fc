"""Records: a file format without loss, and clear errors for what it cannot read."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.records import DefectRecord, Names, RecordError, RunRecord, StepRecord, TensorRecord, numbers
from tests.strategies import float_paths, gaps, healthy_records, non_finite, put
from tests.support import canned

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@given(record=healthy_records())
def test_plain_form_gives_the_record_back(record):
    """`from_dict` takes back what `to_dict` wrote."""
    assert RunRecord.from_dict(record.to_dict()).to_dict() == record.to_dict()


@given(record=healthy_records())
def test_a_step_is_taken_or_skipped(record):
    """The steps that were taken are all but those that the loss scaler skipped, in order."""
    assert [s for s in record.steps if s.effect != "skipped_by_scaler"] == record.taken_steps


@given(record=healthy_records(), data=st.data(), value=non_finite())
def test_json_gives_non_finite_numbers_back(record, data, value):
    """NaN and infinity anywhere survive strict JSON, which has no such numbers."""
    plain = record.to_dict()
    path = data.draw(st.sampled_from(float_paths(record)))
    put(plain, path, str(value))

    text = json.dumps(RunRecord.from_dict(plain).to_dict(), allow_nan=False)

    assert RunRecord.from_dict(json.loads(text)).to_dict() == plain


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_file_gives_a_non_finite_loss_back(tmp_path, value):
    """A loss that is not finite is the same number after writing and reading."""
    record = canned.with_step(canned.healthy(), 2, loss=value)
    record.write(tmp_path / "record.json")

    read = RunRecord.read(tmp_path / "record.json").steps[1].loss

    assert read == value or (math.isnan(read) and math.isnan(value))


def test_file_gives_the_record_back(tmp_path):
    """A record without NaN is equal after writing and reading."""
    record = canned.healthy(answers=[1000.0, None])
    record.write(tmp_path / "record.json")

    assert RunRecord.read(tmp_path / "record.json") == record


@given(record=healthy_records(), data=st.data(), value=JSON_VALUES)
def test_anything_else_in_a_record_is_read_or_refused(record, data, value):
    """With any JSON at any place of a record, reading returns a record or raises RecordError."""
    plain = copy.deepcopy(record.to_dict())
    put(plain, data.draw(st.sampled_from(gaps(plain))), value)
    try:
        read = RunRecord.from_dict(plain)
    except RecordError:
        return
    assert isinstance(read, RunRecord)


@given(value=JSON_VALUES)
def test_any_json_is_no_record(value):
    """JSON that is not an object with a schema is refused with a RecordError."""
    with pytest.raises(RecordError, match="not a run record"):
        RunRecord.from_dict(value)


def _changed(**changes):
    return {**canned.healthy().to_dict(), **changes}


def _without(name):
    return {k: v for k, v in canned.healthy().to_dict().items() if k != name}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(_changed(schema=0), "schema 0, this version reads 2", id="other-schema"),
        pytest.param(_changed(lossses=1), "record: unknown field lossses", id="unknown-field"),
        pytest.param(_without("cell"), "record: missing 1 required .* 'cell'", id="missing-field"),
        pytest.param(_changed(seed="0"), "record.seed: expected a value of type int, found '0'", id="text-for-int"),
        pytest.param(_changed(seed=True), "record.seed: expected a value of type int", id="bool-for-int"),
        pytest.param(_changed(seconds="fast"), "record.seconds: expected a number, found 'fast'", id="text-for-float"),
        pytest.param(_changed(seconds=10**400), "record.seconds: expected a number that", id="huge-for-float"),
        pytest.param(_changed(steps={}), "record.steps: expected a list", id="object-for-list"),
        pytest.param(_changed(device=[]), "record.device: expected an object", id="list-for-object"),
        pytest.param(_changed(versions=[]), "record.versions: expected an object", id="list-for-mapping"),
        pytest.param(
            _changed(steps=[{"step": 1, "loss": []}]), r"record.steps\[0\].loss: expected a number", id="deep"
        ),
    ],
)
def test_what_does_not_fit_is_named(data, message):
    """A RecordError says where the record does not fit, and what was expected there."""
    with pytest.raises(RecordError, match=message):
        RunRecord.from_dict(data)


@pytest.mark.parametrize(
    "text", ["", "{", "\x00", "[" * 100_000, "null"], ids=["empty", "truncated", "zero", "deep", "null"]
)
def test_corrupt_file_is_named(tmp_path, text):
    """A RecordError names the file that is not a record."""
    path = tmp_path / "corrupt.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"corrupt\.json: "):
        RunRecord.read(path)


def test_missing_file_is_named(tmp_path):
    """A RecordError names the file that is not there."""
    with pytest.raises(RecordError, match=r"absent\.json: there is no such file"):
        RunRecord.read(tmp_path / "absent.json")


def test_bytes_that_are_no_text_are_named(tmp_path):
    """A RecordError names the file that is not UTF-8."""
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecordError, match=r"binary\.json: cannot be read"):
        RunRecord.read(path)


def test_interrupted_write_keeps_the_old_record(tmp_path, monkeypatch):
    """An interrupted write leaves the file as it was."""
    path = tmp_path / "record.json"
    canned.healthy(seed=1).write(path)
    monkeypatch.setattr(os, "replace", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        canned.healthy(seed=2).write(path)

    assert RunRecord.read(path).seed == 1


def test_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    """An interrupted write deletes its temporary file."""
    monkeypatch.setattr(os, "replace", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        canned.healthy().write(tmp_path / "record.json")

    assert list(tmp_path.iterdir()) == []


def _interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_file_has_the_permissions_of_any_file(tmp_path):
    """A record has the permissions of any other new file."""
    plain = tmp_path / "plain.txt"
    plain.write_text("")
    canned.healthy().write(tmp_path / "record.json")

    assert stat.S_IMODE((tmp_path / "record.json").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@given(record=healthy_records())
def test_numbers_finds_every_float(record):
    """`numbers` yields as many floats as the plain form contains."""
    assert len(list(numbers(record))) == _floats(record.to_dict())


def _floats(data):
    if isinstance(data, dict):
        return sum(map(_floats, data.values()))
    if isinstance(data, list):
        return sum(map(_floats, data))
    return isinstance(data, float) or data in ("nan", "inf", "-inf")


@given(record=healthy_records(), data=st.data())
def test_numbers_tells_where(record, data):
    """A path from `numbers` leads to its float in the plain form."""
    plain = record.to_dict()
    at = data.draw(st.integers(0, len(float_paths(record)) - 1))
    put(plain, float_paths(record)[at], 123.25)

    assert list(numbers(RunRecord.from_dict(plain)))[at][1] == 123.25


@given(names=st.lists(st.text(max_size=3), max_size=3))
def test_names_count_what_they_were_given(names):
    """`Names.of` counts every name."""
    assert Names.of(names).count == len(names)


def test_names_are_bounded():
    """`Names.of` keeps 1,024 names of more."""
    assert len(Names.of(map(str, range(5000))).first) == 1024


@pytest.mark.parametrize(
    ("names", "text"),
    [
        pytest.param(Names.of(["a"]), "a", id="one"),
        pytest.param(Names.of(["a", "b", "c"]), "a and 2 more", id="three"),
        pytest.param(Names(count=3), "3 tensors", id="count-alone"),
    ],
)
def test_names_read_as_text(names, text):
    """The text of Names is the first name and the number of others."""
    assert str(names) == text


@pytest.mark.parametrize(
    ("step", "effect"),
    [
        pytest.param(StepRecord(step=1, changed=2), "applied", id="changed"),
        pytest.param(StepRecord(step=1, changed=0), "no_effect", id="nothing-changed"),
        pytest.param(StepRecord(step=1), "unknown", id="not-seen"),
        pytest.param(
            StepRecord(step=1, changed=0, loss_scale=2.0, loss_scale_after=1.0), "skipped_by_scaler", id="fell"
        ),
        pytest.param(StepRecord(step=1, changed=0, loss_scale=2.0, loss_scale_after=2.0), "no_effect", id="kept"),
        pytest.param(StepRecord(step=1, changed=0, loss_scale=2.0, loss_scale_after=4.0), "no_effect", id="grew"),
        pytest.param(StepRecord(step=1, changed=0, loss_scale=2.0), "no_effect", id="no-scale-after"),
        pytest.param(StepRecord(step=1, changed=0, loss_scale=2.0, loss_scale_after=math.nan), "no_effect", id="nan"),
        pytest.param(StepRecord(step=1, changed=1, loss_scale=2.0, loss_scale_after=1.0), "applied", id="fell-changed"),
        pytest.param(StepRecord(step=1, changed=2, nonfinite_weights=Names.of("w")), "poisoned", id="bad-weight"),
        pytest.param(StepRecord(step=1, changed=2, nonfinite_moments=Names.of("m")), "poisoned", id="bad-moment"),
        pytest.param(StepRecord(step=1, nonfinite_weights=Names(count=1)), "poisoned", id="bad-weight-not-named"),
        pytest.param(
            StepRecord(step=1, changed=0, loss_scale=2.0, loss_scale_after=1.0, nonfinite_moments=Names.of("m")),
            "poisoned",
            id="skipped-after-poison",
        ),
    ],
)
def test_effect_of_a_step(step, effect):
    """The effect of a step is what it did to the tensors."""
    assert step.effect == effect


@pytest.mark.parametrize(
    ("step", "finite"),
    [
        pytest.param(StepRecord(step=1, grad_norm=1.0), True, id="finite"),
        pytest.param(StepRecord(step=1), False, id="not-seen"),
        pytest.param(StepRecord(step=1, grad_norm=math.nan), False, id="nan"),
        pytest.param(StepRecord(step=1, grad_norm=1.0, nonfinite_gradients=Names(count=1)), False, id="one-tensor"),
    ],
)
def test_gradients_finite(step, finite):
    """Gradients are finite if they were seen, and they and their norm are."""
    assert step.gradients_finite is finite


@pytest.mark.parametrize(
    ("name", "factor"),
    [(canned.A, True), (canned.B, True), (canned.HEAD, False), ("q.lora_embedding_A.default", False)],
    ids=["lora_A", "lora_B", "modules_to_save", "lora_embedding_A"],
)
def test_factor_is_known_by_its_name(name, factor):
    """The names of linear layers' factors distinguish them from other trainable tensors."""
    assert TensorRecord(name=name, dtype="float32", elements=1).is_factor is factor


@pytest.mark.parametrize("values", ["losses", "grad_norms"])
def test_number_that_was_not_seen_is_nan(values):
    """The trajectories have NaN for unseen numbers, so that no sum over them can be finite."""
    record = canned.with_step(canned.healthy(), 2, loss=None, grad_norm=None)
    assert math.isnan(getattr(record, values)[1])


def test_record_of_schema_1_is_read_under_todays_names():
    """What was called `kind` and `cut` is the device's type, a defect's name and the batch split."""
    defect = DefectRecord(name="truncated", rows=2)
    record = canned.within(
        dataclasses.replace(canned.healthy(), variant="batch_split"), "supervision", dataset_defects=(defect,)
    )
    old = record.to_dict() | {"schema": 1, "variant": "cut"}
    old["device"]["kind"] = old["device"].pop("device_type")
    old["supervision"]["dataset_defects"] = [{"kind": "cut", "rows": 2, "step": None, "example": ""}]
    assert RunRecord.from_dict(old) == record
