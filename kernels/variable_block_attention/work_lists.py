"""Work lists of variable-block attention, built on the device from order, offsets and map.

Row tiles say which queries go together, key lists what a query cluster keeps, token by token. The lists of a
head take 4·Cq·N bytes, reserved in full since the host does not know how much a map keeps; heads take turns
in ``WORKSPACE_BYTES``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_DENSE = tl.constexpr(int(Ctl.DENSE))

#: Bytes that the key lists may take (300 query clusters of 75,600 tokens: 91 MB a head); one head must fit.
WORKSPACE_BYTES = 1 << 28
#: Places that a program of ``found_lists_kernel`` fills at a time.
FOUND_TILE = 1024
#: Whether row tiles that are at most half full come last.
SMALL_LAST = True


@triton.jit(do_not_specialize=["first"])
def row_tiles_kernel(
    offsets, ctl, tiles, first, all_heads, tokens, q_clusters, k_clusters, most,
    ROWS: tl.constexpr, CLUSTERS: tl.constexpr, SMALL_LAST: tl.constexpr,
):  # fmt: skip
    """Grid (heads of this turn,): cut query clusters into tiles of at most ROWS tokens.

    tiles: int32 [heads of the turn, most, 3]: cluster, first and last + 1 place in the order; cluster -1
    where there is no tile. In a dense step all tokens are one cluster. SMALL_LAST: those of at most ROWS / 2
    tokens follow on all others, since short work at the end leaves fewer multiprocessors idle.
    """
    head = first + tl.program_id(0)
    slot = tl.load(ctl + _SLOT).to(tl.int64)
    dense = tl.load(ctl + _DENSE) != 0
    cluster = tl.arange(0, CLUSTERS)
    inside = cluster < q_clusters
    begins = offsets + (slot * all_heads + head) * (q_clusters + k_clusters + 2) + cluster
    begin = tl.where(dense, 0, tl.load(begins, mask=inside, other=0))
    end = tl.where(dense, tl.where(cluster == 0, tokens, 0), tl.load(begins + 1, mask=inside, other=0))
    count = tl.where(inside, tl.cdiv(end - begin, ROWS), 0)
    small = ((tl.cdiv(end - begin, ROWS // 2) % 2 == 1) & inside).to(tl.int32) * SMALL_LAST
    large = count - small
    place = tl.cumsum(large, 0) - large
    last_place = tl.sum(large, 0) + tl.cumsum(small, 0) - small
    mine = tiles + tl.program_id(0) * most * 3
    for number in range(tl.max(count, 0)):
        target = mine + tl.where(number < large, place + number, last_place) * 3
        tl.store(target, cluster, mask=number < count)
        tl.store(target + 1, begin + number * ROWS, mask=number < count)
        tl.store(target + 2, end, mask=number < count)
    nothing = tl.zeros([CLUSTERS], tl.int32) - 1
    for start in range(tl.sum(count, 0), most, CLUSTERS):
        tl.store(mine + (start + cluster) * 3, nothing, mask=start + cluster < most)


@triton.jit(do_not_specialize=["first"])
def found_lists_kernel(
    order, offsets, mask, ctl, counts, lists, ends, first, all_heads, tokens, q_clusters, k_clusters, words,
    CLUSTERS: tl.constexpr, HALVINGS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (query clusters, heads of this turn): the tokens of kept clusters, gapless.

    Every place of a list looks for its cluster; to copy the kept ones, 32 at a time, was slower: the largest
    of them decides how long that takes.

    The kept sizes, added up, say where in the list each cluster ends; a dropped one ends where the one before
    it does. The cluster of a place is the first that ends behind it: HALVINGS = log2(CLUSTERS) looks.

    counts: int32 [heads of the turn, Cq]; lists: int32 [heads of the turn, Cq, N]. In a dense step query
    cluster 0 lists every token, and the others none.
    ends: int32 [heads of the turn, Cq, 2, CLUSTERS]: those ends, and how far a place in the order lies behind
    that in the list.
    """
    row = tl.program_id(0)
    head = first + tl.program_id(1)
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * all_heads + head
    list_row = tl.program_id(1).to(tl.int64) * q_clusters + row
    target = lists + list_row * tokens
    item = tl.arange(0, TILE)
    if tl.load(ctl + _DENSE) != 0:
        count = tl.where(row == 0, tokens, 0)
        for start in range(0, count, TILE):
            tl.store(target + start + item, start + item, mask=start + item < count)
        tl.store(counts + list_row, count)
        return
    begins = offsets + state_head * (q_clusters + k_clusters + 2) + q_clusters + 1
    keys = order + (state_head * 2 + 1) * tokens
    cluster = tl.arange(0, CLUSTERS)
    real = cluster < k_clusters
    bits = tl.load(mask + (state_head * q_clusters + row) * words + cluster // 32, mask=real, other=0)
    begin = tl.load(begins + cluster, mask=real, other=0)
    size = tl.load(begins + cluster + 1, mask=real, other=0) - begin
    size = tl.where((bits >> cluster % 32) & 1 != 0, size, 0)
    end = tl.cumsum(size, 0)
    count = tl.sum(size, 0)
    tl.store(counts + list_row, count)
    ends += list_row * 2 * CLUSTERS
    tl.store(ends + cluster, end)
    tl.store(ends + CLUSTERS + cluster, begin - (end - size))
    tl.debug_barrier()  # what other threads of the program stored is read now
    for start in range(0, count, TILE):
        place = start + item
        inside = place < count
        before = tl.zeros([TILE], tl.int32)  # clusters that end at or before the place
        for halving in tl.static_range(HALVINGS):
            step = CLUSTERS >> (halving + 1)
            passed = tl.load(ends + before + (step - 1)) <= place
            before = tl.where(passed, before + step, before)
        shift = tl.load(ends + CLUSTERS + before)
        tl.store(target + place, tl.load(keys + place + shift, mask=inside, other=0), mask=inside)


@dataclasses.dataclass(frozen=True)
class Turn:
    """The work of some heads.

    Attributes:
        first: number of its first head, of B·H.
        heads: how many heads.
        most: row tiles that a head may have.
        tiles: int32 [>= heads, most, 3], see ``row_tiles_kernel``.
        counts: int32 [>= heads, Cq]; ``lists``: int32 [>= heads, Cq, N]; see ``found_lists_kernel``.
    """

    first: int
    heads: int
    most: int
    tiles: Tensor
    counts: Tensor
    lists: Tensor


def turns(
    order: Tensor, offsets: Tensor, mask: Tensor, ctl: Tensor, *, rows: int, workspace: int | None = None,
    small_last: bool = SMALL_LAST,
) -> Iterator[Turn]:  # fmt: skip
    """Build the work lists of a few heads, again and again in the same memory, until all had their turn.

    Args:
        order: int32 [S, B, H, 2, N]; ``offsets``: int32 [S, B, H, Cq + Ck + 2].
        mask: int32 [S, B, H, Cq, ceil(Ck / 32)]; ``ctl``: int32 [8].
        rows: tokens of a row tile.
        workspace: bytes that the key lists may take; None: ``WORKSPACE_BYTES``.
        small_last: see ``row_tiles_kernel``.
    """
    batch, heads, _, tokens = order.shape[1:]
    q_clusters, words = mask.shape[3:]
    k_clusters = offsets.shape[3] - q_clusters - 2
    all_heads = batch * heads
    turn = heads_a_turn(all_heads, tokens, q_clusters, workspace)
    most = tokens // rows + q_clusters
    tiles = torch.empty(turn, most, 3, dtype=torch.int32, device=order.device)
    counts = torch.empty(turn, q_clusters, dtype=torch.int32, device=order.device)
    lists = torch.empty(turn, q_clusters, tokens, dtype=torch.int32, device=order.device)
    padded, k_padded = (max(32, triton.next_power_of_2(n)) for n in (q_clusters, k_clusters))
    ends = torch.empty(turn, q_clusters, 2, k_padded, dtype=torch.int32, device=order.device)
    for first in range(0, all_heads, turn):
        present = min(turn, all_heads - first)
        launchable(row_tiles_kernel)[(present,)](
            offsets, ctl, tiles, first, all_heads, tokens, q_clusters, k_clusters, most,
            ROWS=rows, CLUSTERS=padded, SMALL_LAST=int(small_last), num_warps=4,
        )  # fmt: skip
        launchable(found_lists_kernel)[(q_clusters, present)](
            order, offsets, mask, ctl, counts, lists, ends,
            first, all_heads, tokens, q_clusters, k_clusters, words,
            CLUSTERS=k_padded, HALVINGS=k_padded.bit_length() - 1, TILE=FOUND_TILE, num_warps=4,
        )  # fmt: skip
        yield Turn(first, present, most, tiles, counts, lists)


def heads_a_turn(all_heads: int, tokens: int, q_clusters: int, workspace: int | None = None) -> int:
    """Heads whose key lists fit in the workspace, or fewer where that takes no more turns."""
    workspace = WORKSPACE_BYTES if workspace is None else workspace
    fitting = max(1, workspace // (4 * q_clusters * tokens))
    return -(-all_heads // -(-all_heads // fitting))
