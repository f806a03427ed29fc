"""The pytest plugin: hooks and fixtures that hand over. Nothing imports torch before a marked test runs."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import sys
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from pytest_sftguard.hardware import HardwareProfile
    from pytest_sftguard.loops import LoopTest
    from pytest_sftguard.matrix import Cell
    from pytest_sftguard.reports._screen import Screen
    from pytest_sftguard.session import CellTest, Runs
    from pytest_sftguard.settings import Settings
    from pytest_sftguard.verdicts import JudgedRun

MARKER = "gpu_stability"

RUN = pytest.StashKey["JudgedRun"]()
LOOP = pytest.StashKey["LoopTest"]()
RUNS = pytest.StashKey["Runs"]()
PACKED = pytest.StashKey[list[dict[str, Any]]]()
COLUMNS = pytest.StashKey[int]()


# what pytest.fail raises, which mypy sees as a value
class NotPassedError(pytest.fail.Exception):  # type: ignore[misc,name-defined]
    """Why a test did not pass. Pytest prints all of it among the failures, and `headline` in its short summary."""

    def __init__(self, text: str, headline: str) -> None:
        super().__init__(text, pytrace=False)
        self.headline = headline


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the settings."""
    from pytest_sftguard import settings

    settings.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker, and refuse settings that no test could use."""
    from pytest_sftguard import settings

    # made now, as there is no terminal to ask while pytest captures what a test writes
    config.stash[COLUMNS] = shutil.get_terminal_size().columns
    config.stash[PACKED] = []
    config.pluginmanager.register(_Reports(config.stash[PACKED]), "sftguard-reports")
    config.addinivalue_line("markers", settings.marker_line(MARKER))
    try:
        settings.resolve(config)
    except settings.SettingError as error:
        raise pytest.UsageError(str(error)) from None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test for each cell."""
    marker = metafunc.definition.get_closest_marker(MARKER)
    if marker is None:
        return
    from pytest_sftguard import settings
    from pytest_sftguard.session import CellTest

    where = metafunc.definition.nodeid
    if "_sft_test" not in metafunc.fixturenames:
        raise pytest.Collector.CollectError(
            f"{where} is marked {MARKER} and trains nothing, as it takes neither sft_run nor sft_cell. "
            f"Write `def {metafunc.function.__name__}(sft_run):`"
        )
    # the closest first
    markers = list(metafunc.definition.iter_markers(MARKER))
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
        raise pytest.Collector.CollectError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
    tests = [CellTest(config, resolved, metafunc.config.rootpath / resolved.dir) for config in configs]
    metafunc.parametrize("_sft_test", tests, ids=map(str, tests), indirect=True)


@pytest.fixture
def _sft_test(request: pytest.FixtureRequest) -> CellTest:
    """What the marked test asks for in this cell."""
    test: CellTest | None = getattr(request, "param", None)
    if test is None:
        _fail(request.config, f"sft_run and sft_cell need a test that is marked @pytest.mark.{MARKER}")
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
    config, node = request.config, request.node
    session = [t.config for item in request.session.items if (t := _cell_test(item)) is not None]
    with _progress(config, _sft_test) as progress:
        run = _judged(node, lambda: _runs(config).judged(_sft_test, node.nodeid, progress, session))
    return _passed_on(config, run, _sft_test.settings.fails_unevaluated)


@pytest.fixture
def sft_observer(request: pytest.FixtureRequest) -> Iterator[LoopTest]:
    """Call it with your model and optimizer (and `accelerator=`) to get an Observer of your own training loop.

    What it saw is judged when the test's body is done, as a cell of `sft_run` is: no assertion is needed.
    """
    from pytest_sftguard import settings
    from pytest_sftguard.loops import LoopTest

    node = request.node

    def resolve(given: Mapping[str, Any]) -> Settings:
        return settings.resolve(request.config, given, node.nodeid, "sft_observer")

    test = node.stash[LOOP] = LoopTest(node.nodeid, resolve)
    yield test
    test.close()


@pytest.fixture(scope="session")
def sft_device(request: pytest.FixtureRequest) -> HardwareProfile:
    """The device that cells are trained on in this session, unless their marker names another."""
    from pytest_sftguard import settings
    from pytest_sftguard.engine.machine.profiles import choose_device, device_profile

    device_type, unavailable = choose_device(settings.resolve(request.config).training_device)
    if unavailable:
        pytest.skip(unavailable)
    return device_profile(device_type)


