"""Predicting the peak memory of a training without allocating it.

The target's own Trainer is built on the CPU, its weights are replaced with torch's fake tensors, which have a shape and
a type but no memory, and its own `train()` runs for two optimizer steps. Each storage is counted from its creation to
its end, below autograd and autocast, where every kernel passes: weights, adapters, saved activations, logits, casts,
gradients and optimizer states. The second step is necessary because the first one creates Adam's moments, which then
exist together with the activations; with accumulation, a second micro-batch meets the gradients of the first.

Building needs host memory for the weights, once; nothing else is allocated. The batch is small and stays real, like
everything that is computed from it alone, because its values decide whether a mask can be left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pytest_sftguard.engine.after import forwards
from pytest_sftguard.engine.building.targets import TargetError, resolve
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.engine.memory.attention import as_on_cuda
from pytest_sftguard.engine.surroundings.errors import first_line
from pytest_sftguard.engine.surroundings.isolation import isolated
from pytest_sftguard.hardware import AMPERE, HardwareProfile
from pytest_sftguard.matrix import Cell, RunConfig
from pytest_sftguard.precision import mode_named

if TYPE_CHECKING:
    from transformers import Trainer

_log = logging.getLogger(__name__)

CUDA_ROUNDING = 512
"""Bytes that CUDA's caching allocator rounds every block up to (kMinBlockSize in CUDACachingAllocator.cpp)."""

CUBLAS_WORKSPACE = 4096 * 2 * 1024 + 16 * 8 * 1024
"""Bytes of a cuBLAS workspace in the caching allocator (CUDABlas.cpp), one for each of two threads."""

CUBLAS_WORKSPACE_HOPPER = 4096 * 8 * 1024
"""The same from compute capability 9.0 on."""

_STEPS = 2
_REAL_BYTES = 1 << 24
_FULL_EVALUATION = ("bf16_full_eval", "fp16_full_eval")
"""Arguments with which the Trainer moves the weights again."""
_ROWS_SEARCHED = 10_000
"""Rows of a data set among which the longest are searched."""


class PredictionError(Exception):
    """A training that cannot be rehearsed on fake tensors; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted memory of a training."""

    peak_bytes: int
    """Largest sum of live tensors at one moment, rounded like the allocator, with the workspaces of its libraries."""
    weights_bytes: int
    """All parameters and buffers, with the adapter's."""
    trainable_bytes: int
    """The trainable parameters."""
    scratch_bytes: int
    """Memory of the guard's checks of a trained model apart from the weights: digests, and logits of three models."""
    tokens: tuple[int, ...]
    """Shape of the first input of the batch: rows, tokens."""
    seconds: float
    """Wall time of the rehearsal, without building."""

    @property
    def cell_bytes(self) -> int:
        """Memory of a cell of the matrix: the training, and what the guard adds during and after it.

        The guard keeps two copies of the adapter during the training. After it, the round trip loads the base a second
        time, while the trained one and its optimizer still exist.
        """
        copies = 2 * self.trainable_bytes
        moments = 2 * self.trainable_bytes
        after = 2 * self.weights_bytes + copies + moments + self.scratch_bytes
        return max(self.peak_bytes + copies, after)


