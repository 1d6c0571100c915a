"""The kernels of the live ops in the form that TensorRT launches: inputs, then scalars, then outputs.

Two things differ from the live launches. State is not updated in place: a kernel that changes a part of it
first copies what it was given into its output, so that the caller can keep two copies and swap them. And
tensors are contiguous, as TensorRT hands them over, so that strides follow from the shapes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from haste_compile.kernels.block_scores.kernel import group_lse_kernel
from haste_compile.kernels.block_sparse_attention.kernel import block_sparse_attention_kernel
from haste_compile.kernels.drift_gate.kernel import decide_kernel
from haste_compile.kernels.expand_mask.kernel import expand_kernel
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl
from haste_compile.kernels.token_means.kernel import chunk_sums_kernel, combine_kernel
from haste_compile.kernels.top_p_select.kernel import keep_top_p, kept_pairs, score_row

_SLOT = tl.constexpr(int(Ctl.SLOT))
_COLUMNS = tl.constexpr(COUNTER_COLUMNS)
_KEPT = tl.constexpr(int(Counter.KEPT))
_KEPT_SUM = tl.constexpr(int(Counter.KEPT_SUM))


@triton.jit
def token_sums(q, k, tokens, sums, D: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr):
    """Grid (H, chunks, 2B)."""
    of_head = tokens * D
    of_sample = tl.num_programs(0) * of_head
    chunk_sums_kernel(
        q, k, sums, of_sample, of_head, D, of_sample, of_head, D, tokens, D=D, CHUNK=CHUNK, TILE=TILE
    )


@triton.jit
def token_means(sums, chunks, tokens, means, D: tl.constexpr, TILE: tl.constexpr):
    """Grid (2·B·H,)."""
    combine_kernel(sums, means, chunks, tokens, D=D, TILE=TILE)


@triton.jit
def drift_gate(
    means, delta, ctl, anchors, counters,
    slots, heads, tokens, interval, max_age, fewest, most,
    flags, new_anchors, new_counters,
    REUSE: tl.constexpr, RELATIVE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Grid (B,): a program owns its sample's state in every slot, so its barrier orders copy and update."""
    sample = tl.program_id(0)
    samples = tl.num_programs(0)
    head = tl.arange(0, HEADS)
    real = (head < heads)[:, None]
    for slot in range(0, slots):
        row = (slot * samples + sample).to(tl.int64) * heads + head
        columns = tl.arange(0, _COLUMNS)
        books = row[:, None] * _COLUMNS + columns[None, :]
        tl.store(new_counters + books, tl.load(counters + books, mask=real), mask=real)
        for feature in range(0, 2 * D, FEATURES):
            places = row[:, None] * (2 * D) + feature + tl.arange(0, FEATURES)[None, :]
            tl.store(new_anchors + places, tl.load(anchors + places, mask=real), mask=real)
    tl.debug_barrier()
    decide_kernel(
        means, delta, ctl, new_anchors, new_counters, flags,
        heads, tokens.to(tl.int64) * tokens, interval, max_age, fewest, most,
        REUSE=REUSE, RELATIVE=RELATIVE, HEADS=HEADS, D=D, FEATURES=FEATURES,
    )  # fmt: skip


@triton.jit
def group_lse(
    q, k, flags, heads, tokens, lse,
    SCALE_LOG2: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of a head's score matrix, B·H)."""
    of_head = tokens * D
    of_sample = heads * of_head
    group_lse_kernel(
        q, k, flags, lse, of_sample, of_head, D, of_sample, of_head, D, 0, heads, tokens, SCALE_LOG2,
        STRIDE=STRIDE, PER_BLOCK=PER_BLOCK, D=D, QUERIES=QUERIES, KEYS=KEYS, FEATURES=FEATURES,
        SWIZZLE=SWIZZLE,
    )  # fmt: skip


@triton.jit
def top_p_select(
    lse, top_p, flags, ctl, mask, slots, heads, tokens, groups, words, new_mask, pairs,
    PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, B·H): a program owns its row of bits in every slot."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    head = tl.program_id(1).to(tl.int64)
    WORDS: tl.constexpr = BLOCKS // 32
    word = tl.arange(0, WORDS)
    for slot in range(0, slots):
        places = ((slot * tl.num_programs(1) + head) * rows + row) * words + word
        tl.store(new_mask + places, tl.load(mask + places, mask=word < words), mask=word < words)
    if tl.load(flags + head) != 0:
        tl.debug_barrier()
        state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(1) + head
        bits = new_mask + (state_head * rows + row) * words
        share = tl.load(top_p + head % heads)
        score = score_row(lse + head * groups * rows, row, rows, groups, PER_BLOCK, BLOCKS)
        kept = keep_top_p(score, share, words, bits, BLOCKS)
        tl.store(pairs + head * rows + row, kept_pairs(kept, row, tokens, BLOCK, BLOCKS))
    else:
        tl.store(pairs + head * rows + row, tl.zeros([], tl.int64))


@triton.jit
def count_pairs(pairs, ctl, counters, slots, rows, new_counters, TILE: tl.constexpr):
    """Grid (B·H,): what atomic additions do in the live op, which must not start before a copy has ended."""
    head = tl.program_id(0).to(tl.int64)
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, rows, TILE):
        row = start + tl.arange(0, TILE)
        total += tl.load(pairs + head * rows + row, mask=row < rows, other=0)
    built = tl.sum(total, 0)  # 0 where the head reused its mask
    now = tl.load(ctl + _SLOT)
    column = tl.arange(0, _COLUMNS)
    counted = (column == _KEPT) | (column == _KEPT_SUM)
    for slot in range(0, slots):
        places = (slot * tl.num_programs(0) + head) * _COLUMNS + column
        added = tl.where(counted & (slot == now), built, 0)
        tl.store(new_counters + places, tl.load(counters + places) + added)


@triton.jit
def expand_mask(mask, ctl, key_blocks, words, counts, indices, BLOCKS: tl.constexpr):
    """Grid (query blocks, B·H)."""
    expand_kernel(mask, ctl, counts, indices, key_blocks, words, BLOCKS=BLOCKS)


@triton.jit
def block_sparse_attention(
    q, k, v, counts, indices, tokens, key_blocks, out, lse,
    SCALE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Grid (query blocks, H, B). TMA descriptors are made on the host, which TensorRT offers no place for."""
    of_head = tokens * D
    of_sample = tl.num_programs(1) * of_head
    block_sparse_attention_kernel(
        q, k, v, out, lse, counts, indices,
        of_sample, of_head, D, of_sample, of_head, D, of_sample, of_head, D, of_sample, of_head, D,
        tokens, key_blocks, SCALE,
        BLOCK=BLOCK, D=D, RAGGED=RAGGED, TMA=False, HOST_DESCRIPTORS=False, PARTS=PARTS,
    )  # fmt: skip
