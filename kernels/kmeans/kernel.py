"""K-means of queries and keys, Triton: two launches an iteration, for all heads and both sides at once.

``assign`` streams the centroids past a tile of tokens and keeps a running minimum; ``update`` gives a tile of
centroids to one program, which multiplies a 0/1 matrix of members with all tokens on the tensor cores. So a
sum has one owner and one order: no atomics on values, no partial sums to combine, equal bits on every run.

All iterations that a first step may need are launched at every call, since whether it is one stands on the
device. Programs that have nothing to do (the head reuses its map, it has done its iterations, or none of its
centroids moves any more) leave at once; nothing waits for another program.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_COLUMNS = tl.constexpr(COUNTER_COLUMNS)
_REFRESHES = tl.constexpr(int(Counter.REFRESHES))


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Launch configuration.

    Attributes:
        tokens, centroids: tile of ``assign``; one of its programs takes ``turns`` tiles of tokens in turn.
        members, owned: tile of ``update``: tokens a step, and centroids a program.
        num_warps, num_stages: of both kernels.
    """

    tokens: int
    centroids: int
    turns: int
    members: int
    owned: int
    num_warps: int
    num_stages: int


def choose_tiles(capability: int, element_size: int) -> Tiles:
    """Tiles for a compute capability (90 for sm_90) and element size; four-byte elements are for tests."""
    if element_size > 2:
        return Tiles(64, 32, 2, 32, 32, num_warps=4, num_stages=1)
    stages = 3 if capability == 90 else 2
    return Tiles(128, 64, 4, 64, 128, num_warps=8, num_stages=stages)


