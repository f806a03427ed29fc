"""The marker: one test of each cell, and an answer to every misuse that says what to write."""

from __future__ import annotations

import pytest

IDS = ["test_it[bf16-mixed-b2x4]", "test_it[bf16-mixed-b8x1]", "test_it[fp32-b2x4]", "test_it[fp32-b8x1]"]


def collected(pytester, *arguments):
    """The ids of the tests that a run would run."""
    lines = pytester.runpytest_inprocess("--collect-only", "-q", *arguments).outlines
    return [line.partition("::")[2] for line in lines if "::" in line]


def marked(pytester, marker, arguments="sft_run", body="pass"):
    """A file with one test that is marked so."""
    return pytester.makepyfile(
        test_it=f"import pytest\n\n@pytest.mark.gpu_stability{marker}\ndef test_it({arguments}):\n    {body}\n"
    )


def test_one_test_of_each_cell(pytester):
    """A marked test becomes one test for each cell of its matrix."""
    marked(pytester, '(precision="bf16-mixed fp32", batch=[2, 8])')
    assert collected(pytester) == IDS


def test_written_accumulation_is_in_the_id(pytester):
    """A batch of 4 with 2 micro-batches reads b4x2."""
    marked(pytester, '(precision=["bf16-mixed"], batch="4x2")')
    assert collected(pytester) == ["test_it[bf16-mixed-b4x2]"]


def test_bare_marker(pytester):
    """A marker without keywords, and without parentheses, takes the default matrix."""
    marked(pytester, "")
    assert len(collected(pytester)) == 6


@pytest.mark.parametrize(
    ("expression", "ids"),
    [("bf16", IDS[:2]), ("b8x1", IDS[1::2]), ("fp32 and b2x4", IDS[2:3])],
    ids=["precision", "batch", "both"],
)
def test_cells_are_chosen_by_k(pytester, expression, ids):
    """`-k` chooses cells by the parts of their ids."""
    marked(pytester, '(precision="bf16-mixed fp32", batch=[2, 8])')
    assert collected(pytester, "-k", expression) == ids


def test_marked_class(pytester, engine):
    """A marker on a class marks its tests."""
    pytester.makepyfile(
        test_it='import pytest\n\n@pytest.mark.gpu_stability(precision="fp32", batch="2x1")\nclass TestIt:\n'
        "    def test_one(self, sft_run):\n        assert sft_run.verdict.passed\n"
    )
    assert pytester.runpytest_inprocess().ret == 0
    assert engine.ran == ["fp32-b2x1"]


def test_marked_module(pytester):
    """A marker on a module marks its tests."""
    pytester.makepyfile(
        test_it='import pytest\npytestmark = pytest.mark.gpu_stability(precision="fp32", batch=4)\n'
        "def test_it(sft_run): pass\n"
    )
    assert collected(pytester) == ["test_it[fp32-b4x1]"]


def test_closer_marker_wins(pytester):
    """A keyword at the function wins over the class's, and the others stay."""
    pytester.makepyfile(
        test_it='import pytest\n\n@pytest.mark.gpu_stability(precision="fp32", batch=4)\nclass TestIt:\n'
        "    @pytest.mark.gpu_stability(batch=2)\n    def test_it(self, sft_run): pass\n"
    )
    assert collected(pytester) == ["TestIt::test_it[fp32-b2x1]"]


def test_parametrize_beside_the_marker(pytester):
    """`parametrize` multiplies the cells."""
    pytester.makepyfile(
        test_it="import pytest\n\n@pytest.mark.parametrize('x', [1, 2])\n"
        '@pytest.mark.gpu_stability(precision="fp32", batch=[2, 4])\ndef test_it(sft_run, x): pass\n'
    )
    assert len(collected(pytester)) == 4


def test_cell_alone_trains_nothing(pytester, engine):
    """A test that takes sft_cell only is told its cell, and trains nothing."""
    marked(pytester, '(precision="fp32", batch="2x1")', "sft_cell", 'assert str(sft_cell) == "fp32-b2x1"')
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    assert engine.ran == []


def test_run_through_a_fixture_of_the_user(pytester, engine):
    """A fixture that takes sft_run hands it on to a marked test."""
    pytester.makepyfile(
        test_it="import pytest\n\n@pytest.fixture\ndef losses(sft_run): return sft_run.losses\n\n"
        '@pytest.mark.gpu_stability(precision="fp32", batch="2x1", steps=3)\n'
        "def test_it(losses): assert len(losses) == 3\n"
    )
    pytester.runpytest_inprocess().assert_outcomes(passed=1)


def test_strict_markers(pytester, one_cell):
    """The marker is registered."""
    assert collected(pytester, "--strict-markers") == ["test_it[fp32-b2x1]"]


def test_marker_is_listed(pytester):
    """`pytest --markers` shows the marker's keywords."""
    pytester.runpytest_inprocess("--markers").stdout.fnmatch_lines(["@pytest.mark.gpu_stability(precision=, batch=,*"])


def test_options_are_listed(pytester):
    """`pytest --help` shows the options in a group of their own."""
    pytester.runpytest_inprocess("--help").stdout.fnmatch_lines(["numerical stability of LoRA fine-tuning*:"])


