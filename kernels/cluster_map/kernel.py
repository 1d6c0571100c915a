"""The cluster map, Triton: one small product for the logits, then one program a row selects, without a sort.

The bit pattern of a non-negative float32 orders like the number, so 31 halvings find the smallest kept share;
the floor takes 31 more, by number instead of mass. Of the two sets, both the largest of one ranking, the
larger is kept.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_COLUMNS = tl.constexpr(COUNTER_COLUMNS)
_KEPT = tl.constexpr(int(Counter.KEPT))
_KEPT_SUM = tl.constexpr(int(Counter.KEPT_SUM))
#: Rows and columns of a tile of logits: products in float32 are no work for tensor cores, and the larger a
#: thread's share is, the fewer loads a product takes.
LOGITS_TILE = 64


@triton.jit
def logits_kernel(
    centroids, flags, ctl, logits, q_clusters, k_clusters, scale_log2,
    D: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of query clusters, tiles of key clusters, B·H): q̄·k̄ in units of log2, in float32."""
    head = tl.program_id(2).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(2) + head
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    feature = tl.arange(0, FEATURES)
    queries = centroids + (state_head * (q_clusters + k_clusters) + row)[:, None] * D + feature[None, :]
    keys = centroids + (state_head * (q_clusters + k_clusters) + q_clusters + column)[:, None] * D
    keys += feature[None, :]
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, D, FEATURES):
        query = tl.load(queries + start, mask=(row < q_clusters)[:, None], other=0.0)
        key = tl.load(keys + start, mask=(column < k_clusters)[:, None], other=0.0)
        product = tl.dot(query, tl.trans(key), product, input_precision="ieee")
    target = logits + (head * q_clusters + row)[:, None] * k_clusters + column[None, :]
    inside = (row < q_clusters)[:, None] & (column < k_clusters)[None, :]
    tl.store(target, product * scale_log2, mask=inside)


@triton.jit
def select_kernel(
    logits, offsets, top_p, flags, ctl, mask, counters, heads, q_clusters, k_clusters, words, least,
    CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Grid (query clusters, B·H). CLUSTERS: key clusters rounded up to a power of two, at least 32."""
    row = tl.program_id(0)
    head = tl.program_id(1).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(1) + head
    key = tl.arange(0, CLUSTERS)
    inside = key < k_clusters
    begins = offsets + state_head * (q_clusters + k_clusters + 2)
    of_key = begins + q_clusters + 1 + key
    size = tl.load(of_key + 1, mask=inside, other=0) - tl.load(of_key, mask=inside, other=0)
    source = logits + (head * q_clusters + row) * k_clusters + key
    logit = tl.load(source, mask=inside, other=float("-inf")) + tl.log2(tl.maximum(size, 1).to(tl.float32))
    logit = tl.where(size > 0, logit, float("-inf"))
    share = tl.exp2(logit - tl.max(logit, 0))
    share = tl.where((share > 0) & (share < float("inf")), share, 0.0)
    pattern = share.to(tl.int32, bitcast=True)
    target = tl.load(top_p + head % heads) * tl.sum(share, 0)

    low, low_of_floor = 0, 0
    high = tl.max(pattern, 0)
    high_of_floor = high
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = tl.sum(tl.where(pattern >= middle, share, 0.0), 0) >= target
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        middle = low_of_floor + (high_of_floor - low_of_floor + 1) // 2
        enough = tl.sum((inside & (pattern >= middle)).to(tl.int32), 0) >= least
        low_of_floor = tl.where(enough, middle, low_of_floor)
        high_of_floor = tl.where(enough, high_of_floor, middle - 1)

    tied = inside & (pattern == low)
    above = inside & (pattern > low)
    tie_share = tl.max(tl.where(tied, share, 0.0), 0)
    missing = target - tl.sum(tl.where(above, share, 0.0), 0)
    needed = tl.maximum(tl.ceil(missing / tl.where(tie_share > 0, tie_share, 1.0)), 1.0)
    kept = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= needed))
    tied = inside & (pattern == low_of_floor)
    above = inside & (pattern > low_of_floor)
    kept |= above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= least - tl.sum(above.to(tl.int32), 0)))

    WORDS: tl.constexpr = CLUSTERS // 32
    bits = tl.reshape(kept.to(tl.int32), [WORDS, 32]) << tl.arange(0, 32)[None, :]
    word = tl.arange(0, WORDS)
    tl.store(mask + (state_head * q_clusters + row) * words + word, tl.sum(bits, 1), mask=word < words)

    queries = tl.load(begins + row + 1) - tl.load(begins + row)
    pairs = tl.sum(tl.where(kept, size, 0), 0).to(tl.int64) * queries
    # Sums of integers do not depend on the order of the rows: the counters stay deterministic.
    tl.atomic_add(counters + state_head * _COLUMNS + _KEPT, pairs, sem="relaxed")
    tl.atomic_add(counters + state_head * _COLUMNS + _KEPT_SUM, pairs, sem="relaxed")


def select_(
    centroids: Tensor,
    offsets: Tensor,
    top_p: Tensor,
    flags: Tensor,
    ctl: Tensor,
    mask: Tensor,
    counters: Tensor,
    *,
    scale: float,
    least: int,
) -> None:
    """Write the maps of the heads that rebuild and add their token pairs to KEPT and KEPT_SUM, in place.

    Args:
        centroids: fp32 [S, B, H, Cq + Ck, D]; ``offsets``: int32 [S, B, H, Cq + Ck + 2].
        top_p: fp32 [>= H]; ``flags``: int32 [B, H]; ``ctl``: int32 [8].
        mask: int32 [S, B, H, Cq, ceil(Ck / 32)]; ``counters``: int64 [S, B, H, 8].
        scale: factor of q·k; ``least``: key clusters that a row keeps at least.
    """
    _, batch, heads, q_clusters, words = mask.shape
    k_clusters, dim = centroids.shape[3] - q_clusters, centroids.shape[4]
    logits = torch.empty(batch * heads, q_clusters, k_clusters, dtype=torch.float32, device=mask.device)
    tile = LOGITS_TILE
    launchable(logits_kernel)[(triton.cdiv(q_clusters, tile), triton.cdiv(k_clusters, tile), batch * heads)](
        centroids, flags, ctl, logits, q_clusters, k_clusters, scale * math.log2(math.e),
        D=dim, FEATURES=32, ROWS=tile, COLUMNS=tile, num_warps=8,
    )  # fmt: skip
    padded = max(32, triton.next_power_of_2(k_clusters))
    launchable(select_kernel)[(q_clusters, batch * heads)](
        logits, offsets, top_p, flags, ctl, mask, counters, heads, q_clusters, k_clusters, words, least,
        CLUSTERS=padded, num_warps=choose_warps(padded),
    )  # fmt: skip


def choose_warps(padded: int) -> int:
    """Warps for a row of ``padded`` shares: 32 a thread; up to 1024 one warp, whose sums are shuffles."""
    return min(8, max(1, padded // 1024))
