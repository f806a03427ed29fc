"""The regression script of the founding bug, kept working: 8 optimizer steps, finite norms, numeric answers.

    python tests/test_sft_fix.py

exits with 0 only if every gradient norm is finite and the generations hold numbers. pytest runs the same.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

# as a script, only this folder is on the path
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

STEPS = 8


def main() -> int:
    """Train as the app would on this machine, print what was seen, and return the exit code."""
    from homework.sft import determine_batch_hparams, determine_precision_flags
    from pytest_sftguard.engine.runner import run
    from pytest_sftguard.matrix import Cell, RunConfig

    batch, accumulation = determine_batch_hparams()
    use_fp16, use_bf16 = determine_precision_flags()
    precision = "fp16-mixed" if use_fp16 else "bf16-mixed" if use_bf16 else "fp32"
    cell = Cell(precision, batch, accumulation)
    print(f"training {STEPS} optimizer steps of {cell} ...", flush=True)
    record = run(RunConfig(cell=cell, target="homework.sft:build_trainer", steps=STEPS))
    norms = record.grad_norms
    numbers = [a for a in record.answers if a.parsed is not None and math.isfinite(a.parsed)]
    if record.error is not None:
        print(f"the run ended in {record.error.stage}: {record.error.type}: {record.error.message}")
    if norms:
        print(f"grad_norm from {min(norms):.4f} to {max(norms):.4f} over {len(norms)} steps")
    for answer in record.answers[:4]:
        print(f"  {answer.prompt.strip()!r} -> {answer.text!r} (right: {answer.expected:g})")
    print(f"{len(numbers)} of {len(record.answers)} generations hold a number")
    sound = len(norms) == STEPS and all(map(math.isfinite, norms)) and len(numbers) * 2 > len(record.answers)
    print("sound" if sound else "NOT SOUND")
    return 0 if sound else 1


def test_the_fix_holds(capsys) -> None:
    """The script's own verdict is that the training is sound."""
    assert main() == 0
    assert "sound" in capsys.readouterr().out


if __name__ == "__main__":
    sys.exit(main())
