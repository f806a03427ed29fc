"""simulated_hardware: torch answers for a device that is not there, to test code that depends on the hardware.

Only the lowest-level queries are replaced. torch's own code derives the rest from them, so that its quirks stay (a T4
that "supports" bfloat16). Functions that other modules have imported are replaced there as well, and the caches of
transformers and accelerate are cleared at the beginning and at the end.
"""

from __future__ import annotations

import contextlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from pytest_sftguard.hardware import HardwareProfile, device_named

CUDA_VERSION = "12.8"
"""`torch.version.cuda` of a simulated NVIDIA device: the first version that supports every known device."""
HIP_VERSION = "6.4.43482"
"""`torch.version.hip` of a simulated AMD device."""
XPU_VERSION = "20250101"
"""`torch.version.xpu` of a simulated Intel device."""
MACOS = (15, 0)
"""macOS of a simulated Apple device."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_FLAGS_IN = ("transformers", "accelerate", "peft")
_CACHES = (
    "torch",
    "torch.accelerator",
    "torch.utils._triton",
    "transformers.utils.import_utils",
    "accelerate.utils.imports",
    "accelerate.utils.environment",
    "peft.import_utils",
)
_DEVICE_WORDS = re.compile(
    r"device|capability|torch_\w+_available|cuda|rocm|xpu|mps|mlu|npu|gpu|tf32|fp8|triton|grouped_mm|flash_attn"
)
_FLAG = re.compile(r"_?(is_torch_\w+_available)")
_ACCELERATOR = re.compile(r"(cuda|hip|xpu|mps)(:\d+)?")


class SimulatedDeviceError(RuntimeError):
    """An attempt to compute or allocate on a device that is only simulated."""


class SimulatedQueryError(RuntimeError):
    """The error of a query that fails according to the simulated profile."""


@contextlib.contextmanager
def simulated_hardware(profile: HardwareProfile | str) -> Iterator[HardwareProfile]:
    """Make torch, transformers and accelerate answer for `profile`, or for the known device with this name.

    Queries in `profile.unanswered` raise SimulatedQueryError. Allocating or computing on any accelerator raises
    SimulatedDeviceError, except with fake tensors. Simulations nest; the inner one answers. At the end every replaced
    object is back, also after an exception. The answers hold for the whole process, the guard against computing on an
    MPS device for the thread. Raises ValueError for a profile without values that every driver reports.
    """
    known = device_named(profile) if isinstance(profile, str) else profile
    machine = _Machine(known)
    loaded = set(sys.modules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_accelerate_forgets())
        stack.callback(_forget_caches)
        undo: list[tuple[Any, str, Any]] = []
        fakes: dict[int, Any] = {}
        stack.callback(_restore, undo, fakes, loaded)
        imported = _scan()
        for owner, name, answer in machine.answers():
            _replace(owner, name, answer, imported, undo, fakes)
        _forget_caches()
        _set_flags(imported, undo)
        stack.enter_context(_NothingReal(known))
        yield known


class _Imported(NamedTuple):
    """What other modules have imported or derived from torch's functions."""

    aliases: dict[int, list[tuple[Any, str]]]
    """Modules and names that refer to a function, by its id."""
    flags: list[tuple[Any, str]]
    """Modules and names of constants that are results of a function."""


