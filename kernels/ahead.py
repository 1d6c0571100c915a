"""Kernels compiled before their first launch, in other processes, by way of Triton's cache on disk.

The process that is going to launch a kernel says what it is specialised on (dtypes, alignments, sizes), in
the text that Triton has for this. Any other one compiles that (``JITFunction.preload``); it needs no GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas_version
from triton.runtime import driver
from triton.runtime.cache import get_cache_manager

from haste_compile.kernels.launching import NotedLaunch

_one_hook = threading.Lock()  # Triton has one for all threads


@dataclasses.dataclass(frozen=True)
class Order:
    """A kernel to be compiled in another process.

    Attributes:
        module, name: of the ``@triton.jit`` function.
        specialization: Triton's own description.
        target: the GPU, as the arguments of Triton's ``GPUTarget``.
        environment: variables that decide how Triton compiles and where it keeps the result.
    """

    module: str
    name: str
    specialization: str
    target: tuple[str, Any, int]
    environment: Mapping[str, str]


class Compilation:
    """A compilation that was put off; a launch that comes before ``load`` makes up for it.

    Attributes:
        order: for another process.
        on_disk: whether Triton's cache has the kernel already.
    """

    def __init__(
        self, order: Order, on_disk: bool, compile: Callable[[], Any], finalize: Callable[[Any], None]
    ) -> None:
        self.order, self.on_disk = order, on_disk
        self._compile, self._finalize = compile, finalize
        self._lock, self._kernel = threading.Lock(), None

    def result(self) -> Any:
        """Triton's record of the kernel, which is compiled here or taken from the cache, once."""
        with self._lock:
            if self._kernel is None:
                self._kernel = self._compile()
                self._finalize(self._kernel)
            return self._kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.result(), name)  # for Triton's launches, from 3.7 on

    def load(self) -> None:
        """Have the kernel on the current device, with the code that launches it."""
        _ = self.result().run


def put_off(launch: NotedLaunch) -> Compilation | None:
    """What the launch asks of the compiler on the current device; None where this process has the kernel."""
    found: list[Compilation] = []
    described: list[str] = []
    target = driver.active.get_current_target()
    function, thread = launch.kernel.fn, threading.get_ident()

    class PuttingOff(triton.AsyncCompileMode):
        def submit(
            self, key: str, compile: Callable[[], Any], finalize: Callable[[Any], None]
        ) -> Compilation:
            order = Order(
                function.__module__,
                function.__name__,
                described[0],
                (target.backend, target.arch, target.warp_size),
                {**_variables(), "TRITON_MOCK_PTX_VERSION": get_ptxas_version(target.arch)},
            )
            found.append(Compilation(order, _on_disk(key, function.__name__), compile, finalize))
            return found[0]

    def describe(**seen: Any) -> bool:
        if threading.get_ident() == thread:
            described.append(seen["compile"]["specialization_data"])
        return bool(others and others(**seen))

    with _one_hook, PuttingOff(None):
        others = knobs.runtime.jit_cache_hook
        knobs.runtime.jit_cache_hook = describe
        try:
            launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        finally:
            knobs.runtime.jit_cache_hook = others
    return found[0] if found else None


def compile_order(order: Order) -> None:
    """Compile it in this process, which has no GPU or leaves it alone, into the cache on disk."""
    before = driver._active  # reset_active() would look for a GPU
    with _environment(order.environment):
        driver.set_active(_Elsewhere(GPUTarget(*order.target)))
        try:
            getattr(importlib.import_module(order.module), order.name).preload(order.specialization)
        finally:
            driver._active = before


def _variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("TRITON_")}


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Have these variables of Triton's and no others, while the context lasts.

    The version of ptxas is part of the name that a kernel has on disk. Triton asks for it once, and Inductor
    changes over to PyTorch's ptxas before that or after; so the process that launches tells what it was told.
    """

    def change(to: Mapping[str, str]) -> None:
        for name in _variables().keys() - to.keys():
            del os.environ[name]
        os.environ.update(to)
        get_ptxas_version.cache_clear()

    before = _variables()
    change(variables)
    try:
        yield
    finally:
        change(before)


def _on_disk(key: str, name: str) -> bool:
    cache = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
    return bool(cache.get_group(f"{name[:150]}.json"))


class _Elsewhere:
    """As much of a driver as a compilation asks for."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0
