"""Work lists of variable-block attention, built on the device from order, offsets and map.

Row tiles say which queries go together. What a query cluster keeps is a list without gaps, the tokens of its
kept clusters one after the other, and there are two ways to have it: where in the list each cluster ends,
8·Ck bytes, so that a kernel finds the token of any place by itself; or the list, 4·N bytes, reserved in full
since the host does not know how much a map keeps. Heads take turns in ``WORKSPACE_BYTES``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.layout import Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_DENSE = tl.constexpr(int(Ctl.DENSE))

#: Bytes that ends or lists may take; one head must fit. With 300 and 1,000 clusters of 75,600 tokens a head
#: takes 2.5 MB of ends, or 91 MB of lists.
WORKSPACE_BYTES = 1 << 28
#: Places of a list that a program of ``kept_keys_kernel`` fills at a time.
LIST_TILE = 1024
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
def kept_keys_kernel(
    order, offsets, mask, ctl, counts, ends, lists, first, all_heads, tokens, q_clusters, k_clusters, words,
    CLUSTERS: tl.constexpr, HALVINGS: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Grid (query clusters, heads of this turn): the tokens of kept clusters, gapless.

    The kept sizes, added up, say where in the list each cluster ends; a dropped one ends where the one before
    it does. The cluster of a place is the first that ends behind it: HALVINGS = log2(CLUSTERS) looks. To copy
    the kept clusters, 32 at a time, was slower: the largest of them decides how long that takes.

    counts: int32 [heads of the turn, Cq]. In a dense step query cluster 0 has every token, the others none.
    ends: int32 [heads of the turn, Cq, 2, CLUSTERS]: those ends, and how far a place in the order lies behind
    that in the list; unspecified in a dense step.
    lists: int32 [heads of the turn, Cq, N], written where LISTED.
    """
    row = tl.program_id(0)
    head = first + tl.program_id(1)
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * all_heads + head
    list_row = tl.program_id(1).to(tl.int64) * q_clusters + row
    target = lists + list_row * tokens
    item = tl.arange(0, TILE)
    if tl.load(ctl + _DENSE) != 0:
        count = tl.where(row == 0, tokens, 0)
        tl.store(counts + list_row, count)
        if LISTED:
            for start in range(0, count, TILE):
                tl.store(target + start + item, start + item, mask=start + item < count)
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
    if not LISTED:
        return
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
        counts: int32 [>= heads, Cq]; ``ends``: int32 [>= heads, Cq, 2, Ck or more, a power of two]; ``lists``:
            int32 [>= heads, Cq, N], if they were asked for; see ``kept_keys_kernel``.
    """

    first: int
    heads: int
    most: int
    tiles: Tensor
    counts: Tensor
    ends: Tensor
    lists: Tensor | None


def turns(
    order: Tensor, offsets: Tensor, mask: Tensor, ctl: Tensor, *, rows: int, listed: bool,
    workspace: int | None = None, small_last: bool = SMALL_LAST,
) -> Iterator[Turn]:  # fmt: skip
    """Build the work lists of a few heads, again and again in the same memory, until all had their turn.

    Args:
        order: int32 [S, B, H, 2, N]; ``offsets``: int32 [S, B, H, Cq + Ck + 2].
        mask: int32 [S, B, H, Cq, ceil(Ck / 32)]; ``ctl``: int32 [8].
        rows: tokens of a row tile.
        listed: write the lists too.
        workspace: bytes that they, or else the ends, may take; None: ``WORKSPACE_BYTES``.
        small_last: see ``row_tiles_kernel``.
    """
    batch, heads, _, tokens = order.shape[1:]
    q_clusters, words = mask.shape[3:]
    k_clusters = offsets.shape[3] - q_clusters - 2
    all_heads = batch * heads
    padded, k_padded = (max(32, triton.next_power_of_2(n)) for n in (q_clusters, k_clusters))
    turn = heads_a_turn(all_heads, 4 * q_clusters * (tokens if listed else 2 * k_padded), workspace)
    most = tokens // rows + q_clusters

    def integers(*shape: int) -> Tensor:
        return torch.empty(turn, *shape, dtype=torch.int32, device=order.device)

    tiles, counts, ends = integers(most, 3), integers(q_clusters), integers(q_clusters, 2, k_padded)
    lists = integers(q_clusters, tokens) if listed else None
    for first in range(0, all_heads, turn):
        present = min(turn, all_heads - first)
        kept_keys_kernel[(q_clusters, present)](
            order, offsets, mask, ctl, counts, ends, ends if lists is None else lists,
            first, all_heads, tokens, q_clusters, k_clusters, words,
            CLUSTERS=k_padded, HALVINGS=k_padded.bit_length() - 1, TILE=LIST_TILE, LISTED=listed, num_warps=4,
        )  # fmt: skip
        row_tiles_kernel[(present,)](
            offsets, ctl, tiles, first, all_heads, tokens, q_clusters, k_clusters, most,
            ROWS=rows, CLUSTERS=padded, SMALL_LAST=int(small_last), num_warps=4,
        )  # fmt: skip
        yield Turn(first, present, most, tiles, counts, ends, lists)


def heads_a_turn(all_heads: int, bytes_a_head: int, workspace: int | None = None) -> int:
    """Heads that fit in the workspace, or fewer where that takes no more turns."""
    fitting = max(1, (WORKSPACE_BYTES if workspace is None else workspace) // bytes_a_head)
    return -(-all_heads // -(-all_heads // fitting))
