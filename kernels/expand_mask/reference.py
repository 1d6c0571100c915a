"""Specification of the expansion of mask bits to index lists."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import BlockMask, unpack_bits


def expand_mask(bits: Tensor, key_blocks: int, *, block: int) -> BlockMask:
    """List the kept key blocks of every query block, ascending, in the form of FlexAttention's ``BlockMask``.

    Args:
        bits: int32 [B, H, Tq, ceil(Tk / 32)]; ``key_blocks``: Tk; ``block``: tokens a block.

    Returns:
        counts int32 [B, H, Tq] and indices int32 [B, H, Tq, Tk]; the tail of a list is unspecified (here it
        holds the dropped blocks).
    """
    kept = unpack_bits(bits, key_blocks)
    rank = torch.where(kept, kept.cumsum(-1), kept.sum(-1, keepdim=True) + (~kept).cumsum(-1)) - 1
    blocks = torch.arange(key_blocks, device=bits.device, dtype=torch.int32).expand(kept.shape)
    indices = torch.empty_like(blocks, memory_format=torch.contiguous_format).scatter(-1, rank, blocks)
    return BlockMask(counts=kept.sum(-1, dtype=torch.int32), indices=indices, block=block)
