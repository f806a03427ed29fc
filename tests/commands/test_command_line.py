"""`python -m pytest_sftguard`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_sftguard import bundles, hardware
from pytest_sftguard.__main__ import main
from pytest_sftguard.hardware import HardwareProfile
from pytest_sftguard.records import RunRecord
from pytest_sftguard.reports import json_files
from pytest_sftguard.verdicts import JudgedRun, Verdict
from tests.targets.tiny import TINY

NOT_RUN = RunRecord(
    cell="fp32-b32x1",
    precision="fp32",
    per_device_train_batch_size=32,
    gradient_accumulation_steps=1,
    max_steps=8,
    seed=0,
    target="a:b",
    device=HardwareProfile(device_type="cuda", name="A device"),
    not_run="needs 23.1 GiB of 15.8 GiB free",
)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with one record each: of a run that passed, of one that failed, and of one that was not run."""
    from pytest_sftguard.engine import runner
    from pytest_sftguard.matrix import Cell, RunConfig

    made = {"not run": NOT_RUN}
    for name, target in (("passed", TINY), ("failed", "tests.targets.tiny:learning_rate_zero")):
        made[name] = runner.run(RunConfig(cell=Cell("fp32", 8, 1), target=target, device="cpu"))
    folders = {}
    for name, record in made.items():
        folders[name] = tmp_path_factory.mktemp("made")
        json_files.write(folders[name], f"test_it.py::test_trains[{record.cell}]", JudgedRun(record, Verdict(())))
    return folders


def test_help_imports_no_torch() -> None:
    """Each subcommand is named, and asking costs nothing."""
    code = (
        "import sys; from pytest_sftguard.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert all(name in ran.stdout for name in ("fit", "faults", "judge", "bundle", "explain", "exit codes"))


@pytest.mark.parametrize("command", ["fit", "faults", "judge", "bundle", "explain"])
def test_every_subcommand_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`--help` of a subcommand says what it does."""
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert len(capsys.readouterr().out) > 300


def test_it_runs_as_a_module(records: dict[str, Path]) -> None:
    """As a person types it, from a shell."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest_sftguard", "judge", str(records["passed"])],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "1 record: 1 passed, 0 failed, 0 not evaluated" in ran.stdout


@pytest.mark.parametrize(
    ("names", "options", "code"),
    [
        (["passed"], [], 0),
        (["passed", "failed"], [], 1),
        (["passed", "not run"], [], 0),
        (["passed", "not run"], ["--strict"], 1),
        (["not run"], [], 1),
    ],
)
def test_the_exit_code_is_the_verdict(
    records: dict[str, Path], names: list[str], options: list[str], code: int
) -> None:
    """A failure is 1; so is a session in which nothing passed, and with --strict one cell that was not evaluated."""
    assert main(["judge", *options, *(str(records[name]) for name in names)]) == code


