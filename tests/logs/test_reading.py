"""Reading: from a file to a series, whatever the format."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_sftguard.logs.judging import cannot_show, explain
from pytest_sftguard.logs.reading import LogError, parse, read
from tests.logs.shapes import course, evaluation, skipping, state, summary

PRINTED_4 = """\
Loading checkpoint shards: 100%|##########| 2/2 [00:01<00:00]
  0%|          | 0/4 [00:00<?, ?it/s]/lib/checkpoint.py:295: FutureWarning: `torch.cpu.amp.autocast(args...)` {a}
{'loss': 2.593, 'grad_norm': 2.98, 'learning_rate': 0.0002, 'epoch': 0.25}
 25%|##5       | 1/4 [00:01<00:03,  1.0s/it]{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 0.00015, 'epoch': 0.5}
 50%|#####     | 2/4 [00:02<00:02,  1.0s/it]
{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 0.0001, 'epoch': 0.75}
 75%|#######5  | 3/4 [00:03<00:01,  1.0s/it]
{'eval_loss': nan, 'eval_accuracy': np.float64(0.25), 'eval_runtime': 0.1, 'epoch': 0.75}
{'loss': 0.0, 'grad_norm': inf, 'learning_rate': 5e-05, 'epoch': 1.0}
100%|##########| 4/4 [00:04<00:00,  1.0s/it]
{'train_runtime': 4.0, 'train_loss': 0.648, 'epoch': 1.0}
Traceback (most recent call last):
  File "train.py", line 9, in <module>
    main({'a': 1})
torch.OutOfMemoryError: CUDA out of memory.
"""
PRINTED_5 = """\
{'learning_rate': 0.001, 'lora': True}
{'loss': '2.593', 'grad_norm': '2.98', 'learning_rate': '0.004', 'epoch': '0.5'}
{'loss': '0', 'grad_norm': 'nan', 'learning_rate': '0.0035', 'epoch': '1'}
{'train_runtime': '1.852', 'train_loss': '0.3241', 'epoch': '1'}
"""


def written(folder: Path, name: str, text: str) -> Path:
    """A file with this text."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_printed_output_is_read_among_everything_else() -> None:
    """Bars, warnings and tracebacks around it; the bars number its steps."""
    log = parse(PRINTED_4, "train.log")
    assert log.form == "printed output"
    assert [e.loss for e in log.entries] == [2.593, 0.0, 0.0, None, 0.0, None]
    assert [e.step for e in log.entries if e.is_training] == [1, 2, 3, 4]
    assert math.isnan(log.entries[3].values["eval_loss"])
    assert log.entries[3].values["eval_accuracy"] == 0.25
    assert log.max_steps == 4
    assert log.crash == "torch.OutOfMemoryError: CUDA out of memory."


def test_printed_texts_are_numbers() -> None:
    """As transformers 5 prints them; a printed configuration is no entry."""
    log = parse(PRINTED_5, "train.log")
    assert [e.loss for e in log.entries] == [2.593, 0.0, None]
    assert math.isnan(log.entries[1].grad_norm or 0.0)
    assert [e.step for e in log.entries] == [None, None, None]
    assert any("printed its numbers rounded" in sentence for sentence in cannot_show(log))
    assert explain(log)[0].where == "log line 2"


def test_bars_out_of_order_number_nothing() -> None:
    """Where the output was buffered all bars stand before all lines."""
    lines = PRINTED_5 * 2
    log = parse("".join(f" 25%|# | {i}/4 [00:01<00:03]\n" for i in range(5)) + lines, "train.log")
    assert {e.step for e in log.entries} == {None}


@pytest.mark.parametrize(
    ("text", "step", "loss"),
    [
        ('{"loss": 2.5, "grad_norm": "NaN", "learning_rate": null, "step": 3}\n' * 2, 3, 2.5),
        ('{"current_steps": 3, "total_steps": 8, "loss": "2.5", "lr": 1e-4, "grad_norm": "NaN"}\n' * 2, 3, 2.5),
        ('{"loss": 2.5, "grad_norm": NaN, "global_step/max_steps": "3/8", "nested": {"a": 1}}\n' * 2, 3, 2.5),
        ('{"train/loss": 2.5, "train/grad_norm": "nan", "train/global_step": 3, "_step": 9}\n' * 2, 3, 2.5),
        ('[{"loss": 2.5, "grad_norm": "-Infinity", "step": 3.0}, {"other": 1}, null]', 3, 2.5),
        ('{"loss": "Infinity", "grad_norm": "nan", "step": "3"}', 3, math.inf),
        ('{"loss": 1' + "0" * 400 + ', "grad_norm": NaN, "step": 3}', 3, math.inf),
    ],
    ids=["null", "llama-factory", "ms-swift", "wandb", "list", "texts", "huge"],
)
def test_the_forms_of_numbers_and_names(text: str, step: int, loss: float) -> None:
    """Of JSON and JSON lines as several tools write them."""
    entry = parse(text, "log.jsonl").entries[0]
    assert (entry.step, entry.loss) == (step, loss)
    assert not math.isfinite(entry.grad_norm or 0.0)


