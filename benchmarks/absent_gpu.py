"""What torch.compile makes of a function for a Hopper GPU that need not be there: kernels, compiled and not run.

A build of torch for CPUs alone has all of Inductor and Triton, and no CUDA runtime. Tensors without numbers stand on
the GPU, and what asks the runtime is answered here. It changes torch for good: for a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

ARCHITECTURE = 90
_SHARED_BYTES = 227 << 10
_PROCESSORS = 132
_PROPERTIES = SimpleNamespace(
    name="H100",
    major=9,
    minor=0,
    multi_processor_count=_PROCESSORS,
    warp_size=32,
    regs_per_multiprocessor=1 << 16,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=48 << 10,
    shared_memory_per_block_optin=_SHARED_BYTES,
    total_memory=80 << 30,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class Kernel(NamedTuple):
    """One that a compiled function launches."""

    name: str
    source: str
    compiled: Any
    """Triton's."""


class _Compiled(Exception):  # noqa: N818
    """All kernels are known; nothing is to run."""


class _Driver:
    """Triton's, of the GPU."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {
            "max_shared_mem": _SHARED_BYTES,
            "multiprocessor_count": _PROCESSORS,
            "max_num_regs": 1 << 16,
            "warpSize": 32,
        }
    )

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", ARCHITECTURE, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


class AbsentGpu:
    """Stands where torch and Triton look for a GPU."""

    def __init__(self) -> None:
        assert torch.version.cuda is None, "this build of torch asks a driver"
        self._sources: dict[str, str] = {}
        self._is_available = torch.cuda.is_available
        _answer_for_the_runtime()
        _call_without_the_runtime()
        self._take_what_is_compiled()

    def kernels(self, function: Callable[[], object]) -> list[Kernel]:
        """Return the kernels that ``function`` would launch.

        It calls one compiled function, on tensors that it makes under `FakeTensorMode`.
        """
        torch._dynamo.reset()
        self._sources.clear()
        try:
            function()
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _Compiled):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
        return [Kernel(name, source, _compile(name, source)) for name, source in self._sources.items()]

    def close(self) -> None:
        """Let it be seen that there is none; no more is compiled."""
        torch.cuda.is_available = self._is_available

    def _take_what_is_compiled(self) -> None:
        from torch._inductor import config
        from torch._inductor.async_compile import AsyncCompile
        from torch._inductor.graph import GraphLowering

        config.fx_graph_cache = False
        torch._functorch.config.enable_autograd_cache = False
        generate = GraphLowering.compile_to_module

        def generate_alone(graph: Any) -> None:
            generate(graph)
            raise _Compiled

        def take(compiler: Any, name: str, source: str, device_str: str = "cuda") -> None:
            self._sources[name] = source

        GraphLowering.compile_to_module = generate_alone  # type: ignore[method-assign, assignment]
        AsyncCompile.triton = take  # type: ignore[method-assign, assignment]


def _compile(name: str, source: str) -> Any:
    """Compile Inductor's ``source`` of a kernel as Inductor does."""
    import triton
    from torch._inductor.codecache import PyCodeCache

    tuner = getattr(PyCodeCache.load(source), name)
    meta, launch = tuner.triton_meta, tuner.configs[0]
    names = tuner.fn.arg_names
    constants = {(names.index(key),): value for key, value in {**meta["constants"], **launch.kwargs}.items()}
    signature = {key: meta["signature"].get(key, "constexpr") for key in names}
    return triton.compile(
        triton.compiler.ASTSource(tuner.fn, signature, constants, meta["configs"][0]),
        target=_Driver().get_current_target(),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )


def _answer_for_the_runtime() -> None:
    import torch._inductor.fx_passes.joint_graph as joint_graph
    import torch._inductor.fx_passes.post_grad as post_grad
    from torch._dynamo.device_interface import CudaInterface
    from torch._inductor.runtime import triton_helpers
    from triton.runtime import driver

    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *device: _PROPERTIES,
        "get_device_capability": lambda *device: (9, 0),
        "_lazy_init": lambda: None,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda *device: None,
        "get_rng_state": lambda *device: torch.zeros(1),
        "set_rng_state": lambda *state: None,
    }
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
        for place in (CudaInterface, CudaInterface.Worker):
            if hasattr(place, name):
                setattr(place, name, staticmethod(answer))
    CudaInterface.get_compute_capability = staticmethod(lambda *device: ARCHITECTURE)  # type: ignore[assignment]
    torch.cuda.random.get_rng_state = answers["get_rng_state"]
    torch.cuda.random.set_rng_state = answers["set_rng_state"]
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    # Patterns are learned on tensors of the device
    joint_graph.lazy_init = post_grad.lazy_init = lambda *given: None
    triton_helpers.set_driver_to_gpu = lambda: None
    driver.set_active(_Driver())


def _call_without_the_runtime() -> None:
    """Go round Python's bindings of some methods, which ask the runtime for the current device."""
    aten: Any = torch.ops.aten

    def getitem(states: torch.Tensor, index: Any) -> torch.Tensor:
        chosen: list[torch.Tensor | None] = []
        for part in index if isinstance(index, tuple) else (index,):
            if part is None:
                states = states.unsqueeze(len(chosen))
            elif part is Ellipsis:
                chosen += [None] * (states.dim() - sum(other is not None for other in index) + 1)
                continue
            chosen.append(part if isinstance(part, torch.Tensor) else None)
        return aten.index(states, chosen) if any(part is not None for part in chosen) else states

    def new_empty(states: torch.Tensor, *size: Any, dtype: Any = None, **options: Any) -> torch.Tensor:
        shape = list(size) if isinstance(size[0], int) else list(size[0])
        return aten.new_empty(states, shape, dtype=dtype or states.dtype, device=states.device)

    def new_empty_strided(states: torch.Tensor, size: Any, stride: Any) -> torch.Tensor:
        return aten.new_empty_strided(states, list(size), list(stride), dtype=states.dtype, device=states.device)

    ways = {"__getitem__": getitem, "new_empty": new_empty, "new_empty_strided": new_empty_strided, "copy_": aten.copy_}
    for name, way in ways.items():
        asking = getattr(torch.Tensor, name)

        def call(states: Any, *given: Any, _asking: Any = asking, _way: Any = way, **options: Any) -> Any:
            return (_way if states.device.type == "cuda" else _asking)(states, *given, **options)

        setattr(torch.Tensor, name, call)