def test_fixtures_are_listed(pytester):
    """`pytest --fixtures` shows sft_run with its first line."""
    pytester.runpytest_inprocess("--fixtures").stdout.fnmatch_lines(["sft_run*", "    The trained and judged run*"])


def test_without_the_plugin(pytester):
    """With `-p no:sftguard` an unmarked test runs as ever."""
    pytester.makepyfile(test_it="def test_it(): pass\n")
    pytester.runpytest_subprocess("-p", "no:sftguard").assert_outcomes(passed=1)


def test_marked_test_without_the_plugin(pytester, one_cell):
    """With `-p no:sftguard` a marked test does not pass: its fixture is not there."""
    pytester.runpytest_subprocess("-p", "no:sftguard").assert_outcomes(errors=1)


MISUSE = {
    "unknown-keyword": ("(stepps=8)", "test_it.py::test_it: gpu_stability has no keyword 'stepps': choose from batch"),
    "positional": (
        '("fp32")',
        "test_it.py::test_it: gpu_stability takes keywords only, such as steps=8; got ('fp32',)",
    ),
    "precision": ('(precision="fp8")', "precision= of gpu_stability: 'fp8' cannot be used: unknown precision 'fp8'"),
    "precision-not-a-name": ("(precision=[32])", "unknown precision 32: choose from fp32, tf32"),
    "batch-0": ("(batch=0)", "batch= of gpu_stability: 0 cannot be used: batch 0 is not a batch"),
    "batch-many": ('(batch="many")', "'many' cannot be used: batch 'many' is not a batch: give a whole number"),
    "batch-does-not-divide": ("(batch=3, effective_batch=8)", "test_it.py::test_it: batch 3 does not divide"),
    "steps-0": ("(steps=0)", "steps= of gpu_stability: 0 cannot be used: give a whole number, at least 1"),
    "device": ('(device="gpu")', "device= of gpu_stability: 'gpu' cannot be used: choose from auto, cpu"),
}


@pytest.mark.parametrize(("marker", "message"), MISUSE.values(), ids=MISUSE)
def test_misused_marker(pytester, clean, marker, message):
    """A marker that cannot be meant is a collection error of a line or two, without a traceback."""
    marked(pytester, marker)
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    clean(result, message)


def test_misused_marker_of_the_class(pytester, clean):
    """A positional argument of a class's marker is refused too, where the function has a marker of its own."""
    pytester.makepyfile(
        test_it='import pytest\n\n@pytest.mark.gpu_stability("fp32")\nclass TestIt:\n'
        "    @pytest.mark.gpu_stability(batch=2)\n    def test_it(self, sft_run): pass\n"
    )
    clean(pytester.runpytest_inprocess(), "gpu_stability takes keywords only, such as steps=8; got ('fp32',)")


def test_marker_without_the_fixture(pytester, clean):
    """A marked test that takes no fixture of ours would train nothing: that is an error."""
    marked(pytester, "", "")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    clean(result, "Write `def test_it(sft_run):`")


@pytest.mark.parametrize("fixture", ["sft_run", "sft_cell"])
def test_fixture_without_the_marker(pytester, clean, fixture):
    """A test that takes a fixture of ours without the marker is told to be marked."""
    pytester.makepyfile(test_it=f"def test_it({fixture}): pass\n")
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    clean(result, "sft_run and sft_cell need a test that is marked @pytest.mark.gpu_stability")


SETTINGS = {
    "precision": ("fp8", "unknown precision 'fp8': choose from fp32"),
    "batch": ("0", "batch '0' is not a batch: it must be at least 1"),
    "steps": ("0", "give a whole number, at least 1"),
}


@pytest.mark.parametrize(("name", "value", "reason"), [(n, *v) for n, v in SETTINGS.items()], ids=SETTINGS)
@pytest.mark.parametrize("source", ["option", "environment", "ini"])
def test_bad_setting(pytester, monkeypatch, clean, one_cell, source, name, value, reason):
    """A setting that no test could use is a usage error, whether or not a test would use it."""
    arguments = [f"--sftguard-{name}={value}"] if source == "option" else []
    if source == "environment":
        monkeypatch.setenv(f"SFTGUARD_{name.upper()}", value)
    if source == "ini":
        pytester.makeini(f"[pytest]\nsftguard_{name} = {value}\n")
    result = pytester.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    called = {"option": f"--sftguard-{name}", "environment": f"SFTGUARD_{name.upper()}"}.get(source, f"sftguard_{name}")
    clean(result, f"ERROR: {called}", lines=2)
    assert f"{value!r} cannot be used: {reason}" in result.stderr.str()


@pytest.mark.parametrize("source", ["option", "environment", "ini"])
def test_setting_arrives(pytester, monkeypatch, source):
    """Cells can be chosen by option, environment and ini file."""
    marked(pytester, "")
    arguments = ["--sftguard-precision=tf32", "--sftguard-batch", "3"] if source == "option" else []
    if source == "environment":
        monkeypatch.setenv("SFTGUARD_PRECISION", "tf32")
        monkeypatch.setenv("SFTGUARD_BATCH", "3")
    if source == "ini":
        pytester.makeini("[pytest]\nsftguard_precision = tf32\nsftguard_batch = 3\n")
    assert collected(pytester, *arguments) == ["test_it[tf32-b3x1]"]
