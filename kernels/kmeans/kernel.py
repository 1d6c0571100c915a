"""K-means of queries and keys, Triton: one launch for all iterations, all heads and both sides.

Whether a step is the first of a video, which heads rebuild at all, and whether centroids still move stands on
the device, and the host never reads it. So the loop over iterations runs on the device too: as many programs
as the device holds at once share the work of a phase, meet, and go on to the next one. Where no head rebuilds
they leave before they ever meet. What takes long is drawn from a counter, the longest first: no program waits
long for another. The phases of an iteration:

* ``assign`` streams the centroids past tiles of tokens and keeps a running minimum; one program of a
  multiprocessor does so while another's products run. It also counts how many tokens of its chunk go to each
  *bucket*, some centroids that lie side by side.
* ``scan`` and ``place`` put the tokens into the order of their buckets, stably.
* ``update`` gives a bucket to one program, which multiplies a 0/1 matrix of members with the bucket's tokens.

So a sum has one owner and one order, that of the tokens: no atomics on values, no partial sums to combine,
equal bits on every run and with any number of programs. Without ``place`` every bucket would have to be
multiplied with all tokens, as much work as ``assign`` does. After the last iteration ``sort`` puts each
bucket's tokens into the order of their clusters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.kmeans.launch import Tiles, choose_tiles, fold_steps
from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_COLUMNS = tl.constexpr(COUNTER_COLUMNS)
_REFRESHES = tl.constexpr(int(Counter.REFRESHES))


@triton.jit
def _meet(progress, meeting):
    """Meeting number ``meeting`` (from 1) of all programs: what any wrote before it, all read after it."""
    tl.debug_barrier()  # one thread speaks for its program, when all of its threads have stored
    tl.atomic_add(progress, 1, sem="release", scope="gpu")
    while tl.atomic_add(progress, 0, sem="acquire", scope="gpu") < meeting * tl.num_programs(0):
        pass
    tl.debug_barrier()


@triton.jit
def _draw(deals):
    """The next item of work that nobody has drawn: whoever is done early takes more of them."""
    return tl.atomic_add(deals, 1, sem="relaxed")


@triton.jit
def _locate(item, ends, rows):
    """The head of an item of work, whether it is of keys, and which one of that side's it is.

    ``ends`` [SIDES]: how many items there are up to a side, with it; keys of all heads, then queries.
    """
    before = ends <= item
    side = tl.sum(before.to(tl.int32), 0)
    of_keys = side < rows
    head = tl.where(of_keys, side, side - rows).to(tl.int64)
    return head, of_keys, item - tl.max(tl.where(before, ends, 0), 0)


@triton.jit
def _tokens_of(q, k, head, of_keys, heads, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn):
    """First token of a side, and the stride of its tokens."""
    batch, head = head // heads, head % heads
    x = tl.where(of_keys, k + batch * stride_kb + head * stride_kh, q + batch * stride_qb + head * stride_qh)
    return x, tl.where(of_keys, stride_kn, stride_qn)


@triton.jit
def _store_rounded(value, cluster, inside, stored, rounded, norms, D: tl.constexpr):
    """Centroids as the product takes them, and the norms of just these values; infinite for what is none."""
    low = value.to(rounded.dtype.element_ty)
    tl.store(rounded + cluster[:, None] * D + tl.arange(0, D)[None, :], low, mask=stored[:, None])
    wide = low.to(tl.float32)
    tl.store(norms + cluster, tl.where(inside, tl.sum(wide * wide, 1), float("inf")), mask=stored)


@triton.jit
def _begin(x, stride_n, first, kept, rounded, norms, cluster, tokens, clusters, D: tl.constexpr):
    """Where the iterations start, for the centroids ``cluster``: at tokens, or where they ended last time.

    Whole tiles are stored, with zeros behind the last centroid: ``assign`` looks at no bounds.
    """
    feature = tl.arange(0, D)
    inside = (cluster < clusters)[:, None]
    place = (2 * cluster + 1).to(tl.int64) * tokens // (2 * clusters)
    start = tl.load(x + place[:, None] * stride_n + feature[None, :], mask=inside & first, other=0.0)
    old = kept + cluster[:, None] * D + feature[None, :]
    value = tl.where(first, start.to(tl.float32), tl.load(old, mask=inside, other=0.0))
    tl.store(old, value, mask=inside)
    _store_rounded(value, cluster, cluster < clusters, cluster >= 0, rounded, norms, D)


@triton.jit
def _neighbours(x, WIDTH: tl.constexpr):
    """Groups of WIDTH columns of x [R, C], taken two by two: all the left ones, and all the right ones."""
    half: tl.constexpr = x.shape[1] // 2
    pairs = tl.permute(tl.reshape(x, [x.shape[0], half // WIDTH, 2, WIDTH]), (0, 1, 3, 2))
    left, right = tl.split(pairs)
    return tl.reshape(left, [x.shape[0], half]), tl.reshape(right, [x.shape[0], half])


@triton.jit
def _nearest(
    x, stride_n, rounded, norms, row, tokens, clusters,
    D: tl.constexpr, CENTROIDS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Labels of the tokens ``row``. Neighbouring groups of a tile of distances are folded, STEPS times.

    So the left one is always of lower numbers than the right one, as ties to the lower number need it.

    Eight columns stay: on Hopper all of what is folded stands in the registers of one thread, and these hold
    one tile of distances instead of that, running minima and their numbers.
    """
    KINDS: tl.constexpr = CENTROIDS >> STEPS
    feature = tl.arange(0, D)
    column = tl.arange(0, CENTROIDS)
    pointers = x + row.to(tl.int64)[:, None] * stride_n + feature[None, :]
    token = tl.load(pointers, mask=(row < tokens)[:, None], other=0.0)
    best = tl.full([row.shape[0], KINDS], float("inf"), tl.float32)
    nearest = tl.zeros([row.shape[0], KINDS], tl.int32)
    for tile in range(0, clusters, CENTROIDS):
        centroid = tl.load(rounded + (tile + column)[:, None] * D + feature[None, :])
        norm = tl.load(norms + tile + column)
        product = tl.dot(token, tl.trans(centroid), input_precision="ieee")
        lowest = norm[None, :] - 2.0 * product
        fold = tl.broadcast_to((column // KINDS)[None, :], lowest.shape)
        for _ in tl.static_range(STEPS):
            left, right = _neighbours(lowest, KINDS)
            of_left, of_right = _neighbours(fold, KINDS)
            closer = right < left  # false for an equal one further on
            lowest = tl.where(closer, right, left)
            fold = tl.where(closer, of_right, of_left)
        better = lowest < best  # likewise, and for NaN
        best = tl.where(better, lowest, best)
        nearest = tl.where(better, tile + fold * KINDS, nearest)
    lowest = tl.min(best, 1)
    number = nearest + tl.arange(0, KINDS)[None, :]
    return tl.min(tl.where(best == lowest[:, None], number, 2147483647), 1)


@triton.jit
def _assign(
    x, stride_n, rounded, norms, labels, table, chunk, tokens, clusters,
    D: tl.constexpr, TOKENS: tl.constexpr, CENTROIDS: tl.constexpr, STEPS: tl.constexpr,
    TURNS: tl.constexpr, OWNED: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Labels of a chunk's tokens, and its row of the table: how many go to each bucket."""
    bucket = tl.arange(0, BUCKETS)
    count = tl.zeros([BUCKETS], tl.int32)
    for turn in range(TURNS):
        row = (chunk * TURNS + turn) * TOKENS + tl.arange(0, TOKENS)
        label = _nearest(x, stride_n, rounded, norms, row, tokens, clusters, D, CENTROIDS, STEPS)
        tl.store(labels + row, label, mask=row < tokens)
        of_bucket = tl.where(row < tokens, label // OWNED, BUCKETS)
        count += tl.sum((of_bucket[:, None] == bucket[None, :]).to(tl.int32), 0)
    tl.store(table + chunk * BUCKETS + bucket, count)


@triton.jit
def _scan(table, chunks, BUCKETS: tl.constexpr, CHUNKS: tl.constexpr):
    """A side's counts become, in place, where the tokens of a chunk begin that go to a bucket."""
    bucket = tl.arange(0, BUCKETS)
    size = tl.zeros([BUCKETS], tl.int32)
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        pointers = table + chunk[:, None] * BUCKETS + bucket[None, :]
        size += tl.sum(tl.load(pointers, mask=(chunk < chunks)[:, None], other=0), 0)
    begin = tl.cumsum(size, 0) - size
    for start in range(0, chunks, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        pointers = table + chunk[:, None] * BUCKETS + bucket[None, :]
        count = tl.load(pointers, mask=(chunk < chunks)[:, None], other=0)
        tl.store(pointers, begin[None, :] + tl.cumsum(count, 0) - count, mask=(chunk < chunks)[:, None])
        begin += tl.sum(count, 0)


@triton.jit
def _deal(which, begin, KINDS: tl.constexpr):
    """Where tokens go that are dealt, in turn, to the piles ``which``; ``begin``: a pile's next place.

    Returns the places, and the next ones after them. A token of no pile gets place 0.
    """
    goes = (which[:, None] == tl.arange(0, KINDS)[None, :]).to(tl.int32)
    places = begin[None, :] + tl.cumsum(goes, 0) - 1
    return tl.sum(goes * places, 1), begin + tl.sum(goes, 0)


@triton.jit
def _place(
    labels, table, placed, chunk, tokens,
    CHUNK: tl.constexpr, DEALT: tl.constexpr, OWNED: tl.constexpr, BUCKETS: tl.constexpr,
):  # fmt: skip
    """Put a chunk's tokens where their buckets say: token·OWNED + which of the bucket's centroids."""
    begin = tl.load(table + chunk * BUCKETS + tl.arange(0, BUCKETS))
    for start in range(0, CHUNK, DEALT):
        row = chunk * CHUNK + start + tl.arange(0, DEALT)
        label = tl.load(labels + row, mask=row < tokens, other=BUCKETS * OWNED)
        place, begin = _deal(label // OWNED, begin, BUCKETS)
        tl.store(placed + place, row * OWNED + label % OWNED, mask=row < tokens)


@triton.jit
def _bucket_of(table, bucket, tokens, BUCKETS: tl.constexpr):
    """Where the tokens of a bucket begin and end: those of the first chunk, and of the next bucket, begin."""
    return tl.load(table + bucket), tl.load(table + bucket + 1, mask=bucket + 1 < BUCKETS, other=tokens)


@triton.jit
def _sum_members(
    x, stride_n, placed, begin, end, D: tl.constexpr, MEMBERS: tl.constexpr, OWNED: tl.constexpr
):
    """Sums [OWNED, D] and sizes [OWNED] of a bucket's clusters, whose tokens are ``begin`` to ``end``."""
    owned = tl.arange(0, OWNED)
    total = tl.zeros([OWNED, D], tl.float32)
    hits = tl.zeros([OWNED, MEMBERS], tl.int32)
    for start in range(begin, end, MEMBERS):
        place = start + tl.arange(0, MEMBERS)
        entry = tl.load(placed + place, mask=place < end, other=0)
        pointers = x + (entry // OWNED).to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]
        token = tl.load(pointers, mask=(place < end)[:, None], other=0.0)
        which = tl.where(place < end, entry % OWNED, OWNED)
        member = which[None, :] == owned[:, None]
        hits += member.to(tl.int32)
        total = tl.dot(member.to(token.dtype), token, total, input_precision="ieee")
    return total, tl.sum(hits, 1)


@triton.jit
def _sort(placed, order, begin, end, next_place, DEALT: tl.constexpr, OWNED: tl.constexpr):
    """A bucket's tokens by cluster, stably."""
    for start in range(begin, end, DEALT):
        row = start + tl.arange(0, DEALT)
        entry = tl.load(placed + row, mask=row < end, other=0)
        which = tl.where(row < end, entry % OWNED, OWNED)
        place, next_place = _deal(which, next_place, OWNED)
        tl.store(order + place, entry // OWNED, mask=row < end)


@triton.jit
def _move(total, size, cluster, kept, rounded, norms, shift, D: tl.constexpr):
    """Centroids go to the means of their tokens; those of empty clusters stay as they are."""
    has_mean = size > 0
    old = kept + cluster[:, None] * D + tl.arange(0, D)[None, :]
    mean = total * (1.0 / tl.maximum(size, 1).to(tl.float32))[:, None]
    step = tl.where(has_mean[:, None], mean - tl.load(old, mask=has_mean[:, None], other=0.0), 0.0)
    # The largest of non-negative numbers, as integers: whoever comes first, the result is the same.
    moved = tl.max(tl.sum(step * step, 1), 0)
    tl.atomic_max(shift, moved.to(tl.int32, bitcast=True), sem="relaxed")
    tl.store(old, mean, mask=has_mean[:, None])
    _store_rounded(mean, cluster, has_mean, has_mean, rounded, norms, D)


@triton.jit(
    do_not_specialize=[
        "heads", "rows", "tokens", "chunks", "q_clusters", "k_clusters", "first_iterations", "iterations",
    ]
)  # fmt: skip
def cluster_kernel(
    q, k, flags, ctl, counters, progress, centroids, rounded, norms, labels, table, placed, sizes,
    order, offsets, stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    heads, rows, tokens, chunks, q_clusters, k_clusters, first_iterations, iterations, limit,
    D: tl.constexpr, SIDES: tl.constexpr, TOKENS: tl.constexpr, CENTROIDS: tl.constexpr,
    STEPS: tl.constexpr, TURNS: tl.constexpr, OWNED: tl.constexpr, BUCKETS: tl.constexpr,
    MEMBERS: tl.constexpr, CHUNKS: tl.constexpr, DEALT: tl.constexpr,
):  # fmt: skip
    """Grid: any number of programs that are all on the device at once.

    ``progress``, zeros: how many programs came to meetings so far; how many items of ``assign`` and of
    ``update`` were drawn, [iterations, 2], and of ``sort``; the largest step of a centroid, squared,
    [iterations, B·H, 2] as the bits of fp32. Every program finds for itself which sides (queries or
    keys of a head) have work, from what all wrote before a meeting, so all come to the same meetings.
    """
    PLACES: tl.constexpr = BUCKETS * OWNED
    clusters = q_clusters + k_clusters
    number = tl.arange(0, SIDES)
    inside = number < 2 * rows
    row = number % rows
    keys = number < rows  # they take longer to assign, so they come first
    slot = tl.load(ctl + _SLOT).to(tl.int64)
    rebuilds = tl.load(flags + row, mask=inside, other=0) != 0
    refreshes = tl.load(counters + (slot * rows + row) * _COLUMNS + _REFRESHES, mask=inside, other=0)
    until = tl.where(refreshes == 1, first_iterations, iterations)
    buckets = tl.cdiv(tl.where(keys, k_clusters, q_clusters), OWNED)
    most = tl.maximum(first_iterations, iterations)

    WHOLE: tl.constexpr = CENTROIDS if CENTROIDS > OWNED else OWNED
    begun = tl.cdiv(tl.where(keys, k_clusters, q_clusters), WHOLE) * (WHOLE // OWNED)
    ends = tl.cumsum(tl.where(rebuilds, begun, 0), 0)
    for item in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
        head, of_keys, bucket = _locate(item, ends, rows)
        x, stride_n = _tokens_of(
            q, k, head, of_keys, heads,
            stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
        )  # fmt: skip
        first = tl.load(counters + (slot * rows + head) * _COLUMNS + _REFRESHES) == 1
        place = head * clusters + tl.where(of_keys, q_clusters, 0)
        kept = centroids + (slot * rows * clusters + place) * D
        cluster = bucket * OWNED + tl.arange(0, OWNED)
        of_side = tl.where(of_keys, k_clusters, q_clusters)
        low = (head * 2 + of_keys) * PLACES
        _begin(x, stride_n, first, kept, rounded + low * D, norms + low, cluster, tokens, of_side, D)

    active = rebuilds
    iteration = 0
    if tl.max(active.to(tl.int32), 0) > 0:
        _meet(progress, 1)
    while tl.max(active.to(tl.int32), 0) > 0:
        deals = progress + 1 + 2 * iteration
        ends = tl.cumsum(tl.where(active, chunks, 0), 0)
        item = _draw(deals)
        while item < tl.max(ends, 0):
            head, of_keys, chunk = _locate(item, ends, rows)
            x, stride_n = _tokens_of(
                q, k, head, of_keys, heads,
                stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
            )  # fmt: skip
            side = head * 2 + of_keys
            of_side = tl.where(of_keys, k_clusters, q_clusters)
            _assign(
                x, stride_n, rounded + side * PLACES * D, norms + side * PLACES, labels + side * tokens,
                table + side * chunks * BUCKETS, chunk, tokens, of_side,
                D, TOKENS, CENTROIDS, STEPS, TURNS, OWNED, BUCKETS,
            )  # fmt: skip
            item = _draw(deals)
        _meet(progress, 4 * iteration + 2)

        side_ends = tl.cumsum(active.to(tl.int32), 0)
        for item in range(tl.program_id(0), tl.max(side_ends, 0), tl.num_programs(0)):
            head, of_keys, _ = _locate(item, side_ends, rows)
            _scan(table + (head * 2 + of_keys) * chunks * BUCKETS, chunks, BUCKETS, CHUNKS)
        _meet(progress, 4 * iteration + 3)

        for item in range(tl.program_id(0), tl.max(ends, 0), tl.num_programs(0)):
            head, of_keys, chunk = _locate(item, ends, rows)
            side = head * 2 + of_keys
            _place(
                labels + side * tokens, table + side * chunks * BUCKETS, placed + side * tokens,
                chunk, tokens, TOKENS * TURNS, DEALT, OWNED, BUCKETS,
            )  # fmt: skip
        _meet(progress, 4 * iteration + 4)

        shifts = progress + 2 + 2 * most + iteration * 2 * rows
        ends = tl.cumsum(tl.where(active, buckets, 0), 0)
        item = _draw(deals + 1)
        while item < tl.max(ends, 0):
            # From the last: buckets of queries, which are fewer, have more tokens each.
            head, of_keys, bucket = _locate(tl.max(ends, 0) - 1 - item, ends, rows)
            x, stride_n = _tokens_of(
                q, k, head, of_keys, heads,
                stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
            )  # fmt: skip
            side = head * 2 + of_keys
            place = head * clusters + tl.where(of_keys, q_clusters, 0)
            kept = centroids + (slot * rows * clusters + place) * D
            begin, end = _bucket_of(table + side * chunks * BUCKETS, bucket, tokens, BUCKETS)
            total, size = _sum_members(x, stride_n, placed + side * tokens, begin, end, D, MEMBERS, OWNED)
            cluster = bucket * OWNED + tl.arange(0, OWNED)
            low = side * PLACES
            tl.store(sizes + low + cluster, size)
            _move(total, size, cluster, kept, rounded + low * D, norms + low, shifts + side, D)
            item = _draw(deals + 1)
        _meet(progress, 4 * iteration + 5)

        moved = tl.load(shifts + 2 * row + keys, mask=inside, other=0).to(tl.float32, bitcast=True)
        iteration += 1
        active = active & (iteration < until) & (moved > limit)

    if order is not None:
        deals = progress + 1 + 2 * most
        ends = tl.cumsum(tl.where(rebuilds, buckets, 0), 0)
        item = _draw(deals)
        while item < tl.max(ends, 0):
            head, of_keys, bucket = _locate(tl.max(ends, 0) - 1 - item, ends, rows)
            side = head * 2 + of_keys
            begin, end = _bucket_of(table + side * chunks * BUCKETS, bucket, tokens, BUCKETS)
            cluster = bucket * OWNED + tl.arange(0, OWNED)
            of_side = tl.where(of_keys, k_clusters, q_clusters)
            size = tl.load(sizes + side * PLACES + cluster)
            next_place = begin + tl.cumsum(size, 0) - size
            to = offsets + (slot * rows + head) * (clusters + 2) + tl.where(of_keys, q_clusters + 1, 0)
            tl.store(to + cluster, next_place, mask=cluster < of_side)
            tl.store(to + of_side, tokens, mask=bucket == 0)
            to = order + (slot * rows * 2 + side) * tokens
            _sort(placed + side * tokens, to, begin, end, next_place, DEALT, OWNED)
            item = _draw(deals)


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
    order: Tensor | None = None,
    offsets: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Cluster the heads that rebuild, moving their centroids in place; the reference is ``kmeans``.

    The last iteration has brought the tokens almost into the order of their clusters. Where ``order`` and
    ``offsets`` are given they get what ``cluster_order`` would make of the labels.

    Args:
        q, k: [B, H, N, D], last stride 1, D a power of two.
        flags: int32 [B, H], 1 where the head rebuilds; ``ctl``: int32 [8].
        counters: int64 [S, B, H, 8]; a head's first rebuild of the video starts from its tokens.
        centroids: fp32 [S, B, H, C, D], of queries, then of keys; contiguous.
        q_clusters: how many are of queries.
        first_iterations, iterations: at the first rebuild of a video, and at every other.
        tolerance: see the reference.
        order: int32 [S, B, H, 2, N], contiguous, or nothing; ``offsets``: int32 [S, B, H, C + 2], with it.
        tiles: launch configuration; None: what ``choose_tiles`` says.

    Returns:
        labels, int32 [B, H, 2, N]; unspecified where the flag is 0.
    """
    batch, heads, tokens, dim = q.shape
    clusters = centroids.shape[3]
    tiles = tiles or choose_tiles(_capability(q.device), q.element_size())
    rows = batch * heads
    labels = torch.empty(batch, heads, 2, tokens, dtype=torch.int32, device=q.device)
    noted = 2 + max(first_iterations, iterations) * (2 + 2 * rows)
    progress = torch.zeros(noted, dtype=torch.int32, device=q.device)
    chunks = triton.cdiv(tokens, tiles.tokens * tiles.turns)
    k_clusters = clusters - q_clusters
    buckets = _padded(triton.cdiv(max(q_clusters, k_clusters), tiles.owned))
    places = (rows, 2, buckets * tiles.owned)
    rounded = torch.empty(*places, dim, dtype=q.dtype, device=q.device)
    norms = torch.empty(places, dtype=torch.float32, device=q.device)
    sizes = torch.empty(places, dtype=torch.int32, device=q.device)
    table = torch.empty(rows, 2, chunks, buckets, dtype=torch.int32, device=q.device)
    launchable(cluster_kernel)[(_programs(q.device, tiles.programs),)](
        q, k, flags, ctl, counters, progress, centroids, rounded, norms, labels, table,
        torch.empty_like(labels), sizes, order, offsets, *q.stride()[:3], *k.stride()[:3],
        heads, rows, tokens, chunks, q_clusters, k_clusters, first_iterations, iterations, tolerance**2,
        D=dim, SIDES=_padded(2 * rows), TOKENS=tiles.tokens, CENTROIDS=tiles.centroids,
        STEPS=fold_steps(tiles), TURNS=tiles.turns, OWNED=tiles.owned, BUCKETS=buckets,
        MEMBERS=tiles.members, CHUNKS=tiles.chunks, DEALT=tiles.dealt,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, maxnreg=tiles.registers,
        launch_cooperative_grid=True,
    )  # fmt: skip
    return labels


def _programs(device: torch.device, a_processor: int) -> int:
    """Programs that wait for each other: so many a multiprocessor that all are there at once.

    A cooperative launch is refused, with an error, where they do not fit. Triton's interpreter runs one
    program after the other, so there it is one, which never waits.
    """
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count * a_processor


def _padded(size: int) -> int:
    """A power of two, and never so small that a warp has no element of it."""
    return max(32, triton.next_power_of_2(size))


def _capability(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
