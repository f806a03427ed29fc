"""Names the Python of this machine that `tox run -e cuda` trains with: the one that holds torch already.

The environments that tox makes see the packages of the system's own Python at most. torch mostly lies in a virtual
environment, with tox beside it or somewhere else, so that the interpreter itself is asked for.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

from tox.plugin import impl

PYTHON = "SFTGUARD_PYTHON"
"""Environment variable with the interpreter, as tox.ini reads it; who sets it chooses another."""
_ASK = """
import importlib.util, sys
sys.exit(any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft", "pytest")))
"""


@impl
def tox_add_env_config(env_conf: Any, state: Any) -> None:
    """Before tox.ini is read for `cuda`: find the interpreter."""
    if env_conf.name == "cuda" and PYTHON not in os.environ:
        os.environ[PYTHON] = python_with_torch()


def python_with_torch() -> str:
    """The first Python that has what a training needs: tox's own, or one on the PATH; tox's own if none has."""
    on_path = [shutil.which(name) for name in ("python3", "python")]
    found = [python for python in (sys.executable, *on_path) if python is not None]
    return next((python for python in found if _has_torch(python)), sys.executable)


def _has_torch(python: str) -> bool:
    return subprocess.run([python, "-c", _ASK], capture_output=True, check=False).returncode == 0
