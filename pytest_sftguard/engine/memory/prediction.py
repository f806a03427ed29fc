"""Predicting the peak memory of a training without allocating it.

The target's own Trainer is built on the CPU, its weights are replaced by torch's fake tensors, which have a shape and a
type and no memory, and its own `train()` is run for two optimizer steps. Below autograd and autocast, where every
kernel passes, each storage is counted from its making to its end: weights, adapters, what is kept for the backward
pass, logits, casts, gradients and the optimizer's states. The second step is there because Adam's moments, which the
first one makes, then live beside the activations; with accumulation, a second micro-batch meets the first one's
gradients.

Building needs host memory for the weights, once; nothing else is allocated. The batch is small and stays real, and so
does what is computed from it alone: whether a mask can be left out depends on its values.
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

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from pytest_sftguard.engine.building.targets import TargetError, resolve
from pytest_sftguard.engine.building.trainers import build
from pytest_sftguard.engine.machine.profiles import available_host_memory
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
"""Bytes of a cuBLAS workspace, taken from the caching allocator (CUDABlas.cpp), by each of two threads."""

CUBLAS_WORKSPACE_HOPPER = 4096 * 8 * 1024
"""The same from compute capability 9.0 on."""

_STEPS = 2
_REAL_BYTES = 1 << 24
_FULL_EVALUATION = ("bf16_full_eval", "fp16_full_eval")  # with these the Trainer moves the weights again
_ROWS_LOOKED_AT = 10_000


class PredictionError(Exception):
    """A training that cannot be rehearsed on fake tensors; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a training will need."""

    peak_bytes: int
    """Largest sum of live tensors at one moment, each rounded as the allocator does, and what its libraries take."""
    weights_bytes: int
    """All parameters and buffers, the adapter's included."""
    trainable_bytes: int
    """The parameters that train."""
    scratch_bytes: int
    """What the guard's looks at a trained model need beside the weights: digests, and logits of three models."""
    tokens: tuple[int, ...]
    """Shape of the first input of the batch: rows, tokens."""
    seconds: float
    """What the rehearsal took, without the building."""

    @property
    def cell_bytes(self) -> int:
        """What a cell of the matrix needs: the training, and what the guard does beside and after it.

        The guard keeps two copies of the adapter while it trains. Afterwards it loads the base a second time, beside
        the trained one and its optimizer, for the way through a file.
        """
        copies = 2 * self.trainable_bytes
        moments = 2 * self.trainable_bytes
        after = 2 * self.weights_bytes + copies + moments + self.scratch_bytes
        return max(self.peak_bytes + copies, after)


class Rehearsal:
    """A Trainer on fake weights, whose training can be run at any micro-batch; made by `rehearsal`."""

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
        """Peak of training with `micro_batch` rows at a time, the longest of the dataset or else the first drawn.

        Raises PredictionError where the training does something that needs real numbers.
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
        except Exception as error:  # the code under test, on tensors that it was not written for
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
        """Attention as the device computes it; where its compute capability is not known, as a recent one does."""
        if self.device.device_type != "cuda":
            return contextlib.nullcontext()
        return as_on_cuda(self.device.compute_capability or AMPERE)

    def _batch(self, rows: int, longest: bool) -> Any:
        """One micro-batch as the Trainer's own loader makes it."""
        trainer = self.trainer
        trainer.__dict__.pop("get_train_dataloader", None)
        trainer.train_dataset = self._longest(rows) if longest else self._dataset
        try:
            return next(iter(trainer.get_train_dataloader()))
        finally:
            trainer.train_dataset = self._dataset

    def _longest(self, rows: int) -> Any:
        """The `rows` longest rows, from the longest on, taken again where there are too few."""
        if isinstance(self._dataset, torch.utils.data.IterableDataset):
            self._dataset = list(islice(self._dataset, _ROWS_LOOKED_AT))
        looked_at = range(min(len(self._dataset), _ROWS_LOOKED_AT))
        self._order = self._order or sorted(looked_at, key=lambda i: -_length(self._dataset[i]))
        places = list(islice(cycle(self._order), rows))
        if hasattr(self._dataset, "select"):  # so that a datasets.Dataset stays one, and its columns are chosen
            return self._dataset.select(places)
        return torch.utils.data.Subset(self._dataset, places)

    def _rewind(self) -> None:
        """As before the training, but for accelerate's wrapping of the model, which it does once."""
        trainer = self.trainer
        trainer.__dict__.pop("get_train_dataloader", None)
        trainer.model.zero_grad()
        trainer.optimizer, trainer.lr_scheduler = self._made, None
        if self._made is not None:
            self._made.state.clear()


@contextlib.contextmanager
def rehearsal(config: RunConfig, device: HardwareProfile) -> Iterator[Rehearsal]:
    """The Trainer of `config`'s precision, ready to be rehearsed for `device`; nothing is left behind.

    Raises TargetError where the target breaks its contract, PredictionError where it cannot be built on the CPU.
    """
    mode = mode_named("fp32" if config.cell.precision == "tf32" else config.cell.precision)  # the same bytes
    arguments = {k: v for k, v in config.training_arguments.items() if k not in ("tf32", "use_cpu")}
    target = resolve(config.target)
    with isolated(), tempfile.TemporaryDirectory(prefix="sftguard-") as folder:
        try:
            trainer = build(
                target, dataclasses.replace(config, training_arguments=arguments), mode, "cpu", Path(folder)
            )
        except TargetError:
            raise
        except Exception as error:
            raise PredictionError(f"the target cannot be built on the CPU: {type(error).__name__}: {error}") from error
        yield Rehearsal(trainer, device)


