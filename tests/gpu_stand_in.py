"""A Hopper GPU for Triton's host side, on a machine without one: kernels compile for it, and no launch runs.

To be imported before our kernels, in a process of its own without ``TRITON_INTERPRET``.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

#: Kernels that were launched, by name.
launches: list[str] = []


class _Driver:
    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda name, *_: (object(), name, 0, 0, 1024),
    )

    @staticmethod
    def launcher_cls(source: Any, metadata: Any) -> Any:
        return lambda x, y, z, stream, function, *_: launches.append(function)

    @staticmethod
    def get_current_device() -> int:
        return 0

    @staticmethod
    def get_current_stream(device: int) -> int:
        return 0

    @staticmethod
    def get_current_target() -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


driver.set_active(_Driver())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(multi_processor_count=132)
torch.cuda.device_of = torch.cuda.device = lambda device: contextlib.nullcontext()
