"""Mask bits to index lists, Triton: one program a row; the slot and the dense flag are read on the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_DENSE = tl.constexpr(int(Ctl.DENSE))


@triton.jit
def expand_kernel(mask, ctl, counts, indices, key_blocks, words, BLOCKS: tl.constexpr):
    """Grid (query blocks, B·H). BLOCKS: key blocks rounded up to a power of two, at least 32."""
    rows = tl.num_programs(0)
    heads = tl.num_programs(1)
    row = tl.program_id(1).to(tl.int64) * rows + tl.program_id(0)
    slot = tl.load(ctl + _SLOT).to(tl.int64)
    dense = tl.load(ctl + _DENSE) != 0

    key = tl.arange(0, BLOCKS)
    inside = key < key_blocks
    source = mask + (slot * heads * rows + row) * words
    word = tl.load(source + key // 32, mask=inside, other=0)
    kept = inside & (dense | (((word >> (key % 32)) & 1) != 0))
    position = tl.cumsum(kept.to(tl.int32), 0)
    tl.store(indices + row * key_blocks + position - 1, key, mask=kept)
    tl.store(counts + row, tl.sum(kept.to(tl.int32), 0))


def expand(mask: Tensor, ctl: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Lists of kept key blocks of the slot in ``ctl``; of all key blocks in a dense step.

    Args:
        mask: int32 [S, B, H, Tq, ceil(Tk / 32)], contiguous; ``ctl``: int32 [8]; ``key_blocks``: Tk.

    Returns:
        counts int32 [B, H, Tq] and indices int32 [B, H, Tq, Tk], ascending, the tail unspecified.
    """
    _, batch, heads, rows, words = mask.shape
    counts = torch.empty(batch, heads, rows, dtype=torch.int32, device=mask.device)
    indices = torch.empty(batch, heads, rows, key_blocks, dtype=torch.int32, device=mask.device)
    padded = max(32, triton.next_power_of_2(key_blocks))
    launchable(expand_kernel)[(rows, batch * heads)](
        mask, ctl, counts, indices, key_blocks, words, BLOCKS=padded, num_warps=choose_warps(padded)
    )
    return counts, indices


def choose_warps(padded: int) -> int:
    """Warps for a row of ``padded`` blocks: at most 32 in each thread."""
    return min(8, max(1, padded // 1024))