@triton.jit
def begin_kernel(
    q, k, flags, ctl, counters, centroids, rounded, norms,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, tokens, q_clusters, k_clusters,
    D: tl.constexpr, OWNED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of centroids, B·H): where the iterations start, also rounded to the tokens' dtype."""
    head = tl.program_id(1).to(tl.int64)
    if tl.load(flags + head) == 0:
        return
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(1) + head
    first = tl.load(counters + state_head * _COLUMNS + _REFRESHES) == 1
    clusters = q_clusters + k_clusters
    cluster = tl.program_id(0) * OWNED + tl.arange(0, OWNED)
    feature = tl.arange(0, D)
    of_keys = cluster >= q_clusters
    side = tl.where(of_keys, k_clusters, q_clusters)
    place = (2 * (cluster - tl.where(of_keys, q_clusters, 0)) + 1).to(tl.int64) * tokens // (2 * side)
    base_q = q + (head // heads) * stride_qb + (head % heads) * stride_qh
    base_k = k + (head // heads) * stride_kb + (head % heads) * stride_kh
    in_q, in_k = first & (of_keys == 0), first & of_keys & (cluster < clusters)
    start = tl.load(base_q + place[:, None] * stride_qn + feature[None, :], mask=in_q[:, None], other=0.0)
    start += tl.load(base_k + place[:, None] * stride_kn + feature[None, :], mask=in_k[:, None], other=0.0)
    inside = (cluster < clusters)[:, None]
    kept = centroids + (state_head * clusters + cluster)[:, None] * D + feature[None, :]
    value = tl.where(first, start.to(tl.float32), tl.load(kept, mask=inside, other=0.0))
    tl.store(kept, value, mask=inside)
    _store_rounded(value, head * clusters + cluster, cluster < clusters, rounded, norms, D)


@triton.jit
def _store_rounded(value, row, inside, rounded, norms, D: tl.constexpr):
    """Centroids as the product takes them, and the norms of just these values."""
    low = value.to(rounded.dtype.element_ty)
    tl.store(rounded + row[:, None] * D + tl.arange(0, D)[None, :], low, mask=inside[:, None])
    wide = low.to(tl.float32)
    tl.store(norms + row, tl.sum(wide * wide, 1), mask=inside)


@triton.jit
def _is_active(flags, ctl, counters, shifts, head, of_keys, iteration, first_iterations, iterations, limit):
    """Whether a side of a head takes part in this iteration."""
    active = tl.load(flags + head) != 0
    if active:
        state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(1) + head
        first = tl.load(counters + state_head * _COLUMNS + _REFRESHES) == 1
        active = iteration < tl.where(first, first_iterations, iterations)
    if active & (iteration > 0):
        previous = ((iteration - 1) * tl.num_programs(1) + head) * 2 + of_keys
        active = tl.load(shifts + previous).to(tl.float32, bitcast=True) > limit
    return active


@triton.jit
def _assign_tiles(
    x, stride_n, rounded, norms, labels, tokens, clusters,
    D: tl.constexpr, TOKENS: tl.constexpr, CENTROIDS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    feature = tl.arange(0, D)
    column = tl.arange(0, CENTROIDS)
    first = tl.program_id(0) * TURNS * TOKENS
    for start in range(first, tl.minimum(first + TURNS * TOKENS, tokens), TOKENS):
        row = start + tl.arange(0, TOKENS)
        pointers = x + row.to(tl.int64)[:, None] * stride_n + feature[None, :]
        token = tl.load(pointers, mask=(row < tokens)[:, None], other=0.0)
        best = tl.full([TOKENS, CENTROIDS], float("inf"), tl.float32)
        nearest = tl.zeros([TOKENS, CENTROIDS], tl.int32)
        for tile in range(0, clusters, CENTROIDS):
            cluster = tile + column
            inside = cluster < clusters
            centroid = tl.load(
                rounded + cluster[:, None] * D + feature[None, :], mask=inside[:, None], other=0.0
            )
            norm = tl.load(norms + cluster, mask=inside, other=float("inf"))
            product = tl.dot(token, tl.trans(centroid), input_precision="ieee")
            distance = norm[None, :] - 2.0 * product
            better = distance < best  # false for NaN, and for an equal one further on
            best = tl.where(better, distance, best)
            nearest = tl.where(better, tile, nearest)
        lowest = tl.min(best, 1)
        candidate = tl.where(best == lowest[:, None], nearest + column[None, :], 2147483647)
        tl.store(labels + row, tl.min(candidate, 1), mask=row < tokens)


@triton.jit(do_not_specialize=["iteration", "first_iterations", "iterations"])
def assign_kernel(
    q, k, flags, ctl, counters, shifts, rounded, norms, labels,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, tokens, q_clusters, k_clusters, iteration, first_iterations, iterations, limit,
    D: tl.constexpr, TOKENS: tl.constexpr, CENTROIDS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    """Grid (groups of token tiles, B·H, 2): nearest centroids of queries (z = 0) and keys (z = 1)."""
    head = tl.program_id(1).to(tl.int64)
    of_keys = tl.program_id(2)
    if (
        _is_active(
            flags, ctl, counters, shifts, head, of_keys, iteration, first_iterations, iterations, limit
        )
        == 0
    ):
        return
    row = head * (q_clusters + k_clusters) + of_keys * q_clusters
    of_side = labels + (head * 2 + of_keys) * tokens
    if of_keys == 0:
        base = q + (head // heads) * stride_qb + (head % heads) * stride_qh
        _assign_tiles(
            base, stride_qn, rounded + row * D, norms + row, of_side, tokens, q_clusters,
            D, TOKENS, CENTROIDS, TURNS,
        )  # fmt: skip
    else:
        base = k + (head // heads) * stride_kb + (head % heads) * stride_kh
        _assign_tiles(
            base, stride_kn, rounded + row * D, norms + row, of_side, tokens, k_clusters,
            D, TOKENS, CENTROIDS, TURNS,
        )  # fmt: skip


@triton.jit
def _sum_members(
    x, stride_n, labels, cluster, tokens, D: tl.constexpr, MEMBERS: tl.constexpr, OWNED: tl.constexpr
):
    """Sums [OWNED, D] and numbers [OWNED] of the tokens that carry the labels ``cluster``."""
    total = tl.zeros([OWNED, D], tl.float32)
    hits = tl.zeros([OWNED, MEMBERS], tl.int32)
    for start in range(0, tokens, MEMBERS):
        row = start + tl.arange(0, MEMBERS)
        pointers = x + row.to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]
        token = tl.load(pointers, mask=(row < tokens)[:, None], other=0.0)
        label = tl.load(labels + row, mask=row < tokens, other=-1)
        member = label[None, :] == cluster[:, None]
        hits += member.to(tl.int32)
        total = tl.dot(member.to(token.dtype), token, total, input_precision="ieee")
    return total, tl.sum(hits, 1)


@triton.jit(do_not_specialize=["iteration", "first_iterations", "iterations"])
def update_kernel(
    q, k, flags, ctl, counters, shifts, centroids, rounded, norms, labels,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, tokens, q_clusters, k_clusters, q_tiles, iteration, first_iterations, iterations, limit,
    D: tl.constexpr, MEMBERS: tl.constexpr, OWNED: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of query centroids, then of key centroids; B·H): the mean of every cluster's tokens."""
    head = tl.program_id(1).to(tl.int64)
    of_keys = (tl.program_id(0) >= q_tiles).to(tl.int32)
    if (
        _is_active(
            flags, ctl, counters, shifts, head, of_keys, iteration, first_iterations, iterations, limit
        )
        == 0
    ):
        return
    of_side = labels + (head * 2 + of_keys) * tokens
    cluster = (tl.program_id(0) - of_keys * q_tiles) * OWNED + tl.arange(0, OWNED)
    if of_keys == 0:
        base = q + (head // heads) * stride_qb + (head % heads) * stride_qh
        total, size = _sum_members(base, stride_qn, of_side, cluster, tokens, D, MEMBERS, OWNED)
    else:
        base = k + (head // heads) * stride_kb + (head % heads) * stride_kh
        total, size = _sum_members(base, stride_kn, of_side, cluster, tokens, D, MEMBERS, OWNED)
    has_mean = size > 0  # else all stays as it is
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * tl.num_programs(1) + head
    row = state_head * (q_clusters + k_clusters) + of_keys * q_clusters + cluster
    kept = centroids + row[:, None] * D + tl.arange(0, D)[None, :]
    mean = total * (1.0 / tl.maximum(size, 1).to(tl.float32))[:, None]
    step = tl.where(has_mean[:, None], mean - tl.load(kept, mask=has_mean[:, None], other=0.0), 0.0)
    # The largest of non-negative numbers, as integers: whoever comes first, the result is the same.
    moved = tl.max(tl.sum(step * step, 1), 0)
    shift = shifts + (iteration * tl.num_programs(1) + head) * 2 + of_keys
    tl.atomic_max(shift, moved.to(tl.int32, bitcast=True), sem="relaxed")
    tl.store(kept, mean, mask=has_mean[:, None])
    row = head * (q_clusters + k_clusters) + of_keys * q_clusters + cluster
    _store_rounded(mean, row, has_mean, rounded, norms, D)


def cluster_(
    q: Tensor,
    k: Tensor,
    flags: Tensor,
    ctl: Tensor,
    counters: Tensor,
    centroids: Tensor,
    *,
    q_clusters: int,
    first_iterations: int,
    iterations: int,
    tolerance: float,
) -> Tensor:
    """Cluster the heads that rebuild, moving their centroids in place; the reference is ``kmeans``.

    Args:
        q, k: [B, H, N, D], last stride 1, D a power of two.
        flags: int32 [B, H], 1 where the head rebuilds; ``ctl``: int32 [8].
        counters: int64 [S, B, H, 8]; a head's first rebuild of the video starts from its tokens.
        centroids: fp32 [S, B, H, C, D], of queries, then of keys; contiguous.
        q_clusters: how many are of queries.
        first_iterations, iterations: at the first rebuild of a video, and at every other.
        tolerance: see the reference.

    Returns:
        labels, int32 [B, H, 2, N]; unspecified where the flag is 0.
    """
    batch, heads, tokens, dim = q.shape
    clusters = centroids.shape[3]
    tiles = choose_tiles(_capability(q.device), q.element_size())
    rows = batch * heads
    rounded = torch.empty(rows, clusters, dim, dtype=q.dtype, device=q.device)
    norms = torch.empty(rows, clusters, dtype=torch.float32, device=q.device)
    labels = torch.empty(batch, heads, 2, tokens, dtype=torch.int32, device=q.device)
    shifts = torch.zeros(max(first_iterations, iterations), rows, 2, dtype=torch.int32, device=q.device)
    sizes = (*q.stride()[:3], *k.stride()[:3], heads, tokens, q_clusters, clusters - q_clusters)
    launch = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    begin_kernel[(triton.cdiv(clusters, 32), rows)](
        q, k, flags, ctl, counters, centroids, rounded, norms, *sizes, D=dim, OWNED=32, num_warps=4
    )
    q_tiles = triton.cdiv(q_clusters, tiles.owned)
    k_tiles = triton.cdiv(clusters - q_clusters, tiles.owned)
    for iteration in range(max(first_iterations, iterations)):
        assign_kernel[(triton.cdiv(tokens, tiles.tokens * tiles.turns), rows, 2)](
            q, k, flags, ctl, counters, shifts, rounded, norms, labels,
            *sizes, iteration, first_iterations, iterations, tolerance**2,
            D=dim, TOKENS=tiles.tokens, CENTROIDS=tiles.centroids, TURNS=tiles.turns, **launch,
        )  # fmt: skip
        update_kernel[(q_tiles + k_tiles, rows)](
            q, k, flags, ctl, counters, shifts, centroids, rounded, norms, labels,
            *sizes, q_tiles, iteration, first_iterations, iterations, tolerance**2,
            D=dim, MEMBERS=tiles.members, OWNED=tiles.owned, **launch,
        )  # fmt: skip
    return labels


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
