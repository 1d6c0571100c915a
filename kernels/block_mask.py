"""Which key blocks each query block keeps, as bits (the cached form) and as lists (what attention walks).

The list form (counts and ascending indices) is FlexAttention's and FlashAttention-4's: both can check ours.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

#: Key blocks in one word of a bit mask; bit ``j % 32`` of word ``j // 32`` stands for key block j.
BITS = 32


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Kept key blocks as lists.

    Attributes:
        counts: int32 [B, H, Tq], kept key blocks of each query block, at least 1.
        indices: int32 [B, H, Tq, Tk], the kept key blocks, ascending; entries past the count are unspecified.
        block: tokens a block.
    """

    counts: Tensor
    indices: Tensor
    block: int

    def density(self, tokens: int) -> float:
        """Kept query-key token pairs / all pairs, over all heads; reads the device."""
        _, _, query_blocks, key_blocks = self.indices.shape
        rows = block_tokens(tokens, self.block, query_blocks, self.counts.device)
        columns = block_tokens(tokens, self.block, key_blocks, self.counts.device)
        listed = torch.arange(key_blocks, device=self.counts.device) < self.counts.unsqueeze(-1)
        # The tail is unspecified and may hold anything: look up a valid block there, then drop it.
        kept_columns = columns[self.indices.where(listed, 0).long()].where(listed, 0).sum(-1)
        pairs = (kept_columns * rows).sum().item()
        return pairs / (self.counts.shape[0] * self.counts.shape[1] * tokens**2)


def words(key_blocks: int) -> int:
    """W = ceil(Tk / 32), words of a row of bits."""
    return -(-key_blocks // BITS)


def pack_bits(kept: Tensor) -> Tensor:
    """Bool [..., Tk] to bits, int32 [..., W]; bits past Tk are 0."""
    key_blocks = kept.shape[-1]
    padding = words(key_blocks) * BITS - key_blocks
    bits = torch.nn.functional.pad(kept, (0, padding)).unflatten(-1, (-1, BITS))
    weights = torch.ones((), dtype=torch.int64, device=kept.device) << torch.arange(BITS, device=kept.device)
    # Summed in int64, where bit 31 is positive; the conversion wraps it to int32's sign bit.
    return (bits * weights).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, key_blocks: int) -> Tensor:
    """Bits, int32 [..., W], to bool [..., Tk]."""
    shifts = torch.arange(BITS, dtype=torch.int32, device=bits.device)
    # The shift of a negative word copies its sign bit from the left, and "& 1" drops the copies.
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :key_blocks].bool()


def block_tokens(tokens: int, block: int, blocks: int, device: torch.device) -> Tensor:
    """Real tokens of each block, int64 [blocks]: ``block``, and what is left in the last one."""
    return (tokens - block * torch.arange(blocks, device=device)).clamp(0, block)


def token_pairs(bits: Tensor, tokens: int, block: int) -> Tensor:
    """Kept query-key token pairs of a mask; ragged blocks count their real tokens.

    Args:
        bits: int32 [..., Tq, W].
        tokens: N.

    Returns:
        int64 [...].
    """
    blocks = -(-tokens // block)
    sizes = block_tokens(tokens, block, blocks, bits.device)
    kept_columns = (unpack_bits(bits, blocks) * sizes).sum(-1)
    return (kept_columns * sizes).sum(-1)
