"""Inductor's code for an H100 where there is none: a CUDA build of torch, and what its driver would
say. Code is generated, and Triton compiles it to machine code; nothing can be run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

H100 = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
)


def is_possible() -> bool:
    """Whether this torch is a CUDA build, with Triton, on a machine without a GPU."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return torch.version.cuda is not None and not torch.cuda.is_available()


@contextlib.contextmanager
def no_gpu() -> Iterator[dict[str, str]]:
    """Inside, CUDA is said to be there; yields the Triton kernels that Inductor writes, by name."""
    import torch._dynamo.device_interface as interface
    import torch._subclasses.fake_tensor as fake_tensor
    import torch.utils._triton
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_device_interface=lambda: torch.cuda,
    )
    said: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: H100,
        "is_available": lambda: True,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
    }
    of_torch = said | {
        "_exchange_device": lambda device: 0,
        "_get_device_properties": lambda device: H100,
        "_lazy_init": lambda: None,
        "_maybe_exchange_device": lambda device: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: (9, 0),
        "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device="cuda": None,
    }
    of_dynamo = said | {
        "exchange_device": lambda device: 0,
        "get_compute_capability": lambda device=None: 90,
        "get_raw_stream": lambda device: 0,
        "is_triton_capable": lambda device=None: True,
        "maybe_exchange_device": lambda device: 0,
        "raise_if_triton_unavailable": lambda device=None: None,
    }
    kernels: dict[str, str] = {}

    def triton(_: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        kernels[name] = source
        return SimpleNamespace(run=None, name=name)

    with contextlib.ExitStack() as stack:

        def put(where: Any, name: str, value: Any) -> None:
            stack.enter_context(patch.object(where, name, value, create=True))

        for name, value in of_torch.items():
            put(torch.cuda, name, value)
        for name, value in of_dynamo.items():
            put(interface.CudaInterface, name, staticmethod(value))
        # These would run operators on the device.
        put(fake_tensor, "init_gpu_context", lambda device: None)
        for passes in (joint_graph, post_grad):
            put(passes, "lazy_init", lambda *_: None)
        torch.utils._triton.has_triton.cache_clear()
        stack.callback(torch.utils._triton.has_triton.cache_clear)
        put(driver, "_active", target)
        put(triton_helpers, "set_driver_to_gpu", lambda: None)
        put(AsyncCompile, "triton", triton)
        yield kernels


def machine_code(name: str, source: str) -> dict[str, Any]:
    """What Triton makes of a kernel of Inductor's for an H100: "ptx" is text, "cubin" bytes."""
    from torch._inductor import config
    from torch._inductor.codecache import PyCodeCache

    with config.patch(use_static_triton_launcher=False):  # whose kernels keep no text
        kernel = getattr(PyCodeCache.load(source), name)
        compiled = kernel._precompile_config(kernel.configs[0])
    found: dict[str, Any] = compiled.kernel.asm
    return found
