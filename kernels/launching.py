"""What a wrapper's launch does: it runs its Triton kernel, becomes a node of a graph, or is only noted.

A wrapper subscripts ``launchable(kernel)`` with a grid and calls the result. In live graphs that is the
kernel itself. While a graph is exported (the "triton" form of an artifact, ``haste_compile.artifacts``) the
launch is recorded. Under ``noted_launches`` nothing runs, and who reads the list can compile ahead.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import wrap_triton

#: Implementations on CUDA by op: ``torch.ops.haste.refresh_mask_.default``, ...
ON_CUDA: dict[Any, Callable[..., Any]] = {}


@dataclasses.dataclass(frozen=True)
class NotedLaunch:
    """A launch that did not take place."""

    kernel: Any
    grid: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


_noted: contextvars.ContextVar[list[NotedLaunch] | None] = contextvars.ContextVar("noted", default=None)


@contextlib.contextmanager
def noted_launches() -> Iterator[list[NotedLaunch]]:
    """Within the context, wrappers of this thread launch nothing; what they would have launched is listed.

    For wrappers called with fake tensors, under their mode.
    """
    found: list[NotedLaunch] = []
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def implement_on_cuda(op: str, function: Callable[..., Any]) -> None:
    """Register an op's implementation on CUDA; ``op``: "haste::refresh_mask_", ..."""
    torch.library.impl(op, "cuda", function)
    namespace, name = op.split("::")
    ON_CUDA[getattr(getattr(torch.ops, namespace), name).default] = function


def launchable(kernel: Any) -> Any:
    """The kernel, to be subscripted with a grid and called."""
    found = _noted.get()
    if found is not None:
        return _Noting(kernel, found)
    return wrap_triton(kernel) if torch.compiler.is_exporting() else kernel


def address(x: Tensor) -> int:
    """Of the first element. A tensor without memory counts from 0."""
    return x.storage_offset() * x.element_size() if _is_fake(x) else x.data_ptr()


def described(x: Any) -> Any:
    """A tensor as an argument or a descriptor's base; for one without memory Triton's stand-in, aligned."""
    if not _is_fake(x):
        return x
    from triton.runtime.jit import MockTensor

    return MockTensor(x.dtype, list(x.shape))


class _Noting:
    def __init__(self, kernel: Any, found: list[NotedLaunch]) -> None:
        self._kernel, self._found = kernel, found

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def note(*args: Any, **options: Any) -> None:
            outlines = tuple(map(described, args))
            self._found.append(NotedLaunch(self._kernel, grid, outlines, options))

        return note


def _is_fake(x: Any) -> bool:
    return isinstance(x, FakeTensor) or (isinstance(x, Tensor) and x.is_meta)
