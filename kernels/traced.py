"""The two ops on CUDA as a graph can hold them: each kernel a node, to run without Python.

What the CUDA implementations of ``kernels.ops`` launch, but for attention: a graph knows no addresses, which
the host needs for descriptors, and Inductor compiles Triton and not Gluon. Where the live kernel is Hopper's
Gluon one, the graph calls it as an operator of C++ that ``artifacts.native`` built. Elsewhere it is Triton's
kernel, whose programs make their descriptors themselves, in scratch memory. Torch 2.13's AOTInductor gives
each program its own; earlier ones gave all of them together what one needs, so there rows are read through
pointers. Imported without Triton, traced with it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from haste_compile.kernels import ops

_SCRATCH_FOR_ALL = TorchVersion(torch.__version__) >= "2.13"


def refresh_mask_(*args: Tensor, **options: Any) -> None:
    """As ``kernels.ops.refresh_mask_``."""
    ops.refresh_cuda(*args, **options)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    block: int,
    scale: float,
    operator: str | None = None,
) -> Tensor:
    """As ``kernels.ops.block_sparse_attention``, without the logarithms that no rewritten graph reads.

    Args:
        operator: of ``torch.ops.haste_native``, which attends in place of Triton's kernel.
    """
    from haste_compile.kernels.block_mask import BlockMask
    from haste_compile.kernels.block_sparse_attention import kernel as attention
    from haste_compile.kernels.block_sparse_attention.launch import choose_launch
    from haste_compile.kernels.expand_mask import kernel as expand_mask

    counts, indices = expand_mask.expand(mask, ctl, mask.shape[3])
    if operator is not None:
        rows = [x if attention.tma_ready(x) else x.contiguous() for x in (q, k, v)]
        return getattr(torch.ops.haste_native, operator)(*rows, counts, indices, scale)
    launch = choose_launch(
        torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0),
        block=block,
        dim=q.shape[3],
        itemsize=q.element_size(),
        tma_ready=_SCRATCH_FOR_ALL and all(map(attention.tma_ready, (q, k, v))),
    )
    launch = dataclasses.replace(launch, host_descriptors=False)
    lists = BlockMask(counts, indices, block)
    return attention.attend(q, k, v, lists, block=block, scale=scale, launch=launch)[0]