class _Properties(types.SimpleNamespace):
    """Result of `get_device_properties`: the properties that a profile has."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the simulated properties (simulated_hardware) have no {name!r}, only {self}")


class _Machine:
    """The answers to torch's queries."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self.current = 0
        device_type = profile.device_type
        required = {"cpu": (), "cuda": ("total_memory_bytes", "capability")}.get(device_type, ("total_memory_bytes",))
        absent = [name for name in required if getattr(profile, name) is None]
        if absent and profile.failure_of("get_device_properties") is None:
            raise ValueError(f"{profile.name} cannot be simulated: its profile has no {absent[0]}")

    def answers(self) -> Iterator[tuple[Any, str, Any]]:
        """Every attribute to replace: its owner, its name, its new value."""
        device_type, nothing = self.profile.device_type, _Machine.__new__(_Machine)
        nothing.profile, nothing.current = HardwareProfile(device_type="cpu", name=self.profile.name), 0
        cuda = self if device_type in ("cuda", "rocm") else nothing
        xpu = self if device_type == "xpu" else nothing
        mps = self if device_type == "mps" else nothing
        yield from cuda._module(torch.cuda)
        yield torch.cuda, "_check_bf16_tensor_supported", lambda device: True
        yield torch.backends.cuda, "is_built", lambda: cuda is self
        yield from xpu._module(torch.xpu)
        yield from mps._metal()
        for name, owner in (("cuda", "cuda"), ("hip", "rocm"), ("rocm", "rocm"), ("xpu", "xpu")):
            version = {"cuda": CUDA_VERSION, "rocm": HIP_VERSION, "xpu": XPU_VERSION}[owner]
            yield torch.version, name, version if device_type == owner else None
        yield from self._accelerator()
        # it would allocate on the device to initialise it
        if "torch._subclasses.fake_tensor" in sys.modules:
            yield sys.modules["torch._subclasses.fake_tensor"], "init_gpu_context", lambda device=None: None

    def _module(self, module: Any) -> Iterator[tuple[Any, str, Any]]:
        """Attributes of `torch.cuda` or `torch.xpu`."""
        there = self.profile.device_type != "cpu"
        queries: dict[str, Callable[..., Any]] = {
            "is_available": lambda: there,
            "device_count": lambda: self.profile.count if there else 0,
            "get_device_properties": lambda device=None: self._properties(device, module),
            "mem_get_info": lambda device=None: self._memory(device, module),
        }
        for name in ("get_device_capability", "is_bf16_supported"):
            if self.profile.failure_of(name):
                queries[name] = getattr(module, name)
            elif name == "get_device_capability" and module is torch.xpu:
                queries[name] = lambda device=None: vars(self._properties(device, module))
        for name, query in queries.items():
            yield module, name, self._failing(name, query)
        yield module, "_is_compiled", lambda: there
        yield module, "is_initialized", lambda: False
        yield module, "_lazy_init", lambda: self._refuse(module.__name__)
        yield module, "current_device", self._current_device
        yield module, "set_device", lambda device: self._set_device(device, module)
        yield module, "_exchange_device", self._exchange_device
        yield module, "_maybe_exchange_device", self._exchange_device
        yield module, "get_arch_list", self._architectures

    def _metal(self) -> Iterator[tuple[Any, str, Any]]:
        there = self.profile.device_type == "mps"
        yield torch.backends.mps, "is_available", self._failing("is_available", lambda: there)
        yield torch.backends.mps, "is_built", lambda: there
        yield torch.backends.mps, "is_macos_or_newer", lambda major, minor: there and (major, minor) <= MACOS
        yield torch.backends.mps, "is_macos13_or_newer", lambda minor=0: there
        yield torch.backends.mps, "get_name", lambda: self.profile.name
        yield torch.mps, "device_count", self._failing("device_count", lambda: int(there))
        yield torch.mps, "recommended_max_memory", self._failing("mem_get_info", lambda: self._memory(None)[1])
        held = self._failing("mem_get_info", lambda: max(0, self._memory(None)[1] - self._memory(None)[0]))
        yield torch.mps, "driver_allocated_memory", held
        yield torch.mps, "current_allocated_memory", lambda: 0

    def _accelerator(self) -> Iterator[tuple[Any, str, Any]]:
        """The functions of torch._C that `torch.accelerator` calls."""
        device_type = "cuda" if self.profile.device_type == "rocm" else self.profile.device_type
        device = None if device_type == "cpu" else torch.device(device_type)
        module: Any = {"cuda": torch.cuda, "xpu": torch.xpu}.get(device_type)
        yield torch._C, "_accelerator_getAccelerator", lambda: device
        yield torch._C, "_get_accelerator", lambda check=None: device or torch.device("cpu")
        yield torch._C, "_accelerator_getDeviceIndex", lambda: self._current_device()
        yield torch._C, "_accelerator_setDeviceIndex", lambda index: self._set_device(index, module)
        memory = self._failing("mem_get_info", lambda index=None: self._memory(index, module))
        yield torch._C, "_accelerator_getMemoryInfo", memory
        dtypes = self._failing("is_bf16_supported", lambda index=None: {"supported_dtypes": set(_DTYPES)})
        yield torch._C, "_accelerator_getDeviceCapability", dtypes

    def _failing(self, query: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        failure = self.profile.failure_of(query)
        if failure is None or self.profile.device_type == "cpu":
            return answer

        def fail(*args: Any, **kwargs: Any) -> Any:
            raise SimulatedQueryError(failure.message)

        return fail

    def _index(self, device: Any, module: Any = None) -> int:
        if self.profile.device_type == "cpu":
            raise _refusal(self.profile, "a query")
        index = self.current if module is None else module._utils._get_device_index(device, optional=True)
        if not 0 <= index < self.profile.count:
            raise AssertionError("Invalid device id")
        return int(index)

    def _properties(self, device: Any, module: Any) -> _Properties:
        self._index(device, module)
        profile = self.profile
        common = {"name": profile.name, "total_memory": profile.total_memory_bytes}
        if profile.device_type == "xpu":
            bfloat16 = "bfloat16" not in profile.emulated
            has = {"has_bfloat16_conversions": bfloat16, "has_subgroup_matrix_multiply_accumulate": bfloat16}
            return _Properties(**common, type="gpu", has_fp16=True, **has)
        if profile.architecture is not None:
            digits = profile.architecture.removeprefix("gfx")
            major, minor = int(digits[:-2] or 0), int(digits[-2], 16)
        else:
            major, minor = profile.compute_capability or (0, 0)
        return _Properties(**common, major=major, minor=minor, gcnArchName=profile.architecture or profile.name)

    def _memory(self, device: Any, module: Any = None) -> tuple[int, int]:
        self._index(device, module)
        total = self.profile.total_memory_bytes or 0
        free = self.profile.free_memory_bytes
        return (total if free is None else free), total

    def _current_device(self) -> int:
        return self._index(None)

    def _set_device(self, device: Any, module: Any) -> None:
        if isinstance(device, int) and device < 0:
            return
        self.current = self._index(device, module)

    def _exchange_device(self, device: int) -> int:
        before = self.current
        if device >= 0:
            self.current = device
        return before

    def _architectures(self) -> list[str]:
        if self.profile.architecture is not None:
            return [self.profile.architecture]
        capability = self.profile.compute_capability
        return [] if capability is None else [f"sm_{capability[0]}{capability[1]}"]

    def _refuse(self, what: str) -> Any:
        raise _refusal(self.profile, what)


def _refusal(profile: HardwareProfile, what: str) -> SimulatedDeviceError:
    if profile.device_type == "cpu":
        there = f"the machine is simulated (simulated_hardware: {profile.name}) and has no such device"
    else:
        there = f"{profile.name} is simulated (simulated_hardware): it answers questions and computes nothing"
    return SimulatedDeviceError(f"{what} would use an accelerator, but {there}")


class _NothingReal(TorchFunctionMode):
    """Refuses calls that would allocate on an accelerator, before torch tries; fake tensors pass."""

    def __init__(self, profile: HardwareProfile) -> None:
        super().__init__()
        self.profile = profile

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the arguments and the result."""
        kwargs = kwargs or {}
        if func is torch.device or _fake_mode():
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        number = name == "to" and len(args) > 1 and type(args[1]) is int
        if number or name in ("cuda", "xpu", "mps", "pin_memory") or _named(*args, kwargs.get("device")):
            raise _refusal(self.profile, name)
        if type(kwargs.get("device")) is int or kwargs.get("pin_memory"):
            raise _refusal(self.profile, name)
        result = func(*args, **kwargs)
        if type(result) is torch.Tensor and result.device.type not in ("cpu", "meta"):
            raise _refusal(self.profile, name)
        return result


def _named(*arguments: Any) -> bool:
    for argument in arguments:
        if isinstance(argument, torch.device) and argument.type not in ("cpu", "meta"):
            return True
        if isinstance(argument, str) and _ACCELERATOR.fullmatch(argument):
            return True
    return False


def _fake_mode() -> bool:
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _replace(
    owner: Any, name: str, value: Any, imported: _Imported, undo: list[tuple[Any, str, Any]], fakes: dict[int, Any]
) -> None:
    """Replace `owner.name`, and the same function in every module that has imported it; absent names stay absent."""
    if name not in vars(owner):
        return
    original = vars(owner)[name]
    undo.append((owner, name, original))
    setattr(owner, name, value)
    if not callable(original):
        return
    fakes[id(value)] = (value, original)
    for module, alias in imported.aliases.get(id(original), ()):
        if vars(module).get(alias) is original:
            undo.append((module, alias, original))
            setattr(module, alias, value)


def _restore(undo: list[tuple[Any, str, Any]], fakes: dict[int, Any], loaded: set[str]) -> None:
    for owner, name, value in reversed(undo):
        setattr(owner, name, value)
    new = [m for n, m in list(sys.modules.items()) if n not in loaded and isinstance(m, types.ModuleType)]
    for module in new:
        # a module that was imported within the simulation may refer to simulated functions
        for name, value in list(vars(module).items()):
            if id(value) in fakes:
                setattr(module, name, fakes[id(value)][1])
    _forget_caches()
    if new:
        for module, name, function in _flags(_scan()):
            if module in new:
                setattr(module, name, function())


def _set_flags(imported: _Imported, undo: list[tuple[Any, str, Any]]) -> None:
    """Set the constants that transformers' modules computed from a query when they were imported."""
    for module, name, function in _flags(imported):
        undo.append((module, name, vars(module)[name]))
        with contextlib.suppress(SimulatedQueryError):
            setattr(module, name, function())


_scanned: tuple[tuple[frozenset[str], int], _Imported] | None = None


def _scan() -> _Imported:
    """Modules that have imported torch's functions, or have constants of transformers; cached until the next import."""
    global _scanned
    # within another simulation the functions are its own
    key = frozenset(sys.modules), id(torch.cuda.is_available)
    if _scanned is not None and _scanned[0] == key:
        return _scanned[1]
    wanted = {
        id(value)
        for owner in (torch.cuda, torch.cuda.memory, torch.xpu, torch.xpu.memory, torch.mps, torch.backends.mps)
        for value in vars(owner).values()
        if callable(value) and not isinstance(value, type)
    }
    imported = _Imported({}, [])
    for module in [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]:
        ours = module.__name__.partition(".")[0] in _FLAGS_IN
        for name, value in list(vars(module).items()):
            if id(value) in wanted:
                imported.aliases.setdefault(id(value), []).append((module, name))
            elif ours and type(value) is bool and _FLAG.fullmatch(name):
                imported.flags.append((module, name))
    _scanned = key, imported
    return imported


def _flags(imported: _Imported) -> list[tuple[Any, str, Callable[[], bool]]]:
    source = sys.modules.get("transformers.utils.import_utils")
    found = [(m, n, getattr(source, n.lstrip("_"), None)) for m, n in imported.flags]
    return [(m, n, f) for m, n, f in found if f is not None]


def _forget_caches() -> None:
    """Clear the caches of transformers, accelerate and torch about the device."""
    for name in _CACHES:
        module = sys.modules.get(name)
        for attribute, value in list(vars(module).items()) if module else ():
            if hasattr(value, "cache_clear") and _DEVICE_WORDS.search(attribute):
                value.cache_clear()


@contextlib.contextmanager
def _accelerate_forgets() -> Iterator[None]:
    """Set accelerate's process-wide states aside, which refer to the first device that it found."""
    before = {name: dict(state) for name, state in _accelerate_states().items()}
    for state in _accelerate_states().values():
        state.clear()
    try:
        yield
    finally:
        for name, state in _accelerate_states().items():
            state.clear()
            state.update(before.get(name, {}))


def _accelerate_states() -> dict[str, dict[str, Any]]:
    """The process-wide states of accelerate by class name; none before it is imported."""
    module = sys.modules.get("accelerate.state")
    names = ("PartialState", "AcceleratorState", "GradientState") if module else ()
    return {name: getattr(module, name)._shared_state for name in names}