def test_a_state_tells_how_it_logged() -> None:
    """And a checkpoint's ends before the training does."""
    log = parse(json.dumps(state(course(4), max_steps=9, logging_steps=0.1)), "trainer_state.json")
    assert (log.global_step, log.max_steps, log.logging_steps) == (4, 9, 0.1)
    assert "The steps after 4 of 9, where it ends." in list(cannot_show(log))


def test_what_a_log_cannot_show_depends_on_it() -> None:
    """Norms that are missing, steps between the entries."""
    log = parse(json.dumps(state(course(4, norm=lambda i: None, each=25))), "trainer_state.json")
    text = " ".join(cannot_show(log))
    assert "it has no grad_norm" in text
    assert "25 apart" in text


def test_a_folder_is_read_at_its_newest_checkpoint(tmp_path: Path) -> None:
    """By number, and not by name; a state of its own comes first."""
    for number in (90, 1000):
        written(tmp_path, f"checkpoint-{number}/trainer_state.json", json.dumps(state(course(2), global_step=number)))
    assert read(tmp_path).global_step == 1000
    assert read(tmp_path / "checkpoint-90").global_step == 90
    written(tmp_path, "trainer_state.json", json.dumps(state(course(2), global_step=7)))
    assert read(tmp_path).global_step == 7


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_encodings_of_shells_are_read(tmp_path: Path, encoding: str) -> None:
    """PowerShell writes UTF-16 with the line ends of Windows."""
    path = tmp_path / "train.log"
    path.write_bytes(PRINTED_4.replace("\n", "\r\n").encode(encoding))
    # as texts, in which NaN equals NaN
    assert str(read(path).entries) == str(parse(PRINTED_4, "train.log").entries)
    assert read(path).crash == "torch.OutOfMemoryError: CUDA out of memory."


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "loss 2.5", "is not JSON: "),
        ("a.json", '{"log_history": [', "is not JSON: "),
        ("a.json", "[" * 100_000, "is not JSON: "),
        ("a.json", "3", "there is no line of a training's log in it"),
        ("a.json", '{"log_history": [1, null]}', "there is no line of a training's log in it"),
        ("a.log", "", "there is no line of a training's log in it"),
        ("a.log", "\x00\x01{'epochs': 3, 'learning_rate': 1}", "there is no line of a training's log in it"),
    ],
)
def test_what_is_no_log_is_told(tmp_path: Path, name: str, text: str, message: str) -> None:
    """With the file and the reason."""
    path = written(tmp_path, name, text)
    with pytest.raises(LogError, match=f"{name}.*{message}"):
        read(path)


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    """Also an event file, and a folder without a log."""
    for path in (tmp_path / "a.json", tmp_path / "events.out.tfevents.1"):
        with pytest.raises(LogError, match="No such file"):
            read(path)
    with pytest.raises(LogError, match=r"there is no trainer_state\.json"):
        read(tmp_path)


@given(
    text=st.one_of(
        st.text(), st.lists(st.sampled_from([*PRINTED_4, "{", "}", "'loss': ", "null", "\\ud800"])).map("".join)
    )
)
def test_no_text_makes_it_raise_anything_else(text: str) -> None:
    """Nor what is read of it."""
    for name in ("a.json", "a.log"):
        try:
            log = parse(text, name)
        except LogError:
            continue
        assert explain(log) is not None


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["loss", "step", "log_history", "eval_loss", "epoch", "max_steps"]), inner, max_size=4
        )
    ),
)


@given(data=JSON)
def test_no_json_makes_it_raise_anything_else(data: object) -> None:
    """Whatever its values are."""
    with contextlib.suppress(LogError):
        assert explain(parse(json.dumps(data), "a.json")) is not None


def test_event_files_need_a_library_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    path = written(tmp_path, "events.out.tfevents.17.host", "")
    with pytest.raises(LogError, match=r'pip install "pytest-sftguard\[tensorboard\]"'):
        read(path)


def test_event_files_hold_the_same_series(tmp_path: Path) -> None:
    """The steps, the numbers, and evaluations apart."""
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import rewrite_logs

    history = [*skipping([2]), evaluation(40), summary(40)]
    with SummaryWriter(str(tmp_path / "runs" / "one")) as writer:
        writer.add_text("args", "{}")
        for entry in history:
            for tag, value in rewrite_logs({k: v for k, v in entry.items() if k != "step"}).items():
                writer.add_scalar(tag, value, entry["step"])
    log = read(tmp_path)
    assert log.form == "a TensorBoard event file"
    assert [e.step for e in log.trainings[0]] == list(range(1, 41))
    assert [s.code for s in explain(log)] == ["skipped_steps"]
    [evaluated] = [e for e in log.entries if "eval_loss" in e.values]
    assert evaluated.values["eval_loss"] == pytest.approx(history[-2]["eval_loss"])


@pytest.mark.parametrize("data", [b"", b"\x00" * 40, b"no event file at all"])
def test_a_broken_event_file_is_told(tmp_path: Path, data: bytes) -> None:
    """Without a traceback of the library's."""
    pytest.importorskip("tensorboard")
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(data)
    with pytest.raises(LogError, match="tfevents"):
        read(path)
