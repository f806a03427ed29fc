"""Pictures of the documentation, made from real runs: `python -m tools.pictures`.

The terminal picture is README's own test, run in an empty folder on a terminal of 80 columns. The test passes, is then
given a target that trains in float16 with eps 1e-8, as the founding bug did, and fails.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = 80
RUNS = (
    ("docs/pictures/terminal.svg", ["-m", "gpu_stability"]),
    ("docs/pictures/failure.svg", ["-m", "gpu_stability", "--sftguard-precision=fp16-true", "--sftguard-batch=4"]),
)
"""Each picture, and the arguments of pytest in it."""


def readme_test() -> str:
    """The first example of the README."""
    found = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert found is not None
    return found[1]


def on_a_terminal(command: list[str], folder: Path) -> str:
    """Run a command on a pseudo-terminal of 80 columns, and return what it wrote, colours included."""
    environment = os.environ | {"COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
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
    return written.getvalue().decode()


def last_states(text: str) -> str:
    """Keep what is left of each line once everything that was written over it is gone."""
    lines = []
    for line in text.replace("\r\n", "\n").split("\n"):
        *_, last = re.split(r"\r|\x1b\[2K", line)
        lines.append(last)
    return "\n".join(lines)


def draw(arguments: list[str], path: Path) -> None:
    """Run pytest with `arguments` on the README's test, and write the picture of it."""
    from rich.console import Console
    from rich.text import Text

    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "test_training.py").write_text(readme_test(), encoding="utf-8")
        text = on_a_terminal([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments], Path(name))
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(f"$ pytest {' '.join(arguments)}\n{last_states(text).rstrip()}"), soft_wrap=True)
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
