"""Masks from the log-sum-exps of token groups, Triton: one program a query block, no sort, straight to bits.

The groups of a query block are read one by one, normalised, and added to the block's row of scores, which
stays in registers. Of that row the top-p is kept: the bit pattern of a non-negative float32 orders like the
number, so 31 halvings find the smallest kept score; each is one comparison and one sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.block_scores.kernel import group_lses
from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_COLUMNS = tl.constexpr(COUNTER_COLUMNS)
_KEPT = tl.constexpr(int(Counter.KEPT))
_KEPT_SUM = tl.constexpr(int(Counter.KEPT_SUM))


@triton.jit
def score_row(lse, row, rows, groups, PER_BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Scores of one query block, fp32 [BLOCKS], 0 past the last key block.

    lse: of the head, as ``group_lses`` yields it, [groups, rows]. rows: blocks of queries, and of keys.
    """
    key = tl.arange(0, BLOCKS)
    score = tl.zeros([BLOCKS], tl.float32)
    # A ragged last block has fewer groups; every query block has one.
    for group in range(row * PER_BLOCK, tl.minimum((row + 1) * PER_BLOCK, groups)):
        value = tl.load(lse + group * rows + key, mask=key < rows, other=float("-inf"))
        value = tl.exp2(value - tl.max(value, 0))
        score += value / tl.sum(value, 0)
    return score


@triton.jit
def keep_top_p(score, share, words, bits, BLOCKS: tl.constexpr):
    """Bits of the blocks that one row keeps, written to ``bits``; also the same as booleans [BLOCKS].

    score: fp32 [BLOCKS], 0 past the last block. share: top-p of the head. words: words of a row of bits.
    """
    score = tl.where((score > 0) & (score < float("inf")), score, 0.0)
    pattern = score.to(tl.int32, bitcast=True)
    target = share * tl.sum(score, 0)

    low = 0
    high = tl.max(pattern, 0)
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = tl.sum(tl.where(pattern >= middle, score, 0.0), 0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)

    above = pattern > low
    tied = pattern == low
    tie_score = tl.max(tl.where(tied, score, 0.0), 0)
    missing = target - tl.sum(tl.where(above, score, 0.0), 0)
    # A row without mass has ties at 0: one block stands for it. Rounding may ask for no tie at all.
    needed = tl.maximum(tl.ceil(missing / tl.where(tie_score > 0, tie_score, 1.0)), 1.0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= needed))

    WORDS: tl.constexpr = BLOCKS // 32
    word = tl.arange(0, WORDS)
    packed = tl.reshape(kept.to(tl.int32), [WORDS, 32]) << tl.arange(0, 32)[None, :]
    tl.store(bits + word, tl.sum(packed, 1), mask=word < words)
    return kept


@triton.jit
def kept_pairs(kept, row, tokens, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Query-key token pairs of one row of blocks, int64; ragged blocks count their real tokens."""
    real_keys = tl.minimum(tokens - tl.arange(0, BLOCKS) * BLOCK, BLOCK)
    return tl.sum(tl.where(kept, real_keys, 0), 0).to(tl.int64) * tl.minimum(tokens - row * BLOCK, BLOCK)


@triton.jit(do_not_specialize=["first"])
def select_kernel(
    lse, top_p, flags, ctl, mask, counters, first, samples_heads, heads, tokens, words,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, heads of this turn). BLOCKS: key blocks rounded up to a power of two, at least 32.

    lse: as ``group_lses`` yields it; first: flat (b, h) of the turn's first head; samples_heads: B·H.
    """
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    head = (first + tl.program_id(1)).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    groups = tl.cdiv(tokens, STRIDE)
    score = score_row(
        lse + tl.program_id(1).to(tl.int64) * groups * rows, row, rows, groups, PER_BLOCK, BLOCKS
    )
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * samples_heads + head
    bits = mask + (state_head * rows + row) * words
    kept = keep_top_p(score, tl.load(top_p + head % heads), words, bits, BLOCKS)
    pairs = kept_pairs(kept, row, tokens, BLOCK, BLOCKS)
    # Sums of integers do not depend on the order of the rows: the counters stay deterministic.
    tl.atomic_add(counters + state_head * _COLUMNS + _KEPT, pairs, sem="relaxed")
    tl.atomic_add(counters + state_head * _COLUMNS + _KEPT_SUM, pairs, sem="relaxed")


def select_(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    flags: Tensor,
    ctl: Tensor,
    mask: Tensor,
    counters: Tensor,
    *,
    block: int,
    stride: int,
) -> None:
    """Write the masks of the heads that rebuild and add their token pairs to KEPT and KEPT_SUM, in place.

    Args:
        q, k: [B, H, N, D], last stride 1, D a power of two.
        top_p: fp32 [>= H]; ``flags``: int32 [B, H], heads with 0 are left alone.
        ctl: int32 [8]; ``mask``: int32 [S, B, H, T, ceil(T / 32)]; ``counters``: int64 [S, B, H, 8].
        block: tokens a block; ``stride``: tokens a group, a divisor of ``block``.
    """
    batch, heads, tokens, _ = q.shape
    blocks = triton.cdiv(tokens, block)
    padded = max(32, triton.next_power_of_2(blocks))
    for lse, first, present in group_lses(q, k, flags, block=block, stride=stride):
        launchable(select_kernel)[(blocks, present)](
            lse, top_p, flags, ctl, mask, counters, first, batch * heads, heads, tokens, mask.shape[-1],
            STRIDE=stride, PER_BLOCK=block // stride, BLOCK=block, BLOCKS=padded,
            num_warps=choose_warps(padded),
        )  # fmt: skip


def choose_warps(padded: int) -> int:
    """Warps for a row of ``padded`` scores: 32 a thread; up to 1024 one warp, whose sums are shuffles."""
    return min(8, max(1, padded // 1024))
