"""The command line: mistakes are one line and code 2, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from homework import adapters, runs, sft, validation
from homework.base import EMBEDDED, load_base, load_tokenizer
from homework.task.data import VALID_FILE, read_rows
from homework.validation import validate

ROOT = Path(sft.__file__).parents[1]
SHORT = ["--max-steps", "2", "--micro-batch", "2", "--grad-accum", "1", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SFT_MICRO_BATCH_SIZE", "SFT_GRAD_ACCUM_STEPS", "SFT_PRECISION"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Flags for the shortest real run: four rows to train on, four to validate with, two steps."""
    rows = json.loads((ROOT / "homework" / "task" / "train.json").read_text(encoding="utf-8"))
    for name, part in (("train", rows[:4]), ("valid", rows[4:8])):
        (tmp_path / f"{name}-rows.json").write_text(json.dumps(part), encoding="utf-8")
    train, valid = (str(tmp_path / f"{name}-rows.json") for name in ("train", "valid"))
    return ["--train-file", train, "--valid-file", valid, *SHORT]


def fails(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that must fail and return its message, which must be one or two lines without a traceback."""
    try:
        found = sft.main(argv)
    except SystemExit as error:
        found = int(error.code or 0)
    message = capsys.readouterr().err
    assert found == code, message
    lines = [line for line in message.splitlines() if line.strip() and "\r" not in line]
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in message
    return lines[-1]


def test_a_validation_asks_as_many_questions_as_were_asked_for(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of the file, before and after, and again when the adapter is tested."""
    out, asked = str(tmp_path / "adapter"), ["--questions", "3"]
    assert sft.main(["train", "--output-dir", out, *small, *asked]) == 0
    assert sft.main(["test", out, *small[2:4], *asked]) == 0
    wording = [line for line in capsys.readouterr().out.splitlines() if line.endswith("questions")]
    assert {line.rpartition(" on ")[2] for line in wording} == {"3 questions"}
    assert "--questions" in fails(capsys, "train", *small, "--questions", "0")


def test_the_command_trains_in_bfloat16_on_a_cpu(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation before and after it is in float32, the matrices that were held in bfloat16 notwithstanding."""
    out = tmp_path / "adapter"
    assert sft.main(["train", "--output-dir", str(out), *small[:-1], "bf16"]) == 0
    assert "after:" in capsys.readouterr().out
    assert (out / "adapter_model.safetensors").is_file()


def test_help_costs_no_torch() -> None:
    """`--help` and importing the selectors load neither torch nor transformers."""
    code = (
        "import sys\nfrom homework import sft\nassert sft.main(['train', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'peft', 'pint'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    flags = {f"--{option.name.replace('_', '-')}" for option in sft.command.commands["train"].params}
    assert {"--max-steps", "--precision", "--model"} <= flags <= set(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "Missing command"),
        (["train", "--max-step", "2"], "--max-step"),
        (["train", "--max-steps", "0"], "--max-steps"),
        (["train", "--max-steps", "many"], "'many'"),
        (["train", "--micro-batch", "abc"], "--micro-batch"),
        (["train", "--grad-accum", "-1"], "--grad-accum"),
        (["train", "--precision", "fp8"], "'fp32', 'bf16', 'fp16'"),
        (["train", "--seed", "x"], "--seed"),
        (["train", "--seed", "-1"], "--seed"),
        (["train", "--tables", "1001"], "--tables"),
        (["train", "--questions", "1.5"], "--questions"),
        (["train", "--epochs", "nan"], "--epochs"),
        (["train", "--epochs", "inf"], "--epochs"),
        (["train", "--learning-rate", "0"], "--learning-rate"),
        (["train", "--learning-rate", "nan"], "--learning-rate"),
        (["test"], "'outputs/sft-adapter' does not exist"),
        (["test", "no-such-folder"], "'no-such-folder' does not exist"),
        (["test", ".", "--wrong", "0"], "--wrong"),
        (["train", "--train-file", "no-such.json"], "no-such.json"),
    ],
)
def test_misuse_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], words: str
) -> None:
    """The line quotes what is wrong; no output folder appears."""
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *argv)
    assert not list(tmp_path.iterdir())


def test_fp16_on_a_cpu_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By flag and by variable, since the Trainer would silently train in fp32."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert "silently train in fp32" in fails(capsys, "train", "--precision", "fp16")
    monkeypatch.setenv("SFT_PRECISION", "fp16")
    assert "SFT_PRECISION" in fails(capsys, "train")
    with pytest.raises(ValueError, match="silently train in fp32"):
        sft.build_trainer(per_device_train_batch_size=2, gradient_accumulation_steps=1)


def test_a_bad_variable_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT_MICRO_BATCH_SIZE=abc ends before anything is loaded."""
    monkeypatch.setenv("SFT_MICRO_BATCH_SIZE", "abc")
    assert "SFT_MICRO_BATCH_SIZE" in fails(capsys, "train")


def copy_of_model(folder: Path) -> Path:
    """Return a copy of the embedded model's folder."""
    return Path(shutil.copytree(EMBEDDED, folder))


@pytest.mark.parametrize(
    "damage", ["missing", "no tokenizer", "no weights", "corrupt weights", "short weights", "a file"]
)
def test_a_broken_model_folder_is_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], damage: str
) -> None:
    """The message on every damage is one line that names the folder, and no output folder is left."""
    model = tmp_path / "model"
    if damage == "a file":
        model.write_text("no model", encoding="utf-8")
    elif damage != "missing":
        copy_of_model(model)
        weights = model / "model.safetensors"
        if damage == "no tokenizer":
            (model / "tokenizer.json").unlink()
        elif damage == "no weights":
            weights.unlink()
        elif damage == "corrupt weights":
            weights.write_bytes(b"\xff" * 100)
        else:
            weights.write_bytes(weights.read_bytes()[:-1000])
    out = tmp_path / "out"
    assert str(model) in fails(capsys, "train", "--model", str(model), "--output-dir", str(out), *small)
    assert not out.exists()


