"""Block-sparse attention for Hopper, Gluon: persistent, two warps that fetch, two warp groups that compute.

The same mathematics as ``kernel.py``, with the schedule written out that Triton's compiler does not find:

    scheduler    the next tile and where its list ends → shared memory, a tile ahead
    producer     Q, then for every kept block Kⱼ and Vⱼ₋₁, by TMA
    consumer c   rows 64·c … 64·c + 63 of the tile; for every block j:
                     issue S = Q·Kⱼᵀ and O += P·Vⱼ₋₁  →  wait for S  →  softmax of S while P·V runs  →  P

* A consumer's softmax runs under its own P·V and under the other's products. Taking turns at issuing products
  (FlashAttention-3 §3.1 calls it ping-pong) is a variant; the consumers fall into step without it.
* Outputs are rescaled only where a maximum has grown, a warp at a time (``hopper_softmax.py``).
* K and V are given back by every thread for itself. One arrival a consumer would need its four warps together
  first, twice a block; cp.async's arrival, which counts threads and here follows no copy, needs nobody.
* K goes a block ahead of V, and V is waited for when Q·Kᵀ is on its way already.
* The list of a row is walked backwards. Indices ascend, so the one block that can reach past the last token
  comes first, outside of the loop, and no iteration pays for masking.
* Tiles are fetched from a counter: a multiprocessor that got short rows takes more of them. Rows of a head
  follow each other, so that its K and V stay in L2; the last ones go by length (``tail_order.py``).
* The output leaves through the shared memory of the tile's own Q, by TMA, which clips the ragged last block.

It takes a head dim of 128: with 64 a GPU gave NaN at 396 tiles, the right output at one. Why is not known.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from haste_compile.errors import InputError
from haste_compile.kernels.block_mask import BlockMask
from haste_compile.kernels.block_sparse_attention.kernel import check_inputs, tma_ready
from haste_compile.kernels.block_sparse_attention.tail_order import TAIL, order_tail
from haste_compile.kernels.hopper_softmax import lane_sums, rescale_rows, times_rows
from haste_compile.kernels.launching import described, launchable

#: Query tokens, and key tokens, of a tile.
BLOCK = 128
#: Features of a head.
DIM = 128

_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_DONE = gl.constexpr(-1)
#: Threads of both consumers: arrivals at the barrier of a buffer of K or V that is given back.
_RELEASES = gl.constexpr(256)

# One name in triton 3.6, another in 3.7: a barrier of the warps of a partition.
_synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _schedule(
    work, work_full, work_empty, counts, indices, order, counter, key_blocks, tiles, TAIL: gl.constexpr
):  # fmt: skip
    """One warp: fetch tiles from the counter. What that waits for lies under the tile before."""
    one_warp: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    tail = gl.maximum(tiles - TAIL, 0)
    position = gl.program_id(0)
    done = 0
    while position < tiles:
        tile = gl.load(order + (position - tail), mask=position >= tail, other=position)
        kept = gl.load(counts + tile)
        last = gl.load(indices + tile.to(gl.int64) * key_blocks + kept - 1)
        work.index(0).store(gl.full([1], tile, gl.int32, layout=one_warp))
        work.index(1).store(gl.full([1], kept, gl.int32, layout=one_warp))
        work.index(2).store(gl.full([1], last, gl.int32, layout=one_warp))
        _synchronise()
        mbarrier.arrive(work_full.index(0))
        mbarrier.wait(work_empty.index(0), done & 1)
        done += 1
        position = gl.num_programs(0) + gl.atomic_add(counter, 1)
    work.index(0).store(gl.full([1], _DONE, gl.int32, layout=one_warp))
    _synchronise()
    mbarrier.arrive(work_full.index(0))


@gluon.jit
def _next_tile(work, work_full, work_empty, done, LAYOUT: gl.constexpr):
    """Tile, length of its list, last index in it; tells the scheduler that this partition has read them."""
    mbarrier.wait(work_full.index(0), done & 1)
    tile = gl.max(work.index(0).load(LAYOUT), 0)
    kept = gl.max(work.index(1).load(LAYOUT), 0)
    last = gl.max(work.index(2).load(LAYOUT), 0)
    mbarrier.arrive(work_empty.index(0))
    return tile, kept, last


@gluon.jit
def _load(
    x, batch, head, start, tiles, full, empty, block, BYTES: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Fetch 128 rows of K or V into the buffer of the ``block``-th block, when that is free."""
    stage = block % STAGES
    mbarrier.wait(empty.index(stage), (block // STAGES & 1) ^ 1)
    mbarrier.expect(full.index(stage), BYTES)
    tma.async_copy_global_to_shared(x, [batch, head, start, 0], full.index(stage), tiles.index(stage))


@gluon.jit
def _produce(
    q, k, v, q_tiles, k_tiles, v_tiles, work, work_full, work_empty,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    indices, heads, query_blocks, key_blocks,
    D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: keep the loads of Q, K and V in flight."""
    TILE_BYTES: gl.constexpr = 128 * D * q.dtype.primitive_bitwidth // 8
    one_warp: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    done = 0
    block = 0  # K and V blocks loaded so far, over all tiles
    tile, kept, index = _next_tile(work, work_full, work_empty, done, one_warp)
    while tile >= 0:
        row_indices = indices + tile.to(gl.int64) * key_blocks
        block_row = tile % query_blocks
        head = tile // query_blocks % heads
        batch = tile // query_blocks // heads

        slot = done % Q_STAGES
        mbarrier.wait(q_empty.index(slot), (done // Q_STAGES & 1) ^ 1)
        mbarrier.expect(q_full.index(slot), TILE_BYTES)
        for half in gl.static_range(2):
            tma.async_copy_global_to_shared(
                q, [batch, head, block_row * 128 + half * 64, 0], q_full.index(slot),
                q_tiles.index(slot * 2 + half),
            )  # fmt: skip

        value_start = 0
        for step in range(kept):
            key_start = index * 128
            index = gl.load(row_indices + gl.maximum(kept - 2 - step, 0))
            _load(k, batch, head, key_start, k_tiles, k_full, k_empty, block, TILE_BYTES, STAGES)
            if step > 0:
                _load(v, batch, head, value_start, v_tiles, v_full, v_empty, block - 1, TILE_BYTES, STAGES)
            value_start = key_start
            block += 1
        _load(v, batch, head, value_start, v_tiles, v_full, v_empty, block - 1, TILE_BYTES, STAGES)
        done += 1
        tile, kept, index = _next_tile(work, work_full, work_empty, done, one_warp)


@gluon.jit
def _matrix(tile, D: gl.constexpr, ROWS: gl.constexpr):
    """Shared memory [1, 1, ROWS, D] seen as [ROWS, D]."""
    return tile.reshape([ROWS, D])


@gluon.jit
def _release(empty):
    """This thread's products have read the buffer."""
    async_copy.mbarrier_arrive(empty, increment_count=False)


@gluon.jit
def _consume(
    out, lse, q_tiles, k_tiles, v_tiles, work, work_full, work_empty,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
    heads, query_blocks, tokens, scale,
    CONSUMER: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    RAGGED: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of every tile."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    score_row: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_row: gl.constexpr = gl.SliceLayout(1, out_layout)
    four_warps: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])

    scale_log2 = scale * _LOG2_E
    my_turn = turns.index(CONSUMER)
    other_turn = turns.index(1 - CONSUMER)
    block = 0
    done = 0
    tile, kept, last = _next_tile(work, work_full, work_empty, done, four_warps)
    while tile >= 0:
        slot = done % Q_STAGES
        mbarrier.wait(q_full.index(slot), done // Q_STAGES & 1)
        queries_at = q_tiles.index(slot * 2 + CONSUMER)
        queries = _matrix(queries_at, D, 64)

        # The first block: the only one that can hold keys past the last token.
        mbarrier.wait(k_full.index(block % STAGES), block // STAGES & 1)
        if IN_TURNS:
            mbarrier.wait(my_turn, block & 1)
        scores = warpgroup_mma(
            queries, _matrix(k_tiles.index(block % STAGES), D, 128).permute((1, 0)),
            gl.zeros([64, 128], gl.float32, score_layout), use_acc=False, is_async=True,
        )  # fmt: skip
        if IN_TURNS:
            mbarrier.arrive(other_turn)
        scores = warpgroup_mma_wait(0, deps=[scores])
        _release(k_empty.index(block % STAGES))
        if RAGGED:
            keys = last * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, score_layout))
            scores = gl.where((keys < tokens)[None, :], scores, float("-inf"))
        row_max = gl.max(scores, 1) * scale_log2
        weights = gl.exp2(scores * scale_log2 - row_max[:, None])
        row_sum = lane_sums(weights)
        weights_16 = gl.convert_layout(weights.to(out.dtype), weight_layout)
        accumulator = gl.zeros([64, D], gl.float32, out_layout)

        for _ in range(1, kept):
            value_stage = block % STAGES
            value_phase = block // STAGES & 1
            block += 1
            key_stage = block % STAGES
            mbarrier.wait(k_full.index(key_stage), block // STAGES & 1)
            if IN_TURNS:
                mbarrier.wait(my_turn, block & 1)
            scores = warpgroup_mma(
                queries, _matrix(k_tiles.index(key_stage), D, 128).permute((1, 0)),
                gl.zeros([64, 128], gl.float32, score_layout), use_acc=False, is_async=True,
            )  # fmt: skip
            mbarrier.wait(v_full.index(value_stage), value_phase)
            accumulator = warpgroup_mma(
                weights_16, _matrix(v_tiles.index(value_stage), D, 128), accumulator, is_async=True
            )
            if IN_TURNS:
                mbarrier.arrive(other_turn)
            scores = warpgroup_mma_wait(1, deps=[scores])
            new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
            rescale = gl.exp2(row_max - new_max)
            weights = gl.exp2(scores * scale_log2 - new_max[:, None])
            row_sum = times_rows(row_sum, rescale) + lane_sums(weights)
            row_max = new_max
            # This wait is over: it is that of this block's values again. ptxas moves arithmetic across waits
            # for products but not across a loop, and would put all of the softmax after the next one.
            mbarrier.wait(v_full.index(value_stage), value_phase)
            accumulator = warpgroup_mma_wait(0, deps=[accumulator])
            _release(k_empty.index(key_stage))
            _release(v_empty.index(value_stage))
            accumulator = rescale_rows(accumulator, rescale, out_layout)
            weights_16 = gl.convert_layout(weights.to(out.dtype), weight_layout)

        value_stage = block % STAGES
        mbarrier.wait(v_full.index(value_stage), block // STAGES & 1)
        accumulator = warpgroup_mma(
            weights_16, _matrix(v_tiles.index(value_stage), D, 128), accumulator, is_async=True
        )
        block += 1
        sums = gl.convert_layout(gl.sum(row_sum, 1), score_row)
        block_row = tile % query_blocks
        head_of_all = tile // query_blocks
        start = block_row * 128 + CONSUMER * 64
        rows = gl.arange(0, 64, layout=score_row)
        lse_at = lse + head_of_all.to(gl.int64) * tokens + start
        gl.store(lse_at + rows, (row_max + gl.log2(sums)) * _LN_2, mask=rows < tokens - start)
        accumulator = warpgroup_mma_wait(0, deps=[accumulator])
        _release(v_empty.index(value_stage))

        result = accumulator * gl.convert_layout(1.0 / sums, out_row)[:, None]
        # Every warp has read its queries; none may still be writing the output of an earlier tile.
        _synchronise()
        queries.store(result.to(out.dtype))
        fence_async_shared()
        _synchronise()
        tma.async_copy_shared_to_global(
            out, [head_of_all // heads, head_of_all % heads, start, 0], queries_at
        )
        tma.store_wait(0)
        _synchronise()
        mbarrier.arrive(q_empty.index(slot))

        done += 1
        tile, kept, last = _next_tile(work, work_full, work_empty, done, four_warps)


@gluon.jit(do_not_specialize=["heads", "query_blocks", "key_blocks", "tokens", "tiles"])
def block_sparse_attention_hopper(
    q, k, v, out, lse, counts, indices, order, counter,
    heads, query_blocks, key_blocks, tokens, tiles, scale,
    D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    RAGGED: gl.constexpr, IN_TURNS: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    """Grid: at most as many programs as multiprocessors.

    Args:
        q, out: TMA descriptors of [B, H, N, D] with box [1, 1, 64, D].
        k, v: the same with box [1, 1, 128, D].
        lse: pointer to fp32 [B, H, N], contiguous.
        counts, indices: pointers to int32 [B, H, Tq] and [B, H, Tq, key_blocks], contiguous.
        order: pointer to int32 [TAIL], what the last tiles are worked on in; unread where TAIL is 0.
        counter: pointer to an int32 that is 0.
        tiles: B·H·Tq. tokens: N. scale: factor of q·k, > 0.
        RAGGED: N is no multiple of 128.
    """
    q_tiles = gl.allocate_shared_memory(q.dtype, [2 * Q_STAGES, 1, 1, 64, D], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, 128, D], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, 128, D], v.layout)
    work = gl.allocate_shared_memory(gl.int32, [3, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    work_full = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    work_empty = gl.allocate_shared_memory(gl.int64, [1, 1], barrier)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    mbarrier.init(work_full.index(0), count=1)
    mbarrier.init(work_empty.index(0), count=3)  # the producer and both consumers
    for slot in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(q_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=_RELEASES)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=_RELEASES)
    for consumer in gl.static_range(2):
        mbarrier.init(turns.index(consumer), count=1)
    fence_async_shared()
    _synchronise()
    mbarrier.arrive(turns.index(0))  # the first consumer begins

    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out, lse, q_tiles, k_tiles, v_tiles, work, work_full, work_empty,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, query_blocks, tokens, scale,
                    0, D, STAGES, Q_STAGES, RAGGED, IN_TURNS,
                ),
            ),
            (
                _consume,
                (
                    out, lse, q_tiles, k_tiles, v_tiles, work, work_full, work_empty,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turns,
                    heads, query_blocks, tokens, scale,
                    1, D, STAGES, Q_STAGES, RAGGED, IN_TURNS,
                ),
            ),
            (
                _produce,
                (
                    q, k, v, q_tiles, k_tiles, v_tiles, work, work_full, work_empty,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    indices, heads, query_blocks, key_blocks,
                    D, STAGES, Q_STAGES,
                ),
            ),
            (
                _schedule,
                (work, work_full, work_empty, counts, indices, order, counter, key_blocks, tiles, TAIL),
            ),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the work of a multiprocessor is laid out.

    Attributes:
        stages: tiles of K, and of V, in shared memory.
        q_stages: tiles of Q; the second hides the load of the next Q and the store of the last output.
        in_turns: the consumers issue their products one after the other.
        tail: this many tiles, the last, go by length; 0: none.

    Shared memory is (stages + q_stages / 2) · 4 · BLOCK · D bytes: 192 KB for the default and D = 128.
    """

    stages: int = 2
    q_stages: int = 2
    in_turns: bool = False
    tail: int = TAIL


def suits(q: Tensor, k: Tensor, v: Tensor, block: int) -> bool:
    """Whether this kernel computes it; Triton's takes the rest."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and block == BLOCK
        and q.shape[-1] == DIM
        and all(map(tma_ready, (q, k, v)))
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    block: int,
    scale: float,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`kernel.attend`, for what :func:`suits` it.

    Raises:
        InputError: as there; also what does not suit.
    """
    check_inputs(q, k, v, mask, block, scale)
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if lse is None else lse
    if not (suits(q, k, v, block) and tma_ready(out)):
        raise InputError(
            found=f"blocks of {block}, head dim {q.shape[-1]}, {q.device}, "
            f"strides {q.stride()}, {k.stride()}, {v.stride()}, {out.stride()}",
            wanted=f"blocks of {BLOCK}, head dim {DIM}, a Hopper GPU, addresses and strides of 16·n bytes",
            where="Hopper's kernel of block_sparse_attention",
            fix="Use the Triton kernel.",
        )
    batch, heads, tokens, dim = q.shape
    query_blocks, key_blocks = mask.indices.shape[2:]
    tiles = batch * heads * query_blocks
    schedule = schedule or Schedule()
    order, counter = order_tail(mask.counts, schedule.tail)
    programs = min(tiles, torch.cuda.get_device_properties(q.device).multi_processor_count)
    launchable(block_sparse_attention_hopper)[(programs,)](
        _descriptor(q, BLOCK // 2), _descriptor(k, BLOCK), _descriptor(v, BLOCK),
        _descriptor(out, BLOCK // 2),
        lse, mask.counts, mask.indices, order, counter,
        heads, query_blocks, key_blocks, tokens, tiles, scale,
        D=dim, STAGES=schedule.stages, Q_STAGES=schedule.q_stages,
        RAGGED=tokens % BLOCK != 0, IN_TURNS=schedule.in_turns, TAIL=schedule.tail,
        num_warps=4,
    )  # fmt: skip
    return out, lse


def _descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of [B, H, N, D]; its third bound clips the ragged last block of every head alike."""
    # The stride along an axis of one element is free, and some views put there what TMA does not take.
    strides = [step if size > 1 else x.shape[-1] for step, size in zip(x.stride(), x.shape, strict=True)]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(described(x), list(x.shape), [*strides[:3], 1], [1, 1, rows, x.shape[-1]], layout)
