"""The machine that a GPU benchmark needs."""

from __future__ import annotations

import torch

from haste_compile.errors import DeviceError


def need_gpu(where: str) -> None:
    """Raise DeviceError where there is none."""
    if not torch.cuda.is_available():
        raise DeviceError(
            found="no CUDA device",
            wanted="one NVIDIA GPU",
            where=where,
            fix="Run it on a machine with a GPU; on the CPU the tests cover what they can of it.",
        )