class Rehearsal:
    """A Trainer with fake weights, which can train with any micro-batch; made by `rehearsal`."""

    def __init__(self, trainer: Trainer, device: HardwareProfile) -> None:
        self.trainer, self.device = trainer, device
        self.rounding = 1 if device.device_type == "cpu" else CUDA_ROUNDING
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._dataset: Any = trainer.train_dataset
        self._made = trainer.optimizer
        self._order: list[int] = []
        _still(trainer)
        _exchange_weights(trainer, self._fakes)

    def predict(self, micro_batch: int, accumulation: int = 1, *, longest: bool = True) -> Prediction:
        """Predict training with `micro_batch` rows at a time: the `longest` of the dataset, or the first drawn.

        Raises PredictionError if the training needs real numbers.
        """
        trainer, arguments = self.trainer, self.trainer.args
        arguments.per_device_train_batch_size = trainer._train_batch_size = micro_batch
        arguments.gradient_accumulation_steps = accumulation = min(accumulation, 2)
        arguments.max_steps = _STEPS
        started = time.perf_counter()
        meter = Meter(self.rounding)
        try:
            batch = self._batch(micro_batch, longest)
            loader = _Loader(batch, accumulation * _STEPS)
            trainer.get_train_dataloader = lambda: loader
            weights = [*trainer.model.parameters(), *trainer.model.buffers()]
            for tensor in [*weights, *_tensors(batch)]:
                meter.add(tensor)
            with self._fakes, meter, self._attention():
                trainer.train()
        # the code under test was not written for fake tensors
        except Exception as error:
            raise PredictionError(
                f"the rehearsal on fake tensors ended in {type(error).__name__}: {first_line(error)}"
            ) from error
        finally:
            self._rewind()
        tokens = tuple(next(iter(_tensors(batch)), torch.empty(0)).shape)
        return Prediction(
            peak_bytes=meter.peak + _overhead_bytes(self.device),
            weights_bytes=_bytes(weights, self.rounding),
            trainable_bytes=_bytes((p for p in trainer.model.parameters() if p.requires_grad), self.rounding),
            scratch_bytes=_scratch(trainer, tokens),
            tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    def _attention(self) -> contextlib.AbstractContextManager[Any]:
        """Compute attention as the device does, or as a recent one if its compute capability is not known."""
        if self.device.device_type != "cuda":
            return contextlib.nullcontext()
        return as_on_cuda(self.device.compute_capability or AMPERE)

    def _batch(self, rows: int, longest: bool) -> Any:
        """One micro-batch from the Trainer's own loader."""
        trainer = self.trainer
        trainer.__dict__.pop("get_train_dataloader", None)
        trainer.train_dataset = self._longest(rows) if longest else self._dataset
        try:
            return next(iter(trainer.get_train_dataloader()))
        finally:
            trainer.train_dataset = self._dataset

    def _longest(self, rows: int) -> Any:
        """The `rows` longest rows, the longest first, repeated if there are too few."""
        if isinstance(self._dataset, torch.utils.data.IterableDataset):
            self._dataset = list(islice(self._dataset, _ROWS_SEARCHED))
        searched = range(min(len(self._dataset), _ROWS_SEARCHED))
        self._order = self._order or sorted(searched, key=lambda i: -_length(self._dataset[i]))
        indices = list(islice(cycle(self._order), rows))
        # a datasets.Dataset must stay one, so that the Trainer selects its columns
        if hasattr(self._dataset, "select"):
            return self._dataset.select(indices)
        return torch.utils.data.Subset(self._dataset, indices)

    def _rewind(self) -> None:
        """Reset the Trainer to before the training, but for accelerate's wrapper of the model, which is permanent."""
        trainer = self.trainer
        trainer.__dict__.pop("get_train_dataloader", None)
        trainer.model.zero_grad()
        trainer.optimizer, trainer.lr_scheduler = self._made, None
        if self._made is not None:
            self._made.state.clear()


@contextlib.contextmanager
def rehearsal(config: RunConfig, device: HardwareProfile) -> Iterator[Rehearsal]:
    """A rehearsal of the Trainer in the precision of `config`, for `device`; leaves nothing behind.

    Raises TargetError if the target breaks its contract, PredictionError if it cannot be built on the CPU.
    """
    # tf32 takes the same bytes as float32
    mode = mode_named("fp32" if config.cell.precision == "tf32" else config.cell.precision)
    if mode.quantisation:
        raise PredictionError("a quantised base has no fake tensors, so that its memory is not predicted")
    arguments = {k: v for k, v in config.training_arguments.items() if k not in ("tf32", "use_cpu")}
    config, target = dataclasses.replace(config, training_arguments=arguments), resolve(config.target)
    with isolated(), tempfile.TemporaryDirectory(prefix="sftguard-") as folder:
        try:
            trainer = build(target, config, mode, "cpu", Path(folder))
        except TargetError:
            raise
        except Exception as error:
            raise PredictionError(f"the target cannot be built on the CPU: {type(error).__name__}: {error}") from error
        yield Rehearsal(trainer, device)


def predict(config: RunConfig, device: HardwareProfile, *, longest: bool = True) -> Prediction:
    """Predict training the cell of `config` on `device`. Raises what `rehearsal` and `Rehearsal.predict` raise."""
    with rehearsal(config, device) as ready:
        cell = config.cell
        return ready.predict(cell.per_device_train_batch_size, cell.gradient_accumulation_steps, longest=longest)


class Forecast:
    """Predictions for many cells, which reuses rehearsals, so that most cells cost nothing."""

    def __init__(self) -> None:
        self._rehearsed: dict[str, tuple[Cell, int]] = {}

    def need(self, config: RunConfig, device: HardwareProfile, enough: float) -> int | None:
        """Bytes that the cell of `config` needs; None if these are at most `enough`, or the cell cannot be rehearsed.

        The memory of b rows consists of constant parts and parts that grow with b, so that it is at most b/a times that
        of a rows, which may have been rehearsed. Accumulation never lowers it.
        """
        cell = config.cell
        key = f"{device.device_type} {dataclasses.replace(config, cell=Cell(cell.precision, 1, 1))!r}"
        if key in self._rehearsed:
            known, need = self._rehearsed[key]
            more = cell.per_device_train_batch_size / known.per_device_train_batch_size
            covered = min(cell.gradient_accumulation_steps, 2) <= known.gradient_accumulation_steps
            if more >= 1 and covered and need * more <= enough:
                return None
        try:
            found = predict(config, device).cell_bytes
        except PredictionError:
            _log.warning("cell %s is trained without knowing whether it fits", config.cell, exc_info=True)
            return None
        self._rehearsed[key] = (cell, found)
        return found


def _overhead_bytes(device: HardwareProfile) -> int:
    """Memory that the device's libraries allocate for themselves, whatever is trained."""
    if device.device_type not in ("cuda", "rocm"):
        return 0
    capability = device.compute_capability
    return 2 * (CUBLAS_WORKSPACE_HOPPER if capability is not None and capability >= (9, 0) else CUBLAS_WORKSPACE)


def free_bytes(device_type: str) -> int | None:
    """Memory that a training can still use on this machine's device of `device_type`; None if it cannot be read."""
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(free + cached)
    if device_type != "cpu":
        return None
    available: int = psutil.virtual_memory().available
    left = _control_group()
    return available if left is None else min(available, left)


def _control_group() -> int | None:
    """Memory that a container's limit leaves, with its page cache; None without a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        # `max` without a limit, which is a ValueError
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cache = next((int(line.split()[1]) for line in statistics if line.startswith("inactive_file ")), 0)
    return max(0, limit - used + cache)


# torch does not type its construction
class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live storages, and keeps the highest sum. Use it within a FakeTensorMode."""

    def __init__(self, rounding: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.live, self.peak = rounding, 0, 0
        self._storages: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` until its end, once for all tensors that share it."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = _rounded(storage.nbytes(), self.rounding)

        def gone(_: object) -> None:
            del self._storages[key]
            self.live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one kernel on fake tensors, or on real ones if it has only small real inputs."""
        kwargs = kwargs or {}
        if any(isinstance(t, FakeTensor) for t in _tensors((args, kwargs))):
            if func is torch.ops.aten._local_scalar_dense.default:
                return _unknown(args[0])
            out = func(*(_as_indices(func, args)), **kwargs)
        else:
            out = self._of_real(func, args, kwargs)
        for tensor in _tensors(out):
            self.add(tensor)
        return out

    def _of_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            fake = func(*args, **kwargs)
        # the result depends on values, which real tensors have
        except Exception:
            fake = None
        if sum(t.numel() * t.element_size() for t in _tensors(fake)) > _REAL_BYTES:
            return fake
        with unset_fake_temporarily():
            return func(*args, **kwargs)


class _Loader:
    """Replaces a DataLoader and repeats one batch."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield dict(self.batch) if isinstance(self.batch, dict) else self.batch


def _still(trainer: Trainer) -> None:
    """Switch off logs, evaluation, saving, and every callback that could print or write."""
    from transformers import DefaultFlowCallback
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    arguments = trainer.args
    arguments.logging_strategy = arguments.eval_strategy = IntervalStrategy.NO
    arguments.save_strategy = SaveStrategy.NO
    for switch in ("eval_on_start", "load_best_model_at_end", "auto_find_batch_size", *_FULL_EVALUATION):
        setattr(arguments, switch, False)
    handler = trainer.callback_handler
    handler.callbacks = [c for c in handler.callbacks if isinstance(c, DefaultFlowCallback)]
    trainer.log = lambda *_, **__: None
    # everything is on its device, and fake weights cannot be moved
    trainer.accelerator.device_placement = False


def _exchange_weights(trainer: Trainer, fakes: FakeTensorMode) -> None:
    """Replace all parameters and buffers with fake tensors; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    # kept so that Python reuses no id
    kept: list[Tensor] = []

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = fakes.from_tensor(tensor)
            kept.append(tensor)
        return made[id(tensor)]

    for module in trainer.model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)
    for group in trainer.optimizer.param_groups if trainer.optimizer is not None else ():
        group["params"] = [made.get(id(p), p) for p in group["params"]]


def _length(row: Any) -> int:
    values = row.values() if isinstance(row, dict) else [row]
    return max((len(v) for v in values if hasattr(v, "__len__")), default=0)


def _scratch(trainer: Trainer, tokens: tuple[int, ...]) -> int:
    """Bytes of the round trip: five times the float32 logits of an evaluation batch, or the digests' integers."""
    elements = max((t.numel() for t in trainer.model.parameters()), default=0)
    head = forwards.embeddings(trainer.model, "output")
    vocabulary = int(getattr(head, "out_features", 0))
    length = max(tokens[-1], 16) if tokens else 0
    return max(5 * 4 * int(trainer.args.eval_batch_size) * length * vocabulary, 4 * 8 * min(elements, 1 << 22))


def _as_indices(func: Any, args: Any) -> Any:
    """Replace real masks that index a fake tensor with indices, whose number is known."""
    if func is not torch.ops.aten.index.Tensor:
        return args
    indices: list[Any] = []
    for index in args[1]:
        if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype is torch.bool:
            with unset_fake_temporarily():
                indices.extend(index.nonzero(as_tuple=True))
        else:
            indices.append(index)
    return (args[0], indices, *args[2:])


def _unknown(tensor: Tensor) -> Any:
    """Stand-in for a number that only a real training has."""
    if tensor.dtype is torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


def _tensors(tree: Any) -> Iterable[Tensor]:
    # a BatchEncoding is a mapping, but not a dict
    plain = dict(tree) if isinstance(tree, Mapping) else tree
    return [t for t in tree_flatten(plain)[0] if isinstance(t, Tensor)]


def _bytes(tensors: Iterable[Tensor], rounding: int) -> int:
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(_rounded(size, rounding) for size in sizes.values())


def _rounded(size: int, rounding: int) -> int:
    return -(-size // rounding) * rounding