def predict(config: RunConfig, device: HardwareProfile, *, longest: bool = True) -> Prediction:
    """Peak of training the cell of `config` on `device`; raises what `rehearsal` and `predict` raise."""
    with rehearsal(config, device) as ready:
        cell = config.cell
        return ready.predict(cell.per_device_train_batch_size, cell.gradient_accumulation_steps, longest=longest)


class Forecast:
    """Says of one cell after the other whether it will fit, and remembers, so that most cost nothing."""

    def __init__(self) -> None:
        self._rehearsed: dict[str, tuple[Cell, int]] = {}

    def need(self, config: RunConfig, device: HardwareProfile, enough: float) -> int | None:
        """What the cell of `config` needs; None where it needs less than `enough` for sure, or cannot be rehearsed.

        For sure: memory at b rows is made of parts that are constant and parts that grow with b, so that it is at most
        b/a times that at a rows, which may have been rehearsed already; and accumulation never takes any away.
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
    """What the device's libraries take from the allocator for themselves, whatever is trained."""
    if device.device_type not in ("cuda", "rocm"):
        return 0
    capability = device.compute_capability
    return 2 * (CUBLAS_WORKSPACE_HOPPER if capability is not None and capability >= (9, 0) else CUBLAS_WORKSPACE)


def free_bytes(device_type: str) -> int | None:
    """Memory that a training can still have on this machine's device of `device_type`; None where it cannot be read."""
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(free + cached)
    if device_type != "cpu":
        return None
    sizes = [size for size in (available_host_memory(), _control_group()) if size is not None]
    return min(sizes, default=None)


def _control_group() -> int | None:
    """Memory that a container's limit leaves, its page cache counted as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))  # `max` where there is none
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        statistics = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    cache = next((int(line.split()[1]) for line in statistics if line.startswith("inactive_file ")), 0)
    return max(0, limit - used + cache)


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch does not type its construction
    """Counts the bytes of all storages that are alive, and keeps the highest sum. Goes inside a FakeTensorMode."""

    def __init__(self, rounding: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounding, self.live, self.peak = rounding, 0, 0
        self._storages: dict[int, Any] = {}

    def add(self, tensor: Tensor) -> None:
        """Count the storage of `tensor` from now to its end; once, however many tensors share it."""
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
        """Run one kernel on fake tensors, or for real where it has only small real ones."""
        kwargs = kwargs or {}
        if any(isinstance(t, FakeTensor) for t in _tensors((args, kwargs))):
            if func is torch.ops.aten._local_scalar_dense.default:
                return _unknown(args[0])
            out = func(*(_as_places(func, args)), **kwargs)
        else:
            out = self._of_real(func, args, kwargs)
        for tensor in _tensors(out):
            self.add(tensor)
        return out

    def _of_real(self, func: Any, args: Any, kwargs: Any) -> Any:
        try:
            fake = func(*args, **kwargs)
        except Exception:  # it depends on values, which are there
            fake = None
        if sum(t.numel() * t.element_size() for t in _tensors(fake)) > _REAL_BYTES:
            return fake
        with unset_fake_temporarily():
            return func(*args, **kwargs)


class _Loader:
    """Gives one batch again and again, in place of a DataLoader."""

    def __init__(self, batch: Any, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.times):
            yield dict(self.batch) if isinstance(self.batch, dict) else self.batch


def _still(trainer: Trainer) -> None:
    """Keep the rehearsal to itself: no logs, no evaluation, no saving, no callback that could print or write."""
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
    trainer.accelerator.device_placement = False  # all is where it should be, and fake weights cannot be moved


def _exchange_weights(trainer: Trainer, fakes: FakeTensorMode) -> None:
    """Put fake tensors in the place of all parameters and buffers; tied ones stay tied."""
    made: dict[int, Tensor] = {}
    kept: list[Tensor] = []  # so that no id is used twice

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
    """Of the round trip: float32 logits of one evaluation batch, three times and two differences, or 64-bit digests."""
    elements = max((t.numel() for t in trainer.model.parameters()), default=0)
    head = trainer.model.get_output_embeddings() if hasattr(trainer.model, "get_output_embeddings") else None
    vocabulary = int(getattr(head, "out_features", 0))
    length = max(tokens[-1], 16) if tokens else 0
    return max(5 * 4 * int(trainer.args.eval_batch_size) * length * vocabulary, 4 * 8 * min(elements, 1 << 22))


def _as_places(func: Any, args: Any) -> Any:
    """Where a fake tensor is indexed with real masks: the same index as places, whose number is known."""
    if func is not torch.ops.aten.index.Tensor:
        return args
    places: list[Any] = []
    for index in args[1]:
        if isinstance(index, Tensor) and not isinstance(index, FakeTensor) and index.dtype is torch.bool:
            with unset_fake_temporarily():
                places.extend(index.nonzero(as_tuple=True))
        else:
            places.append(index)
    return (args[0], places, *args[2:])


def _unknown(tensor: Tensor) -> Any:
    """What a number is taken to be that only a real training would have."""
    if tensor.dtype is torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


def _tensors(tree: Any) -> Iterable[Tensor]:
    plain = dict(tree) if isinstance(tree, Mapping) else tree  # a BatchEncoding is a mapping, and no dict
    return [t for t in tree_flatten(plain)[0] if isinstance(t, Tensor)]


def _bytes(tensors: Iterable[Tensor], rounding: int) -> int:
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(_rounded(size, rounding) for size in sizes.values())


def _rounded(size: int, rounding: int) -> int:
    return -(-size // rounding) * rounding
