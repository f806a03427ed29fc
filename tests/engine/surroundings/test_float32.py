"""torch's switches for tf32: read and put back in whichever of its two ways somebody sets them."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys

import pytest
import torch
from transformers.utils import import_utils

from pytest_sftguard.engine.surroundings import float32

WAYS = (
    'torch.backends.fp32_precision = "tf32"',
    'torch.backends.fp32_precision = "ieee"',
    'torch.backends.cuda.matmul.fp32_precision = "tf32"',
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cudnn.allow_tf32 = False",
    'torch.set_float32_matmul_precision("high")',
)
"""The first is how transformers does it."""

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

newer = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has the older way only")


@newer
def test_a_run_leaves_the_switches_as_they_were() -> None:
    """Whatever was set before it, and whatever two things it sets; in a process that ends with the test."""
    tries = list(itertools.product(("pass", *WAYS), WAYS, ("pass", *WAYS)))
    command = [sys.executable, "-c", SCRIPT, json.dumps(tries)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


@newer
@pytest.mark.parametrize(
    ("statement", "expected"), [("pass", False), *((way, "tf32" in way and "cudnn" not in way) for way in WAYS[:4])]
)
def test_products_in_tf32_are_seen(statement: str, expected: bool) -> None:
    """Where reading the older switch would raise, too."""
    put_back = float32.snapshot()
    try:
        exec(statement)
        assert float32.products_in_tf32() is expected
    finally:
        put_back()


def test_a_second_training_in_a_process_gets_what_it_asks_for() -> None:
    """Whatever transformers was asked for before: it sets the switches once for each answer, and remembers that."""
    put_back = float32.snapshot()
    try:
        for wanted in (True, False, True):
            float32.forget_requests()
            import_utils.enable_tf32(wanted)
            assert float32.products_in_tf32() is wanted
    finally:
        put_back()
