"""`python -m pytest_sftguard explain`: what it prints of a log, and its exit codes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pytest_sftguard.__main__ import main
from tests.logs.shapes import BROKEN, OPEN, SHAPES, course, state

VERDICTS = re.compile(r"\b(passed|sound|healthy|ok|fine)\b", re.IGNORECASE)


def written(folder: Path, data: dict[str, Any]) -> Path:
    """A `trainer_state.json`."""
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


ALL = [
    *(pytest.param(data, 0, id=name) for name, data in SHAPES.items()),
    *(pytest.param(data, 0, id=name) for name, (data, _) in OPEN.items()),
    *(pytest.param(state(history), 1, id=name) for name, (history, _) in BROKEN.items()),
]


@pytest.mark.parametrize(("data", "code"), ALL)
def test_the_exit_code_tells_of_alarms(
    data: dict[str, Any], code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is longer than 80 columns, none is a verdict, and the last is the command that gives one."""
    path = written(tmp_path, data)
    assert main(["explain", str(path)]) == code
    lines = capsys.readouterr().out.splitlines()
    # the first line is the path of the file
    assert [line for line in lines[1:] if len(line) > 80 or VERDICTS.search(line)] == []
    assert ("    alarm" in "\n".join(lines)) == bool(code)
    assert lines[-1] == "  pytest -m gpu_stability --sftguard-target=MODULE:FUNCTION"


def test_it_prints_what_was_read_what_it_shows_and_what_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each statement with its steps, its numbers and what to do next."""
    history, _ = BROKEN["dies at step 15"]
    main(["explain", str(written(tmp_path, state(history)))])
    text = " ".join(capsys.readouterr().out.split())
    assert "read trainer_state.json, 30 entries, steps 1 to 30 shows alarm steps 15 to 30: grad_norm is 0" in text
    assert "the loss stands still at 1.9: a dead adapter, no gradient reaches what is trained from step 15" in text
    assert "next: Look at which parameters have requires_grad" in text
    assert "cannot show - A NaN that the Trainer replaced" in text


def test_json_holds_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As one object without NaN, which strict readers refuse."""
    path = written(tmp_path, state(course(20, lambda i: 0.0, lambda i: math.nan)))
    assert main(["explain", str(path), "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["alarming"]
    [log] = found["logs"]
    assert (log["file"], log["entries"], log["steps"]) == (str(path), 20, [1, 20])
    assert [(s["code"], s["weight"], s["first_step"]) for s in log["statements"]] == [("laundered_loss", "alarm", 1)]


def test_several_logs_are_explained_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The exit code is that of the worst; a folder is read at its state."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    written(tmp_path / "one", SHAPES["transformers 5"])
    written(tmp_path / "two", state(BROKEN["laundered"][0]))
    assert main(["explain", str(tmp_path / "one"), str(tmp_path / "two")]) == 1
    assert capsys.readouterr().out.count("  read         trainer_state.json") == 2


def test_the_example_of_the_page_is_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Line by line, up to where the page leaves some out."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "explain.md").read_text(encoding="utf-8")
    shown = textwrap.dedent(re.findall(r"(?:^    .*\n|^\n)+", page, re.MULTILINE)[1]).strip().partition("    ...")[0]
    folder = tmp_path / "outputs" / "checkpoint-30"
    folder.mkdir(parents=True)
    first, *others = BROKEN["dies at step 15"][0]
    written(folder, state([{**first, "grad_norm": math.inf}, *others], max_steps=40))
    monkeypatch.chdir(tmp_path)
    main(["explain", "outputs/checkpoint-30"])
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file or directory"),
        ("loss: 2.5", "is not JSON"),
        ("{}", "there is no line of a training's log in it"),
    ],
)
def test_a_mistake_is_told(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line that names the file, before anything else is printed."""
    path = tmp_path / "state.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    assert main(["explain", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: {re.escape(str(path))}.*{message}.*\n", error)


def test_it_imports_no_torch(tmp_path: Path) -> None:
    """A log is explained on a laptop, in a moment."""
    path = written(tmp_path, state(BROKEN["laundered"][0]))
    code = (
        "import sys; from pytest_sftguard.__main__ import main\n"
        f"assert main(['explain', {str(path)!r}]) == 1\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)


def test_a_real_training_is_read_in_both_forms(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What the installed transformers prints and saves of one training has the same losses, and no alarm."""
    from pytest_sftguard.engine.models.tiny import build_trainer

    trainer = build_trainer(
        model=None,
        dtype="float32",
        output_dir=str(tmp_path),
        max_steps=4,
        logging_steps=1,
        save_steps=4,
        use_cpu=True,
        report_to="none",
    )
    trainer.train()
    out, error = capfd.readouterr()
    (tmp_path / "train.log").write_text(out + error, encoding="utf-8")
    assert main(["explain", "--json", str(tmp_path), str(tmp_path / "train.log")]) == 0
    saved, printed = json.loads(capfd.readouterr().out)["logs"]
    assert saved["statements"] == printed["statements"] == []
    assert (saved["entries"], printed["entries"]) == (4, 5)