def test_judging_prints_the_table_and_the_cause(records: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """What failed is said with its mechanism, and what was not evaluated with its reason."""
    main(["judge", *map(str, records.values())])
    out = capsys.readouterr().out
    assert "cause     learning_rate_zero" in out
    assert "not evaluated: needs 23.1 GiB of 15.8 GiB free" in out
    assert "3 records: 1 passed, 1 failed, 1 not evaluated" in out


def test_a_bundle_is_judged_as_its_records_are(
    records: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One file takes everything home."""
    paths = [str(path) for path in records.values()]
    main(["judge", *paths])
    there = capsys.readouterr().out
    assert main(["bundle", *paths, "-o", str(tmp_path / "bundle.json")]) == 0
    assert "3 records in" in capsys.readouterr().out
    assert main(["judge", str(tmp_path / "bundle.json")]) == 1
    assert capsys.readouterr().out == there


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a record or a bundle"),
        ("{", "cannot be read as a record or a bundle"),
        ("[" * 100_000, "cannot be read as a record or a bundle"),
        ("\x00\x01", "cannot be read as a record or a bundle"),
        ("{}", "it is not an object with a schema number"),
        ('{"schema": 7}', "the record has schema 7, this version reads 2"),
        ('{"bundle": 7}', "the bundle has schema 7, this version reads 1"),
        ('{"bundle": 1, "records": []}', "the bundle is empty"),
    ],
    ids=["empty", "truncated", "deep", "binary", "other", "record-schema", "bundle-schema", "nothing"],
)
@pytest.mark.parametrize("command", ["judge", "bundle"])
def test_a_file_that_is_no_record_is_an_error(
    command: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line that names the file; nothing is written."""
    path = tmp_path / "brought.json"
    path.write_text(text, encoding="utf-8")
    output = ["-o", str(tmp_path / "out.json")] if command == "bundle" else []
    assert main([command, str(path), *output]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out.json").exists()


def test_a_folder_that_is_not_there_cannot_take_a_bundle(
    records: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, the file and the reason."""
    assert main(["bundle", str(records["passed"]), "-o", str(tmp_path / "no" / "b.json")]) == 2
    assert "b.json cannot be written: No such file or directory" in capsys.readouterr().err


def test_own_invariants_are_judged_too(records: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A dotted path adds one; a wrong one is an error of use."""
    assert main(["judge", str(records["passed"]), "--invariants", "no.such:Thing"]) == 2
    assert "error: --invariants: 'no.such:Thing' cannot be imported" in capsys.readouterr().err


def test_fit_says_the_largest_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """Each precision has a line with the number to hand on, and one with the predicted peaks."""
    assert main(["fit", "--device=cpu", "--memory=560KiB", "--precision=fp32,tf32", "--batch=2,4"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].endswith("560 KiB given, margin 10%; target pytest_sftguard.engine.models.tiny:build_trainer")
    assert "largest: --micro-batch 2" in lines[1]
    assert "(rows of 23 tokens)" in lines[1]
    assert "2: " in lines[2]
    assert lines[2].endswith(" KiB no")
    assert lines[3] == "tf32        tf32 exists on NVIDIA GPUs only, and this device is cpu"


def test_fit_fails_where_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, and it says so."""
    assert main(["fit", "--memory", "1MiB", "--precision", "fp32", "--batch", "1"]) == 1
    assert "not even one row fits" in capsys.readouterr().out


def test_fit_takes_a_known_device(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The profile of a device by its name says which memory, and which precisions are real there."""
    card = HardwareProfile(device_type="cuda", name="Tesla T4", total_memory_bytes=15 * 2**30, capability="7.5")
    monkeypatch.setattr(hardware, "device_named", {"T4": card}.__getitem__, raising=False)
    assert main(["fit", "--device", "T4", "--precision", "fp16-mixed,bf16-mixed", "--batch", "1", "--limit", "4"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Tesla T4: 15 GiB free")
    assert "--micro-batch 4 fits; more was not tried" in out
    assert "bfloat16 is only emulated on Tesla T4" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "T5000"], "--device"),
        (["--target", "no.such:target"], "error: target 'no.such:target' cannot be imported"),
        (["--target", "tests.targets.tiny:no_trainer", "--memory", "1GiB"], "not a transformers.Trainer"),
    ],
)
def test_misuse_of_fit_is_told(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line."""
    assert main(["fit", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--memory", "much"),
        ("--precision", "fp8"),
        ("--batch", "0"),
        ("--batch", "2x4"),
        ("--margin", "1"),
        ("--margin", "nan"),
        ("--limit", "-1"),
        ("--accumulation", "two"),
    ],
)
def test_a_value_that_cannot_be_used_is_told(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2, before anything heavy is imported; the message quotes the value."""
    with pytest.raises(SystemExit) as left:
        main(["fit", f"{option}={value}"])
    assert left.value.code == 2
    assert f"argument {option}: {value!r} cannot be used: " in capsys.readouterr().err


def test_a_cell_too_large_does_not_end_the_session(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is skipped with need and have; the cell that fits is trained; with --sftguard-strict the other fails."""
    pytester.makeconftest(
        """
        from pytest_sftguard.engine import runner
        runner.free_bytes = lambda device_type: 900_000
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.gpu_stability(precision="fp32", batch=["2x1", "64x1"], steps=4, device="cpu", fit_margin=0.1)
        def test_trains(sft_run):
            pass
        """
    )
    result = pytester.runpytest_subprocess("-rs")
    result.assert_outcomes(passed=1, skipped=1)
    result.stdout.fnmatch_lines(["*fp32-b64x1 not evaluated: needs * MiB of 879 KiB free, of which 10% is left as*"])
    strict = pytester.runpytest_subprocess("--sftguard-strict", "-k", "b64x1")
    strict.assert_outcomes(failed=0, errors=1)
    data = [json.loads(p.read_text("utf-8")) for p in (pytester.path / ".sftguard" / "records").glob("*.json")]
    assert sum(d["not_run"] is not None for d in data) == 1


def test_collected_records_have_their_tests_names(records: dict[str, Path]) -> None:
    """A record's file name tells its test, without the cell that stands in the record."""
    [(name, _)] = bundles.collect([records["not run"]])
    assert name == "test_it.py_test_trains"


def test_faults_are_tried_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table, the rates and both files; exit code 0 as the fault was caught and the healthy target is green."""
    files = {"--json": tmp_path / "faults.json", "--markdown": tmp_path / "faults.md"}
    options = [str(text) for pair in files.items() for text in pair]
    assert main(["faults", "labels-shifted-twice", "--jobs", "1", *options]) == 0
    printed = capsys.readouterr().out
    assert "labels-shifted-twice" in printed
    assert "detection      1 of 1 (100.0%)" in printed
    assert "false alarms   0 of 1" in printed
    assert json.loads(files["--json"].read_text())["attempts"][1]["caught"]
    assert "| caught |" in files["--markdown"].read_text()


def test_faults_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """Each with what it injects and where people met it."""
    assert main(["faults", "--list"]) == 0
    printed = capsys.readouterr().out
    assert "labels-shifted-twice\n    shifts the labels" in printed
    assert "https://github.com/" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-fault"], "unknown fault 'no-such-fault': choose from accumulation-mean-of-means"),
        (["--target", "absent:build"], "target 'absent:build' cannot be imported"),
        (["--json", "/no/such/folder/x.json"], "cannot be written: there is no folder /no/such/folder"),
        (["--jobs", "0"], "'0' cannot be used: give a whole number, at least 1"),
        (["--at-least", "80"], "'80' cannot be used: give a share above 0 and at most 1"),
    ],
)
def test_faults_misused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A mistake is told in a line, before anything is trained."""
    try:
        code = main(["faults", *arguments])
    except SystemExit as left:
        code = left.code  # type: ignore[assignment]
    assert code == 2
    assert message in capsys.readouterr().err
