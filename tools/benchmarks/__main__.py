"""Measures everything that docs/performance.md and docs/cost.md say, and writes it there.

    python -m tools.benchmarks              (an hour and a half on two cores that do nothing else)
    python -m tools.benchmarks --only matrix_speed silence_cost

Each measurement is a script of its own (`python -m tools.benchmarks.guard_cost --help`), run one after the other in a
fresh process: two at a time would measure each other.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, list[str]] = {
    "training_speed": ["--model", "smollm2-135m"],
    "matrix_speed": [],
    "silence_cost": [],
    "guard_cost": [],
    "tier_cost": [],
}
"""Each script with its arguments, in the order of the pages."""


def main() -> None:
    """Run the scripts, and stop at the first that fails: the pages hold what was measured until then."""
    parser = argparse.ArgumentParser(prog="python -m tools.benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(SCRIPTS), choices=SCRIPTS, help="some of them (default: all)")
    chosen = parser.parse_args().only
    for number, name in enumerate(chosen, 1):
        print(f"== {number} of {len(chosen)}: {name}", flush=True)
        began = time.perf_counter()
        command = [sys.executable, "-m", f"tools.benchmarks.{name}", *SCRIPTS[name], "--write"]
        if code := subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit(f"{name} ended with {code}; what was measured before it has been written")
        print(f"== {name} took {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
