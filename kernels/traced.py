"""The two ops on CUDA as a graph can hold them: each Triton kernel a node, to run without Python.

What the CUDA implementations of ``kernels.ops`` launch, but for attention: a graph knows no addresses, so
keys and values are read through plain pointers instead of TMA descriptors, which are made of an address at
each call, and nothing is warp-specialised. Imported without Triton, traced with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from haste_compile.kernels import ops


def refresh_mask_(*args: Tensor, **options: Any) -> None:
    """As ``kernels.ops.refresh_mask_``."""
    ops.refresh_cuda(*args, **options)


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, *, block: int, scale: float
) -> Tensor:
    """As ``kernels.ops.block_sparse_attention``, without the logarithms that no rewritten graph reads."""
    from haste_compile.kernels.block_mask import BlockMask
    from haste_compile.kernels.block_sparse_attention import kernel as attention
    from haste_compile.kernels.block_sparse_attention.launch import choose_launch
    from haste_compile.kernels.expand_mask import kernel as expand_mask

    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    launch = choose_launch(
        capability, block=block, dim=q.shape[3], itemsize=q.element_size(), tma_ready=False
    )
    counts, indices = expand_mask.expand(mask, ctl, mask.shape[3])
    lists = BlockMask(counts, indices, block)
    return attention.attend(q, k, v, lists, block=block, scale=scale, launch=launch)[0]
