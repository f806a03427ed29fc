"""Pictures of the documentation, made from real runs: `python -m tools.pictures`.

Both show the README's own test in an empty folder, on a terminal of 80 columns: with the built-in target, which passes,
and with a target that trains its adapter in float16, as in the bug that this project began with.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 80
FOUNDING_BUG = "--sftguard-target=tests.targets.tiny:half_precision_adapters"
RUNS = (
    ("docs/pictures/terminal.svg", ["-m", "gpu_stability"]),
    ("docs/pictures/failure.svg", [FOUNDING_BUG, "--sftguard-precision=fp16-true", "--sftguard-batch=4"]),
)
"""Each picture, and the arguments of pytest in it."""


def readme_test() -> str:
    """The first example of the README."""
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    return found[1]


def on_a_terminal(command: list[str], folder: Path) -> bytes:
    """Run a command on a pseudo-terminal of 80 columns, and return what it wrote, colours included."""
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    main, end = pty.openpty()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=end, stdout=end, stderr=end)
    os.close(end)
    written = io.BytesIO()
    try:
        while piece := os.read(main, 65536):
            written.write(piece)
    # Linux ends a terminal that nobody writes to any more with an error
    except OSError:
        pass
    process.wait()
    os.close(main)
    return written.getvalue()


def shown(written: bytes, rows: int = 400) -> Text:
    """What a terminal shows in the end of all that was written to it, in its colours."""
    screen = pyte.Screen(COLUMNS, rows)
    pyte.ByteStream(screen).feed(written)
    text = Text()
    for number in range(screen.cursor.y + 1):
        line = Text()
        cells = (screen.buffer[number][column] for column in range(COLUMNS))
        for (colour, bold), alike in itertools.groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            known = None if colour == "default" else colour.replace("brown", "yellow")
            line.append("".join(cell.data for cell in alike), Style(color=known, bold=bold))
        line.rstrip()
        text.append_text(line).append("\n")
    return text


def draw(arguments: list[str], path: Path) -> None:
    """Run pytest with `arguments` on the README's test, and write the picture of it."""
    command = [sys.executable, "-m", "pytest", "-p", "pytest_sftguard.plugin", "-p", "no:cacheprovider", *arguments]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "my-project"
        folder.mkdir()
        (folder / "test_training.py").write_text(readme_test(), encoding="utf-8")
        text = shown(on_a_terminal(command, folder))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(f"$ pytest {' '.join(arguments)}", highlight=False)
    console.print(text, end="")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(console.export_svg(title="pytest-sftguard", unique_id=path.stem), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Draw every picture, or those that are named."""
    parser = argparse.ArgumentParser(prog="python -m tools.pictures", description=(__doc__ or "").partition("\n")[0])
    names = [path for path, _ in RUNS]
    parser.add_argument("pictures", nargs="*", metavar="PICTURE", help=f"some of {', '.join(names)} (default: all)")
    chosen = parser.parse_args().pictures or names
    for path, arguments in RUNS:
        if path in chosen:
            draw(arguments, ROOT / path)


if __name__ == "__main__":
    main()