@pytest.mark.parametrize("place", ["a file", "below a file", "kernel"])
def test_an_output_folder_that_cannot_be_written_is_told_before_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found by writing, before any model is loaded."""
    monkeypatch.setattr(runs, "train", lambda *_: pytest.fail("training began"))
    (tmp_path / "file").write_text("", encoding="utf-8")
    out = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "out", "kernel": Path("/proc/out")}[place]
    if place == "kernel" and not sys.platform.startswith("linux"):
        pytest.skip("there is no /proc here")
    assert "output folder" in fails(capsys, "train", "--output-dir", str(out), *small)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that two real steps made."""
    folder = tmp_path_factory.mktemp("trained")
    rows = json.loads((ROOT / "homework" / "task" / "train.json").read_text(encoding="utf-8"))[:4]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    out = folder / "adapter"
    files = ["--train-file", str(folder / "rows.json"), "--valid-file", str(folder / "rows.json")]
    assert sft.main(["train", "--output-dir", str(out), *files, *SHORT]) == 0
    return out


def test_a_short_training_saves_what_test_loads(
    capsys: pytest.CaptureFixture[str], trained: Path, small: list[str]
) -> None:
    """The folder holds the adapter in safetensors and its base's digest, and `test` prints a score for it."""
    assert {path.name for path in trained.iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
    }
    assert not list(trained.glob(".saving-*"))
    capsys.readouterr()
    assert sft.main(["test", str(trained), *small[2:4]]) == 0
    assert "accuracy=" in capsys.readouterr().out


