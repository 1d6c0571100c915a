"""What antidiagonal block scores are made of, Triton: a GEMM, one number for a query group and a key block.

Reversing the tokens of a query group turns the sum of an antidiagonal into an ordinary inner product of
length s·D, so all of it is one GEMM of [N/s, s·D] by [s·D, N/s]. Its [N/s, N/s] result never reaches memory:
each tile is reduced to a log-sum-exp over the groups of every key block, N²/(s·block) numbers, from which
``top_p_select`` normalises the rows and sums the groups of a query block. Programs of heads whose flag is 0
leave at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable

#: Bytes that the log-sum-exps may take (12 heads of 75,600 tokens: 134 MB); more heads are scored in turns.
SCRATCH_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Tile:
    """Launch configuration of ``group_lse_kernel``: groups of queries × groups of keys, features a step."""

    queries: int
    keys: int
    features: int
    num_warps: int
    num_stages: int


def choose_tile(capability: int, element_size: int, per_block: int) -> Tile:
    """The tile for a compute capability (90 for sm_90), the bytes of an element and the groups of a block.

    Hopper holds four stages of 128×256×64 in its 227 KB of shared memory and feeds ``wgmma`` from there;
    other architectures have as little as 99 KB. With two groups a block the reduced tile is half the size of
    the scores, and only the narrower tile fits in registers beside it. Four-byte elements are for tests.
    """
    if element_size > 2:
        return Tile(64, 64, 32, num_warps=4, num_stages=1)
    if capability == 90:
        return Tile(128, 256 if per_block > 2 else 128, 64, num_warps=8, num_stages=4)
    return Tile(128, 128, 32, num_warps=8, num_stages=3)


@triton.jit(do_not_specialize=["first"])
def group_lse_kernel(
    q, k, flags, lse,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    first, heads, tokens, scale_log2,
    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, FEATURES: tl.constexpr, SWIZZLE: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of a head's score matrix, heads of this turn); ``first``: flat (b, h) of the turn's first.

    lse: fp32 [heads of the turn, groups, blocks], log2 of the sum over a key block of 2^(score·log2 e).
    """
    head = first + tl.program_id(1)
    if tl.load(flags + head) == 0:
        return
    groups = tl.cdiv(tokens, STRIDE)
    blocks = tl.cdiv(groups, PER_BLOCK)
    rows = tl.cdiv(groups, QUERIES)
    columns = tl.cdiv(groups, KEYS)
    # SWIZZLE tiles of queries share each tile of keys while it is in L2.
    band = tl.program_id(0) // (SWIZZLE * columns)
    height = tl.minimum(rows - band * SWIZZLE, SWIZZLE)
    inside = tl.program_id(0) % (SWIZZLE * columns)
    row = band * SWIZZLE + inside % height
    column = inside // height

    base_q = q + (head // heads).to(tl.int64) * stride_qb + (head % heads).to(tl.int64) * stride_qh
    base_k = k + (head // heads).to(tl.int64) * stride_kb + (head % heads).to(tl.int64) * stride_kh
    query_group = row * QUERIES + tl.arange(0, QUERIES)
    key_group = column * KEYS + tl.arange(0, KEYS)
    last_query = query_group * STRIDE + STRIDE - 1
    first_key = key_group * STRIDE
    features = tl.arange(0, FEATURES)
    queries = base_q + last_query.to(tl.int64)[:, None] * stride_qn + features[None, :]
    keys = base_k + first_key.to(tl.int64)[:, None] * stride_kn + features[None, :]

    scores = tl.zeros([QUERIES, KEYS], tl.float32)
    STEPS: tl.constexpr = D // FEATURES
    for step in range(STRIDE * STEPS):
        token = step // STEPS  # queries go backwards through their group while keys go forwards
        feature = step % STEPS * FEATURES
        query_tile = tl.load(
            queries - token.to(tl.int64) * stride_qn + feature,
            mask=(last_query - token < tokens)[:, None],
            other=0.0,
        )
        key_tile = tl.load(
            keys + token.to(tl.int64) * stride_kn + feature,
            mask=(first_key + token < tokens)[:, None],
            other=0.0,
        )
        scores = tl.dot(query_tile, tl.trans(key_tile), scores, input_precision="ieee")

    scores = tl.where((first_key < tokens)[None, :], scores * tl.cast(scale_log2, tl.float32), float("-inf"))
    BLOCKS: tl.constexpr = KEYS // PER_BLOCK
    scores = tl.reshape(scores, [QUERIES, BLOCKS, PER_BLOCK])
    top = tl.max(scores, 2)
    top = tl.where(top == float("-inf"), 0.0, top)  # a block past the last token; not stored
    value = top + tl.log2(tl.sum(tl.exp2(scores - top[:, :, None]), 2))
    block = column * BLOCKS + tl.arange(0, BLOCKS)
    lse_row = (tl.program_id(1).to(tl.int64) * groups + query_group) * blocks
    tl.store(
        lse + lse_row[:, None] + block[None, :],
        value,
        mask=(query_group < groups)[:, None] & (block < blocks)[None, :],
    )


def group_lses(
    q: Tensor, k: Tensor, flags: Tensor, *, block: int, stride: int
) -> Iterator[tuple[Tensor, int, int]]:
    """Launch the GEMM over as many heads at a time as the scratch memory holds.

    Args:
        q, k: [B, H, N, D], last stride 1, D a power of two.
        flags: int32 [B, H]; heads with 0 are not scored.
        block: tokens a block; ``stride``: s, a divisor of ``block``.

    Yields:
        lse: fp32 [heads of this turn, groups, T], log2 of each key block's sum of 2^(score·log2 e), the same
            memory in every turn; the flat (b, h) of the turn's first head; how many heads are in the turn.
    """
    batch, heads, tokens, dim = q.shape
    blocks, groups = triton.cdiv(tokens, block), triton.cdiv(tokens, stride)
    tile = choose_tile(_capability(q.device), q.element_size(), block // stride)
    turn = min(batch * heads, max(1, SCRATCH_BYTES // (4 * groups * blocks)))
    lse = torch.empty(turn, groups, blocks, dtype=torch.float32, device=q.device)
    tiles = triton.cdiv(groups, tile.queries) * triton.cdiv(groups, tile.keys)
    for first in range(0, batch * heads, turn):
        present = min(turn, batch * heads - first)
        launchable(group_lse_kernel)[(tiles, present)](
            q, k, flags, lse, *q.stride()[:3], *k.stride()[:3], first, heads, tokens,
            math.log2(math.e) / (math.sqrt(dim) * stride),
            STRIDE=stride, PER_BLOCK=block // stride, D=dim,
            QUERIES=tile.queries, KEYS=tile.keys, FEATURES=tile.features, SWIZZLE=8,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        yield lse, first, present


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
