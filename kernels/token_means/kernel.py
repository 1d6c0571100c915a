"""Token means of q and k, Triton: one pass over both tensors at memory bandwidth, then a small reduction.

Two stages with a fixed order of summation and no atomics, so that equal inputs give equal bits: the drift
decision of a repeated run must not change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable

#: Tokens that one program sums. 148 programs a head at 75,600 tokens: enough to fill any GPU.
CHUNK = 512


@triton.jit
def _sum_chunk(
    x, batch, head, start, stride_b, stride_h, stride_n, tokens,
    D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    base = x + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    total = tl.zeros([TILE, D], tl.float32)
    for offset in range(0, CHUNK, TILE):
        rows = start + offset + tl.arange(0, TILE)
        pointers = base + rows.to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]
        total += tl.load(pointers, mask=rows[:, None] < tokens, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def chunk_sums_kernel(
    q, k, sums,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    tokens,
    D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (H, chunks, 2B): the heads of one token lie side by side in memory, so they run side by side."""
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    batch = tl.program_id(2) // 2
    of_keys = tl.program_id(2) % 2
    start = chunk * CHUNK
    if of_keys == 0:
        total = _sum_chunk(q, batch, head, start, stride_qb, stride_qh, stride_qn, tokens, D, CHUNK, TILE)
    else:
        total = _sum_chunk(k, batch, head, start, stride_kb, stride_kh, stride_kn, tokens, D, CHUNK, TILE)
    row = (of_keys * (tl.num_programs(2) // 2) + batch) * tl.num_programs(0) + head
    tl.store(sums + (row.to(tl.int64) * tl.num_programs(1) + chunk) * D + tl.arange(0, D), total)


@triton.jit
def combine_kernel(sums, means, chunks, tokens, D: tl.constexpr, TILE: tl.constexpr):
    """Grid (2·B·H,): the mean of one head from the sums of its chunks."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, D)
    total = tl.zeros([TILE, D], tl.float32)
    for start in range(0, chunks, TILE):
        chunk = start + tl.arange(0, TILE)
        pointers = sums + (row * chunks + chunk)[:, None] * D + columns[None, :]
        total += tl.load(pointers, mask=chunk[:, None] < chunks, other=0.0)
    tl.store(means + row * D + columns, tl.sum(total, 0) / tokens)


def token_means(q: Tensor, k: Tensor) -> Tensor:
    """Means over the tokens of q and k.

    Args:
        q, k: [B, H, N, D], last stride 1, D a power of two.

    Returns:
        fp32 [2, B, H, D]: means of q, then of k.
    """
    batch, heads, tokens, dim = q.shape
    chunks = triton.cdiv(tokens, CHUNK)
    sums = torch.empty(2, batch, heads, chunks, dim, dtype=torch.float32, device=q.device)
    means = torch.empty(2, batch, heads, dim, dtype=torch.float32, device=q.device)
    launchable(chunk_sums_kernel)[(heads, chunks, 2 * batch)](
        q, k, sums, *q.stride()[:3], *k.stride()[:3], tokens, D=dim, CHUNK=CHUNK, TILE=16, num_warps=4
    )
    launchable(combine_kernel)[(2 * batch * heads,)](sums, means, chunks, tokens, D=dim, TILE=32, num_warps=4)
    return means
