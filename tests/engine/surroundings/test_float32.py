"""torch's switches for tf32 are read and restored in both of its APIs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers.utils import import_utils

from pytest_sftguard.engine.surroundings import float32

STATEMENTS = (
    'torch.backends.fp32_precision = "tf32"',
    'torch.backends.fp32_precision = "ieee"',
    'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    'torch.set_float32_matmul_precision("high")',
)
"""Settings of the switches; transformers uses the first."""

SCRIPT = """
import json, sys, torch
from pytest_sftguard.engine.surroundings import float32
from pytest_sftguard.engine.surroundings.isolation import isolated

def state():
    def ask(question):
        try:
            return question()
        except RuntimeError:
            return "mixed"
    older = ask(torch.get_float32_matmul_precision)
    return float32._own_values(), older, ask(lambda: torch.backends.cuda.matmul.allow_tf32)

fresh = float32.snapshot()
wrong = []
for earlier, *later in json.loads(sys.argv[1]):
    fresh()
    exec(earlier)
    before = state()
    with isolated():
        for statement in later:
            exec(statement)
    if "mixed" not in before and state() != before or state()[0] != before[0]:
        wrong.append([earlier, later, before, state()])
print(json.dumps(wrong))
"""

newer = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older API only")


@newer
def test_a_run_leaves_the_switches_as_they_were() -> None:
    """They are restored after any two settings, from any state before; in a process of its own."""
    tries = list(itertools.product(("pass", *STATEMENTS), STATEMENTS, ("pass", *STATEMENTS)))
    command = [sys.executable, "-c", SCRIPT, json.dumps(tries)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


@newer
@pytest.mark.parametrize(
    ("statement", "expected"), [("pass", False), *((s, "tf32" in s and "cudnn" not in s) for s in STATEMENTS[:4])]
)
def test_products_in_tf32_are_seen(statement: str, expected: bool) -> None:
    """Also if reading the older switch would raise."""
    restore = float32.snapshot()
    try:
        exec(statement)
        assert float32.products_in_tf32() is expected
    finally:
        restore()


def test_a_second_training_in_a_process_gets_what_it_asks_for() -> None:
    """A request that transformers has cached would set nothing."""
    restore = float32.snapshot()
    try:
        for wanted in (True, False, True):
            float32.forget_requests()
            import_utils.enable_tf32(wanted)
            assert float32.products_in_tf32() is wanted
    finally:
        restore()