@pytest.fixture
def simulated_hardware() -> Iterator[Callable[[HardwareProfile | str], HardwareProfile]]:
    """Call it with a profile, or a known device such as "T4", which torch then answers for until the test ends.

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
    """A cell whose verdict is FAILED fails, also where another of its fixtures skips the test."""
    try:
        return (yield)
    except pytest.skip.Exception as own:
        run = item.stash.get(RUN, None)
        if run is None or not run.verdict.failures:
            raise
        failed = _failed(item, run, own)
    raise failed


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
    if (test := item.stash.get(LOOP, None)) is not None:
        observed = _judged(item, lambda: test.run(item.config.rootpath))
        if own is None:
            _passed_on(item.config, observed, test.fails_unevaluated)
    run = item.stash.get(RUN, None)
    # the traceback of the user's own loop is kept: the verdict stands below it
    if run is not None and run.verdict.failures and not (test is not None and isinstance(own, Exception)):
        raise _failed(item, run, own)
    if own is not None:
        raise own
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Say where the test stands, and let the judged run travel with the report of the phase that decided the test."""
    report = yield
    run = item.stash.get(RUN, None)
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, NotPassedError):
        crash = report.longrepr.reprcrash  # type: ignore[union-attr] # pytest's representation of any exception
        crash.path, crash.lineno, crash.message = str(item.path), (item.location[1] or 0) + 1, error.headline
    elif report.failed and report.when != "teardown" and run is not None and run.verdict.failures:
        with contextlib.suppress(AttributeError):
            report.longrepr.addsection("pytest-sftguard", str(_failed(item, run)))  # type: ignore[union-attr]
    if run is not None and (report.when == "call" or (report.when == "setup" and not report.passed)):
        from pytest_sftguard.session import pack

        # pytest carries extra attributes between processes
        report.sftguard = pack(run, item.nodeid, _rerun(item))  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the reports say of all cells."""
    if config.stash[PACKED]:
        from pytest_sftguard import reports
        from pytest_sftguard.session import unpack

        # before pytest 9, `line` prints the headline alone; a failure that was expected is never printed
        silent = config.option.tbstyle in (("no",) if pytest.version_tuple >= (9,) else ("no", "line"))
        printed = terminalreporter.stats.get("failed") or terminalreporter.stats.get("error")
        screen = _screen(
            config,
            details=config.get_verbosity() > 0,
            elsewhere="" if silent else "FAILURES above" if printed else "run again with --runxfail",
            paint=config.get_terminal_writer().markup,
        )
        terminalreporter.write_sep("=", "pytest-sftguard: stability of LoRA fine-tuning")
        for lines in reports.call("section", [unpack(p) for p in config.stash[PACKED]], screen):
            for line in lines:
                terminalreporter.write_line(line)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With --sftguard-require-gpu, a session in which nothing ran on a GPU fails."""
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
    """Collects the judged runs of all tests, also those that xdist's workers send."""

    def __init__(self, packed: list[dict[str, Any]]) -> None:
        self._packed = packed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the run that came with a test's report."""
        if hasattr(report, "sftguard"):
            self._packed.append(report.sftguard)


def _judged(item: pytest.Item, judge: Callable[[], JudgedRun]) -> JudgedRun | str:
    """The run that `judge` gives, kept for the reports; or the reason why there is none."""
    from pytest_sftguard import reports
    from pytest_sftguard.session import CannotRunError

    try:
        run = item.stash[RUN] = judge()
    except CannotRunError as error:
        return str(error)
    item.user_properties.extend(itertools.chain(*reports.call("properties", run)))
    return run


def _passed_on(config: pytest.Config, run: JudgedRun | str, fails_unevaluated: bool) -> JudgedRun:
    """`run`, where it was evaluated. If not, the test is skipped; it fails if it must, or if there is no run."""
    from pytest_sftguard.reports._headline import headline
    from pytest_sftguard.verdicts import Outcome

    if isinstance(run, str):
        _fail(config, run)
    if run.verdict.outcome is Outcome.NOT_EVALUATED:
        if fails_unevaluated:
            _fail(config, headline(run))
        # in pytest's summary a skip stands with the line of the test, not with this one
        raise pytest.skip.Exception(headline(run), _use_item_location=True)
    return run


def _screen(config: pytest.Config, **more: Any) -> Screen:
    """The session's terminal, as wide as it was when the session began, with `more` fields of a Screen."""
    from pytest_sftguard.reports._screen import Screen, columns

    return Screen(width=columns(config.stash[COLUMNS]), **more)


def _fail(config: pytest.Config, why: str) -> NoReturn:
    raise NotPassedError("\n".join(_screen(config).wrap(why)), why)


def _failed(item: pytest.Item, run: JudgedRun, own: BaseException | None = None) -> NotPassedError:
    """The failure of `item`, whose run failed; `own` is what the test itself raised."""
    from pytest_sftguard.reports._headline import headline
    from pytest_sftguard.session import message

    return NotPassedError(message(run, _rerun(item), _screen(item.config), own), headline(run))


def _runs(config: pytest.Config) -> Runs:
    if RUNS not in config.stash:
        from pytest_sftguard.session import Runs

        config.stash[RUNS] = Runs()
    return config.stash[RUNS]


def _cell_test(item: pytest.Item) -> CellTest | None:
    """What a marked test asks for; None for any other test."""
    parameters: dict[str, Any] = getattr(getattr(item, "callspec", None), "params", {})
    return parameters.get("_sft_test")


def _rerun(item: pytest.Item) -> str:
    """The command that repeats this cell with the same settings."""
    import shlex

    from pytest_sftguard.settings import SETTINGS

    options = [(s, item.config.getoption(s.ini)) for s in SETTINGS]
    given = [s.option if s.flag else f"{s.option}={shlex.quote(value)}" for s, value in options if value is not None]
    return " ".join(["pytest", f'"{item.nodeid}"', *given])


@contextlib.contextmanager
def _progress(config: pytest.Config, test: CellTest) -> Iterator[Callable[[str], None]]:
    """Shows what the cell is at on the terminal's current line, until the end; nothing where no person watches."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    capture = config.pluginmanager.getplugin("capturemanager")
    if reporter is None or capture is None or not capture.is_globally_capturing() or not reporter.isatty:
        yield lambda doing: None
        return
    writer, drawn = config.get_terminal_writer(), 0

    def show(doing: str) -> None:
        nonlocal drawn
        with capture.global_and_fixture_disabled():
            # backspaces do not go back over the end of a line
            room = max(writer.fullwidth - writer.width_of_current_line - 1, 0)
            text = f" {test}: {doing}"[:room] if doing else ""
            padded = text.ljust(drawn)
            # not by pytest's writer, which would count it all as a part of the line
            sys.stdout.write(padded + "\b" * len(padded))
            sys.stdout.flush()
        drawn = len(text)

    try:
        yield show
    finally:
        show("")
