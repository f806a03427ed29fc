"""The pytest plugin: hooks and fixtures that hand over. Nothing here imports torch before a marked test runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_sftguard.hardware import HardwareProfile
    from pytest_sftguard.loops import LoopTest
    from pytest_sftguard.matrix import Cell
    from pytest_sftguard.session import CellTest, Runs
    from pytest_sftguard.verdicts import JudgedRun

MARKER = "gpu_stability"

RUN = pytest.StashKey["JudgedRun"]()
LOOP = pytest.StashKey["LoopTest"]()
RUNS = pytest.StashKey["Runs"]()
PACKED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the table of settings."""
    from pytest_sftguard import settings

    settings.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse settings that no test could use."""
    from pytest_sftguard import settings

    config.stash[PACKED] = []
    config.pluginmanager.register(_Reports(config.stash[PACKED]), "sftguard-reports")
    config.addinivalue_line("markers", settings.marker_line(MARKER))
    try:
        settings.resolve(config)
    except settings.SettingError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each cell."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    from pytest_sftguard import settings
    from pytest_sftguard.session import CellTest

    where = metafunc.definition.nodeid
    if "_sft_test" not in metafunc.fixturenames:
        raise pytest.Collector.CollectError(
            f"{where} is marked {MARKER} and trains nothing: it takes neither sft_run nor sft_cell. "
            f"Write `def {metafunc.function.__name__}(sft_run):`"
        )
    markers = list(metafunc.definition.iter_markers(MARKER))  # the closest first
    positional = tuple(arg for m in markers for arg in m.args)
    if positional:
        raise pytest.Collector.CollectError(
            f"{where}: {MARKER} takes keywords only, such as steps=8; got {positional!r}"
        )
    keywords = dict(kw for m in reversed(markers) for kw in m.kwargs.items())
    try:
        resolved = settings.resolve(metafunc.config, keywords, where)
        configs = resolved.configs()
    except settings.SettingError as error:
        message = str(error) if str(error).startswith(where) or "--sftguard" in str(error) else f"{where}: {error}"
        raise pytest.Collector.CollectError(message) from None
    tests = [
        CellTest(
            config=c,
            invariants=resolved.invariants,
            thresholds=resolved.thresholds,
            references=resolved.references,
            waived=resolved.waive,
            strict=resolved.strict or resolved.require_gpu,
            folder=metafunc.config.rootpath / resolved.dir,
        )
        for c in configs
    ]
    metafunc.parametrize("_sft_test", tests, ids=map(str, tests), indirect=True)


@pytest.fixture
def _sft_test(request: pytest.FixtureRequest) -> CellTest:
    """What the marked test asks for in this cell."""
    test: CellTest | None = getattr(request, "param", None)
    if test is None:
        pytest.fail(f"sft_run and sft_cell need a test that is marked @pytest.mark.{MARKER}", pytrace=False)
    return test


@pytest.fixture
def sft_cell(_sft_test: CellTest) -> Cell:
    """The cell of the precision x batch matrix that this test stands for."""
    return _sft_test.config.cell


@pytest.fixture
def sft_run(request: pytest.FixtureRequest, sft_cell: Cell, _sft_test: CellTest) -> JudgedRun:
    """The trained and judged run of this cell: `.record`, `.verdict`, `.losses`, `.grad_norms`.

    The verdict needs no assertion: a cell that failed fails the test when its body is done, and one that could not be
    evaluated skips it with the reason (with --sftguard-strict or --sftguard-require-gpu it fails).
    """
    from pytest_sftguard.reports.failure import not_evaluated
    from pytest_sftguard.session import CannotRunError
    from pytest_sftguard.verdicts import Outcome

    node, cannot = request.node, ""
    try:
        session = [t.config for item in request.session.items if (t := _cell_test(item)) is not None]
        run = _runs(request.config).judged(_sft_test, node.nodeid, _progress(request.config, _sft_test), session)
    except CannotRunError as error:
        cannot = str(error)
    if cannot:  # not inside of `except`, where pytest would print the causes and the message again for each
        pytest.fail(cannot, pytrace=False)
    node.stash[RUN] = run
    node.user_properties.extend(_properties(run))
    if run.verdict.outcome is Outcome.NOT_EVALUATED:
        if _sft_test.strict:
            pytest.fail(not_evaluated(run), pytrace=False)
        pytest.skip(not_evaluated(run))
    return run


@pytest.fixture
def sft_observer(request: pytest.FixtureRequest) -> Iterator[LoopTest]:
    """Call it with your model and optimizer (and `accelerator=`) to get an Observer of your own training loop.

    What it saw is judged when the test's body is done, as the cells of `sft_run` are: no assertion is needed.
    """
    from pytest_sftguard import settings
    from pytest_sftguard.loops import LoopTest

    node = request.node
    test = node.stash[LOOP] = LoopTest(node.nodeid, lambda given: settings.resolve(request.config, given, node.nodeid))
    yield test
    test.close()


@pytest.fixture(scope="session")
def sft_device(request: pytest.FixtureRequest) -> HardwareProfile:
    """The device that cells are trained on in this session, unless their marker names another."""
    from pytest_sftguard import settings
    from pytest_sftguard.engine.machine.profiles import choose_device, device_profile

    resolved = settings.resolve(request.config)
    device_type, unavailable = choose_device("cuda" if resolved.require_gpu else resolved.device)
    if unavailable:
        pytest.skip(unavailable)
    return device_profile(device_type)


@pytest.fixture
def simulated_hardware() -> Iterator[Callable[[HardwareProfile | str], HardwareProfile]]:
    """Call it with a profile, or a known device such as "T4": until the test ends, torch answers for that device.

    A second call takes the place of the first. Under hypothesis, use the context manager of the same name in
    pytest_sftguard.engine.machine.simulate.
    """
    from contextlib import ExitStack

    from pytest_sftguard.engine.machine import simulate

    with ExitStack() as stack:

        def be(profile: HardwareProfile | str) -> HardwareProfile:
            stack.close()
            return stack.enter_context(simulate.simulated_hardware(profile))

        yield be


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None, object, object]:
    """A cell whose verdict is FAILED is not skipped because another of its fixtures skips the test."""
    try:
        return (yield)
    except pytest.skip.Exception as own:
        run = item.stash.get(RUN, None)
        if run is None or not run.verdict.failures:
            raise
        from pytest_sftguard.session import failure_text

        text = failure_text(run, _rerun(item), own)
    pytest.fail(text, pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    """After the test's body: a cell whose verdict is FAILED fails, whatever the body said."""
    own: BaseException | None = None
    result = None
    try:
        result = yield
    except (KeyboardInterrupt, SystemExit, pytest.exit.Exception, pytest.xfail.Exception):
        raise
    except BaseException as error:
        own = error
    if LOOP in item.stash:
        _conclude_loop(item, own)
    run = item.stash.get(RUN, None)
    if run is not None and run.verdict.failures:
        from pytest_sftguard.session import failure_text

        if LOOP in item.stash and isinstance(own, Exception):  # the traceback of the user's own loop comes first
            item.add_report_section("call", "sftguard", failure_text(run, _rerun(item), None))
            raise own
        pytest.fail(failure_text(run, _rerun(item), own), pytrace=False)
    if own is not None:
        raise own
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let the judged run travel with the report of the phase that decided the test."""
    report = yield
    run = item.stash.get(RUN, None)
    if run is not None and (report.when == "call" or (report.when == "setup" and not report.passed)):
        from pytest_sftguard.session import pack

        report.sftguard = pack(  # type: ignore[attr-defined] # pytest carries extra attributes between processes
            run, item.nodeid.partition("[")[0], _rerun(item)
        )
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the section: a line for each cell, then each finding."""
    packed = config.stash[PACKED]
    if packed:
        from pytest_sftguard.reports import terminal
        from pytest_sftguard.session import unpack

        terminalreporter.section("pytest-sftguard: stability of LoRA fine-tuning")
        for line in terminal.lines([unpack(p) for p in packed]):
            terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With --sftguard-require-gpu, a session in which nothing ran on a GPU has failed."""
    from pytest_sftguard import settings

    config = session.config
    if config.option.collectonly or hasattr(config, "workerinput") or not settings.resolve(config).require_gpu:
        return
    reporter = config.pluginmanager.getplugin("terminalreporter")
    device_types = [p["record"]["device"]["device_type"] for p in config.stash[PACKED] if p["record"]["steps"]]
    if not any(d in ("cuda", "rocm") for d in device_types) and exitstatus in (0, 5):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if reporter is not None:
            reporter.write_line("--sftguard-require-gpu: nothing ran on a GPU", red=True)


class _Reports:
    """Keeps the judged runs of all reports, those that xdist's workers sent among them."""

    def __init__(self, packed: list[dict[str, Any]]) -> None:
        self._packed = packed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A report has come in."""
        if hasattr(report, "sftguard"):
            self._packed.append(report.sftguard)


def _conclude_loop(item: pytest.Item, own: BaseException | None) -> None:
    """Judge what the test observed; one that observed nothing, or could not be evaluated, is no pass."""
    from pytest_sftguard.reports.failure import not_evaluated
    from pytest_sftguard.session import CannotRunError
    from pytest_sftguard.verdicts import Outcome

    test, cannot, run = item.stash[LOOP], "", None
    try:
        run = test.run(item.config.rootpath)
    except CannotRunError as error:
        cannot = str(error)
    if run is not None:
        item.stash[RUN] = run
        item.user_properties.extend(_properties(run))
    if own is not None:
        return
    if run is None:
        pytest.fail(cannot or "sft_observer was not called: nothing was observed", pytrace=False)
    if run.verdict.outcome is Outcome.NOT_EVALUATED:
        if test.strict:
            pytest.fail(not_evaluated(run), pytrace=False)
        pytest.skip(not_evaluated(run))


def _runs(config: pytest.Config) -> Runs:
    if RUNS not in config.stash:
        from pytest_sftguard.session import Runs

        config.stash[RUNS] = Runs()
    return config.stash[RUNS]


def _cell_test(item: pytest.Item) -> CellTest | None:
    """What a marked test asks for; None for every other one."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return parameters.get("_sft_test")


def _properties(run: JudgedRun) -> list[tuple[str, str]]:
    from pytest_sftguard.reports import junit

    return junit.properties(run)


def _rerun(item: pytest.Item) -> str:
    """The command that repeats this cell with the same settings."""
    import shlex

    from pytest_sftguard.settings import SETTINGS

    options = [(s, item.config.getoption(s.ini)) for s in SETTINGS]
    given = [s.option if s.flag else f"{s.option}={shlex.quote(value)}" for s, value in options if value is not None]
    return " ".join(["pytest", f'"{item.nodeid}"', *given])


def _progress(config: pytest.Config, test: CellTest) -> Callable[[int], None] | None:
    """Shows the steps of a long cell on the terminal's current line, where there is a person to see it."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    if reporter is None or capture is None or hasattr(config, "workerinput") or not reporter.isatty:
        return None

    def show(step: int) -> None:
        text = f" {test} step {step}/{test.config.steps} "
        with capture.global_and_fixture_disabled():
            reporter.write(text + "\b" * len(text), flush=True)
            if step == test.config.steps:
                reporter.write(" " * len(text) + "\b" * len(text), flush=True)

    return show