def test_too_few_steps_are_told_with_what_the_reloaded_adapter_knows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight steps teach the numbers, but not to open an answer: the seeded score stands beside the plain zero."""
    out, batch = tmp_path / "adapter", ["--micro-batch", "8", "--grad-accum", "1", "--precision", "fp32"]
    assert sft.main(["train", "--output-dir", str(out), "--max-steps", "8", "--questions", "20", *batch]) == 0
    *_, after, note = capsys.readouterr().out.splitlines()
    rows = read_rows(VALID_FILE)[:20]
    seeded = validate(adapters.load_adapter(load_base(None), out), load_tokenizer(None), rows, prefix="<answer>")
    assert after == "after:  accuracy=0.000 answer_rate=0.000 on 20 questions"
    assert note == f'note: 8 steps are too few to learn the answer format; with "<answer>" given, {seeded}'
    assert seeded.answer_rate >= 0.5


def test_answers_that_are_bad_even_when_seeded_are_told(
    capsys: pytest.CaptureFixture[str], trained: Path, small: list[str]
) -> None:
    """Two steps teach nothing, and no number of steps is blamed for it."""
    assert sft.main(["test", str(trained), *small[2:4]]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "accuracy=0.000 answer_rate=0.000 on 4 questions",
        'note: hardly a question is answered, even with "<answer>" given: '
        "accuracy=0.000 answer_rate=0.000 on 4 questions",
    ]


@pytest.fixture
def answering(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A `test` command whose model gives one right answer, one wrong one, and one without the opening tag."""
    rows = [["3 gal in pt?", 24], ["2 ft in yd?", 2 / 3], ["6 mi in m?", 9656.064]]
    (tmp_path / "asked.json").write_text(json.dumps(rows), encoding="utf-8")
    texts = ["<answer>24</answer>", "<answer>0.6</answer>", "9656</answer>"]
    monkeypatch.setattr(validation, "completions", lambda *_, **__: texts)
    return ["test", str(trained), "--valid-file", str(tmp_path / "asked.json")]


def test_a_model_that_answers_is_asked_once(capsys: pytest.CaptureFixture[str], answering: list[str]) -> None:
    """The score is all that is printed."""
    assert sft.main(answering) == 0
    assert capsys.readouterr().out == "accuracy=0.333 answer_rate=0.667 on 3 questions\n"


@pytest.mark.parametrize("count", [1, 2, 9])
def test_wrong_answers_are_listed(capsys: pytest.CaptureFixture[str], answering: list[str], count: int) -> None:
    """Question, answer and what is right, for as many as were asked for."""
    assert sft.main([*answering, "--wrong", str(count)]) == 0
    listed = [
        "  '2 ft in yd?' -> '<answer>0.6</answer>' (right: 0.6667)",
        "  '6 mi in m?' -> '9656</answer>' (right: 9656)",
    ]
    assert capsys.readouterr().out.splitlines()[1:] == listed[:count]


