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
    # Bit 31 is the sign bit: with its weight negative every sum is an int32, and nothing has to wrap.
    weights = torch.tensor([1 << j for j in range(BITS - 1)] + [-(1 << BITS - 1)], device=kept.device)
    return (bits * weights).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, key_blocks: int) -> Tensor:
    """Bits, int32 [..., W], to bool [..., Tk].

    Arithmetic instead of shifts, which ONNX has for unsigned integers only: bit j is set where the word
    modulo 2^(j+1) is at least 2^j. The remainder is that of floor division, so a negative word counts as
    what it is modulo 2^32.
    """
    half = torch.tensor([1 << j for j in range(BITS)], device=bits.device)
    return (bits.long().unsqueeze(-1) % (2 * half) >= half).flatten(-2)[..., :key_blocks]


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
