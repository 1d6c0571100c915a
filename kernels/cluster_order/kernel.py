"""Tokens sorted by cluster, Triton: a stable counting sort in three launches, for the heads that rebuild.

Each program counts the labels of a chunk of tokens; one program a head and side turns the counts into the
place where every cluster of every chunk begins; then each chunk puts its tokens there. Ranks inside a chunk
come from comparing labels pairwise, so nothing depends on who comes first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))

#: Tokens a program; the table of counts takes 4·C/CHUNK bytes a token and side, C rounded up to a power of
#: two.
CHUNK = 512
#: Tokens that a token is compared with at a time.
TILE = 32


@triton.jit
def count_kernel(labels, flags, table, tokens, CHUNK: tl.constexpr, CLUSTERS: tl.constexpr):
    """Grid (chunks, B·H, 2)."""
    head = tl.program_id(1).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    side = head * 2 + tl.program_id(2)
    token = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    inside = token < tokens
    label = tl.load(labels + side * tokens + token, mask=inside, other=0)
    counts = tl.histogram(label, CLUSTERS)
    cluster = tl.arange(0, CLUSTERS)
    counts -= tl.where(cluster == 0, CHUNK - tl.sum(inside.to(tl.int32), 0), 0)  # those past the last token
    tl.store(table + (side * tl.num_programs(0) + tl.program_id(0)) * CLUSTERS + cluster, counts)


@triton.jit
def begin_kernel(table, flags, ctl, offsets, chunks, q_clusters, k_clusters, CLUSTERS: tl.constexpr):
    """Grid (B·H, 2): counts become, in place, where a chunk's tokens of a cluster begin."""
    head = tl.program_id(0).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    of_keys = tl.program_id(1)
    cluster = tl.arange(0, CLUSTERS)
    rows = table + (head * 2 + of_keys) * chunks * CLUSTERS + cluster
    size = tl.zeros([CLUSTERS], tl.int32)
    for chunk in range(chunks):
        size += tl.load(rows + chunk * CLUSTERS)
    begin = tl.cumsum(size, 0) - size
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(0) + head
    place = offsets + state_head * (q_clusters + k_clusters + 2) + of_keys * (q_clusters + 1)
    side = tl.where(of_keys != 0, k_clusters, q_clusters)
    tl.store(place + cluster, begin, mask=cluster < side)
    tl.store(place + side, tl.sum(size, 0))
    for chunk in range(chunks):
        count = tl.load(rows + chunk * CLUSTERS)
        tl.store(rows + chunk * CLUSTERS, begin)
        begin += count


@triton.jit
def place_kernel(
    labels, flags, ctl, table, order, tokens,
    CHUNK: tl.constexpr, TILE: tl.constexpr, CLUSTERS: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, B·H, 2)."""
    head = tl.program_id(1).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    side = head * 2 + tl.program_id(2)
    start = tl.program_id(0) * CHUNK
    token = start + tl.arange(0, CHUNK)
    of_side = labels + side * tokens
    label = tl.load(of_side + token, mask=token < tokens, other=-1)
    rank = tl.zeros([CHUNK], tl.int32)
    for offset in range(0, CHUNK, TILE):
        other = start + offset + tl.arange(0, TILE)
        other_label = tl.load(of_side + other, mask=other < tokens, other=-2)
        earlier = (label[:, None] == other_label[None, :]) & (other[None, :] < token[:, None])
        rank += tl.sum(earlier.to(tl.int32), 1)
    begins = table + (side * tl.num_programs(0) + tl.program_id(0)) * CLUSTERS
    place = tl.load(begins + label, mask=token < tokens, other=0) + rank
    state_side = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(1) * 2 + side
    tl.store(order + state_side * tokens + place, token, mask=token < tokens)


def sort_(
    labels: Tensor, flags: Tensor, ctl: Tensor, order: Tensor, offsets: Tensor, *, q_clusters: int
) -> None:
    """Write the order and the offsets of the heads that rebuild, in place, for the slot in ``ctl``.

    Args:
        labels: int32 [B, H, 2, N], contiguous; ``flags``: int32 [B, H]; ``ctl``: int32 [8].
        order: int32 [S, B, H, 2, N]; ``offsets``: int32 [S, B, H, Cq + Ck + 2].
        q_clusters: Cq.
    """
    batch, heads, _, tokens = labels.shape
    k_clusters = offsets.shape[3] - 2 - q_clusters
    chunks = triton.cdiv(tokens, CHUNK)
    padded = pad_clusters(max(q_clusters, k_clusters))
    table = torch.empty(batch, heads, 2, chunks, padded, dtype=torch.int32, device=labels.device)
    grid = (chunks, batch * heads, 2)
    launchable(count_kernel)[grid](labels, flags, table, tokens, CHUNK=CHUNK, CLUSTERS=padded, num_warps=4)
    launchable(begin_kernel)[(batch * heads, 2)](
        table, flags, ctl, offsets, chunks, q_clusters, k_clusters, CLUSTERS=padded, num_warps=4
    )
    launchable(place_kernel)[grid](
        labels, flags, ctl, table, order, tokens, CHUNK=CHUNK, TILE=TILE, CLUSTERS=padded, num_warps=8
    )


def pad_clusters(clusters: int) -> int:
    """Clusters rounded up to a power of two, at least 32."""
    return max(32, triton.next_power_of_2(clusters))
