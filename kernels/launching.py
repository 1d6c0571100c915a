"""How wrappers launch their Triton kernels: at once, or as a node of a graph that is being exported."""

from __future__ import annotations

from typing import Any

import torch
from torch.library import wrap_triton


def launchable(kernel: Any) -> Any:
    """The kernel, to be subscripted with a grid and called; while a graph is exported it is recorded instead.

    Only the "triton" form of an artifact (``haste_compile.artifacts``) traces a wrapper. In live graphs the
    ops are opaque, and their kernels are launched without a detour.
    """
    return wrap_triton(kernel) if torch.compiler.is_exporting() else kernel
