"""The reports, one file each, found by their names: what a session writes and prints of its judged runs.

A report is a module of this folder with any of the functions below, which run as soon as the file is here.

    prepare(folder)             shows before a training that `write` will succeed below `folder`; raises OSError
    write(folder, nodeid, run)  writes files on the run of the test `nodeid` below `folder`; raises OSError
    properties(run)             gives name and value of each JUnit property of a run
    message(run, rerun, screen) says why a test fails, whose run the command `rerun` repeats
    section(runs, screen)       gives lines for the terminal on (test id, run, rerun command) of every cell

`screen`, a `_screen.Screen`, says how wide a line may be, wraps it and colours it.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

from pytest_sftguard import registry

Hook = Literal["prepare", "write", "properties", "message", "section"]


def call(hook: Hook, *arguments: Any) -> list[Any]:
    """What the function `hook` of each report that has one returns for `arguments`."""
    modules = [importlib.import_module(f"{__name__}.{name}") for name in registry.names(__name__)]
    # a report may import a function that happens to be called as a hook is
    own = [m for m in modules if getattr(vars(m).get(hook), "__module__", "") == m.__name__]
    return [getattr(module, hook)(*arguments) for module in own]