def test_test_takes_the_folder_that_train_writes(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word on folders in either command."""
    monkeypatch.chdir(tmp_path)
    assert sft.main(["train", *small]) == 0
    assert sft.main(["test", *small[2:4]]) == 0


@pytest.mark.parametrize("tty", [True, False])
def test_progress_is_shown_on_a_terminal_only(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tty: bool
) -> None:
    """A bar for each validation and for the training; a file gets none of them."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty)
    assert sft.main(["train", "--output-dir", str(tmp_path / "out"), *small]) == 0
    message = capsys.readouterr().err
    for bar in ("validating the base:", "2/2 [", "validating the adapter:"):
        assert (bar in message) is tty


def test_bf16_trains_on_a_cpu(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SFT_PRECISION=bf16 reaches the arithmetic: a linear layer's output is bf16, and the run ends with a score."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setenv("SFT_PRECISION", "bf16")
    seen: set[torch.dtype] = set()
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.add((out := linear(*a)).dtype) or out)
    assert sft.main(["train", "--output-dir", str(tmp_path / "out"), *small[:-2]]) == 0
    assert torch.bfloat16 in seen
    assert "after:" in capsys.readouterr().out


def test_a_reloaded_adapter_is_the_one_trained(tmp_path: Path) -> None:
    """After a real step, saving and loading on a fresh base gives the trained model's tensors, and they have moved."""
    import torch

    from homework.base import digest

    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    arguments = {"max_steps": 1, "bf16": False, "use_cpu": True, "disable_tqdm": True, **batch}
    trainer = sft.build_trainer(output_dir=str(tmp_path / "out"), **arguments)
    model: Any = trainer.model
    before = {name: tensor.clone() for name, tensor in adapters.adapter_tensors(model).items()}
    trainer.train()
    after = adapters.adapter_tensors(model)
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items() if "lora_B" in name)
    adapters.save_adapter(model, tmp_path / "saved", base="x", base_digest=digest(load_base(None)))
    again = adapters.adapter_tensors(adapters.load_adapter(load_base(None), tmp_path / "saved"))
    assert again.keys() == after.keys()
    assert all(torch.equal(again[name], after[name]) for name in after)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("other base", "another base"),
        ("no digest", "base.json"),
        ("no weights", "adapter_model.safetensors"),
        ("changed weights", "sha256"),
        ("renamed keys", "do not fit"),
        ("other rank", "do not fit"),
        ("nan", "not finite"),
        ("broken digest", "base.json"),
    ],
)
def test_a_damaged_adapter_is_refused(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, damage: str, words: str
) -> None:
    """Nothing is loaded in part, on another base, or with a NaN in it."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(trained, tmp_path / "adapter"))
    weights, facts_file, config_file = (folder / n for n in (adapters.WEIGHTS, adapters.BASE, adapters.CONFIG))
    facts = json.loads(facts_file.read_text(encoding="utf-8"))
    if damage == "other base":
        facts["base_sha256"] = "0" * 64
        facts_file.write_text(json.dumps(facts), encoding="utf-8")
    elif damage == "no digest":
        facts_file.unlink()
    elif damage == "broken digest":
        facts_file.write_text("[]", encoding="utf-8")
    elif damage == "no weights":
        weights.unlink()
    elif damage == "other rank":
        config = json.loads(config_file.read_text(encoding="utf-8"))
        config_file.write_text(json.dumps({**config, "r": config["r"] * 2}), encoding="utf-8")
    else:
        tensors = load_file(weights)
        first = min(tensors)
        if damage == "renamed keys":
            tensors = {name.replace("model.", "", 1): tensor for name, tensor in tensors.items()}
        elif damage == "nan":
            tensors[first][0, 0] = float("nan")
        else:
            tensors[first] += 1
        save_file(tensors, weights)
        if damage != "changed weights":
            facts["adapter_sha256"] = adapters._file_digest(weights)
            facts_file.write_text(json.dumps(facts), encoding="utf-8")
    assert words in fails(capsys, "test", str(folder))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC while saving removes the partial files and the folder that was made."""
    import errno

    import peft

    def full(_: Any, folder: str, **__: Any) -> None:
        (Path(folder) / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(peft.PeftModel, "save_pretrained", full)
    out = tmp_path / "out"
    assert "No space left on device" in fails(capsys, "train", "--output-dir", str(out), *small)
    assert not out.exists()


def test_a_non_finite_training_saves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A NaN in the adapter after training is code 1."""
    import transformers

    def poison(trainer: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(float("nan"))

    monkeypatch.setattr(transformers.Trainer, "train", poison)
    out = tmp_path / "out"
    assert "not finite" in fails(capsys, "train", "--output-dir", str(out), *small, code=1)
    assert not out.exists()


def test_a_non_finite_logged_grad_norm_saves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One NaN in the log is enough, in a precision that has no loss scaler."""
    import transformers

    def log_nan(trainer: Any) -> None:
        trainer.state.log_history.append({"step": 1, "loss": 0.0, "grad_norm": float("nan")})

    monkeypatch.setattr(transformers.Trainer, "train", log_nan)
    assert "grad_norm" in fails(capsys, "train", "--output-dir", str(tmp_path / "out"), *small, code=1)


def test_running_out_of_memory_names_the_batch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is code 1, and the message says what to make smaller."""
    import torch
    import transformers

    def full(trainer: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(transformers.Trainer, "train", full)
    message = fails(capsys, "train", "--output-dir", str(tmp_path / "out"), *small, code=1)
    assert "out of memory at per-device batch 2" in message
    assert "--micro-batch" in message


def test_ctrl_c_is_one_line_and_130(tmp_path: Path, small: list[str]) -> None:
    """A real signal to a real run during training; nothing is saved."""
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "homework.sft", "train", "--output-dir", str(out), *small, "--max-steps", "100000"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # a process started by a background job ignores SIGINT
    run = subprocess.Popen(argv, cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), **pipes)
    assert run.stdout is not None
    for line in run.stdout:
        if line.startswith("before:"):
            break
    time.sleep(1)
    run.send_signal(signal.SIGINT)
    _, message = run.communicate(timeout=60)
    assert run.returncode == 130, message
    assert "interrupted" in message.splitlines()[-1]
    assert "Traceback" not in message
    assert not out.exists()
