"""Variable-block attention for Hopper, Gluon: persistent, four warps that gather, two consumer warp groups.

The schedule of ``block_sparse_attention/hopper.py``: read that first. What differs is what TMA cannot do,
since neither the queries of a cluster nor the keys that it keeps lie side by side:

    producer     tile number → shared memory; Q, then for every 128 listed keys K and V, row by row
    consumer c   rows 64·c … 64·c + 63 of the row tile; the loop as there; results go back row by row

* A row is 256 bytes, sixteen copies of 16 by ``cp.async``, straight into the swizzled tile that ``wgmma``
  reads. Every producing thread's arrival is left to the barrier (``noinc``): it happens when the copies that
  the thread has issued are there, and no thread waits for them.
* ``cp.async`` writes by the generic proxy and ``wgmma`` reads by the asynchronous one. A fence must lie on
  the way from one to the other; it is the consumer's, after its wait.
* The tokens of the next 128 keys are loaded before the present ones are copied.
* A list is walked backwards, so that the one tile that may be ragged comes first, outside of the loop. What
  is past the end of a list or of a cluster repeats its last token: it is masked, or not stored, and what
  dropped keys hold is never read.
* Tiles are fetched from a counter.
* A row tile of at most 64 rows leaves nothing for the second consumer, which then only passes buffers on.
* The output leaves through the shared memory of the tile's own Q, 16 bytes a thread.
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
    warpgroup_mma,
    warpgroup_mma_wait,
)

from haste_compile.errors import InputError
from haste_compile.kernels.hopper_softmax import lane_sums, rescale_rows, times_rows
from haste_compile.kernels.launching import address, launchable
from haste_compile.kernels.layout import Ctl
from haste_compile.kernels.variable_block_attention.work_lists import SMALL_LAST, turns

#: Query tokens of a row tile, and key tokens of a step.
BLOCK = 128
#: Features of a head.
DIM = 128

_SLOT = gl.constexpr(int(Ctl.SLOT))
_DENSE = gl.constexpr(int(Ctl.DENSE))
_LOG2_E = gl.constexpr(1.4426950408889634)
_LN_2 = gl.constexpr(0.6931471805599453)
_DONE = gl.constexpr(-1)
#: Threads of the producer: arrivals of a barrier that its copies complete.
_PRODUCERS = gl.constexpr(128)

# One name in triton 3.6, another in 3.7: a barrier of the warps of a partition.
_synchronise = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.jit
def _listed(listed, first, count, rows: gl.constexpr):
    """Tokens of the 128 places from ``first`` of a list of ``count``; past its end the last one's."""
    place = gl.minimum(first + gl.arange(0, 128, layout=rows), gl.maximum(count - 1, 0))
    return gl.load(listed + place, mask=place < count, other=0)


@gluon.jit
def _in_order(order, place, sparse):
    """Tokens at places of a head's order; in a dense step there is none: a place is a token's number."""
    return gl.load(order + place, mask=(place >= 0) & (sparse != 0), other=0) + place * (1 - sparse)


@gluon.jit
def _gather(tile, base, token, stride, D: gl.constexpr, copy_layout: gl.constexpr):
    """Copy a row for every token into shared memory; returns before it is there."""
    feature = gl.arange(0, D, layout=gl.SliceLayout(0, copy_layout))
    rows = base + (token * stride)[:, None]  # 32 bits, see suits()
    async_copy.async_copy_global_to_shared(tile, rows + feature[None, :])


@gluon.jit
def _produce(
    q, k, v, order, ctl, tiles, counts, lists, counter, q_tiles, k_tiles, v_tiles, work,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn, stride_vb, stride_vh, stride_vn,
    first, all_heads, heads, tokens, q_clusters, most, row_tiles,
    D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps: fetch tiles from the counter and keep the copies of Q, K and V in flight."""
    # Eight threads copy 128 bytes of a row: whole lines, and no two of them the same bank.
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    copy_row: gl.constexpr = gl.SliceLayout(1, copy_layout)
    four_warps: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    slot_heads = gl.load(ctl + _SLOT).to(gl.int64) * all_heads
    sparse = gl.maximum(1 - gl.load(ctl + _DENSE), 0)
    tile = gl.program_id(0)
    round_of_q = 0
    block = 0  # K and V blocks copied so far, over all tiles
    while tile < row_tiles:
        # Fetched here, needed after the tile: its wait lies under the last copies of the tile before.
        following = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        cluster = gl.load(tiles + tile * 3)
        begin = gl.load(tiles + tile * 3 + 1)  # rubbish where there is no cluster
        end = gl.load(tiles + tile * 3 + 2)
        if cluster >= 0:
            list_row = (tile // most).to(gl.int64) * q_clusters + cluster
            count = gl.load(counts + list_row)
            listed = lists + list_row * tokens
            last = (gl.maximum(count, 1) - 1) // 128
            token = _listed(listed, last * 128, count, copy_row)
            head = first + tile // most
            batch_of = (head // heads).to(gl.int64)
            head_of = (head % heads).to(gl.int64)

            slot = round_of_q % Q_STAGES
            mbarrier.wait(q_empty.index(slot), (round_of_q // Q_STAGES & 1) ^ 1)
            work.index(slot * 4).store(gl.full([1], head, gl.int32, layout=four_warps))
            work.index(slot * 4 + 1).store(gl.full([1], begin, gl.int32, layout=four_warps))
            work.index(slot * 4 + 2).store(gl.full([1], end, gl.int32, layout=four_warps))
            work.index(slot * 4 + 3).store(gl.full([1], count, gl.int32, layout=four_warps))
            order_of_head = order + (slot_heads + head) * 2 * tokens
            queries_of_head = q + batch_of * stride_qb + head_of * stride_qh
            for half in gl.static_range(2):
                place = gl.minimum(begin + half * 64 + gl.arange(0, 64, layout=copy_row), end - 1)
                row = _in_order(order_of_head, place, sparse)
                _gather(q_tiles.index(slot * 2 + half), queries_of_head, row, stride_qn, D, copy_layout)
            async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
            _synchronise()
            mbarrier.arrive(q_full.index(slot))  # the copies' arrivals do not vouch for these stores
            round_of_q += 1

            keys_of_head = k + batch_of * stride_kb + head_of * stride_kh
            values_of_head = v + batch_of * stride_vb + head_of * stride_vh
            for step in range(last + 1):
                stage = block % STAGES
                free = (block // STAGES & 1) ^ 1
                upcoming = _listed(listed, gl.maximum(last - 1 - step, 0) * 128, count, copy_row)
                mbarrier.wait(k_empty.index(stage), free)
                _gather(k_tiles.index(stage), keys_of_head, token, stride_kn, D, copy_layout)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), free)
                _gather(v_tiles.index(stage), values_of_head, token, stride_vn, D, copy_layout)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                token = upcoming
                block += 1
        tile = following

    slot = round_of_q % Q_STAGES
    mbarrier.wait(q_empty.index(slot), (round_of_q // Q_STAGES & 1) ^ 1)
    work.index(slot * 4).store(gl.full([1], _DONE, gl.int32, layout=four_warps))
    async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
    _synchronise()
    mbarrier.arrive(q_full.index(slot))


@gluon.jit
def _number(work, place):
    """What the producer wrote there."""
    four_warps: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    return gl.max(work.index(place).load(four_warps), 0)


@gluon.jit
def _consume(
    out, lse, order, ctl, q_tiles, k_tiles, v_tiles, work,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
    stride_ob, stride_oh, stride_on, all_heads, heads, tokens, scale,
    CONSUMER: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    IN_TURNS: gl.constexpr,
):  # fmt: skip
    """One warp group: 64 rows of every tile."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    score_row: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_row: gl.constexpr = gl.SliceLayout(1, out_layout)
    copy_layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    copy_row: gl.constexpr = gl.SliceLayout(1, copy_layout)
    element: gl.constexpr = out.dtype.element_ty

    scale_log2 = scale * _LOG2_E
    slot_heads = gl.load(ctl + _SLOT).to(gl.int64) * all_heads
    sparse = gl.maximum(1 - gl.load(ctl + _DENSE), 0)
    my_turn = turn.index(CONSUMER)
    other_turn = turn.index(1 - CONSUMER)
    block = 0
    round_of_q = 0
    slot = 0
    mbarrier.wait(q_full.index(0), 0)
    head = _number(work, 0)
    while head >= 0:
        start = _number(work, slot * 4 + 1) + CONSUMER * 64
        end = _number(work, slot * 4 + 2)
        count = _number(work, slot * 4 + 3)
        steps = (gl.maximum(count, 1) - 1) // 128
        if start < end:
            queries = q_tiles.index(slot * 2 + CONSUMER)

            # The last keys of the list: the only block that can be ragged.
            mbarrier.wait(k_full.index(block % STAGES), block // STAGES & 1)
            fence_async_shared()
            if IN_TURNS:
                mbarrier.wait(my_turn, block & 1)
            scores = warpgroup_mma(
                queries, k_tiles.index(block % STAGES).permute((1, 0)),
                gl.zeros([64, 128], gl.float32, score_layout), use_acc=False, is_async=True,
            )  # fmt: skip
            if IN_TURNS:
                mbarrier.arrive(other_turn)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(k_empty.index(block % STAGES))
            column = steps * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, score_layout))
            scores = gl.where((column < count)[None, :], scores, float("-inf"))
            row_max = gl.max(scores, 1) * scale_log2
            weights = gl.exp2(scores * scale_log2 - row_max[:, None])
            row_sum = lane_sums(weights)
            weights_16 = gl.convert_layout(weights.to(element), weight_layout)
            accumulator = gl.zeros([64, D], gl.float32, out_layout)

            for _ in range(steps):
                value_stage = block % STAGES
                value_phase = block // STAGES & 1
                block += 1
                key_stage = block % STAGES
                mbarrier.wait(k_full.index(key_stage), block // STAGES & 1)
                mbarrier.wait(v_full.index(value_stage), value_phase)
                fence_async_shared()
                if IN_TURNS:
                    mbarrier.wait(my_turn, block & 1)
                scores = warpgroup_mma(
                    queries, k_tiles.index(key_stage).permute((1, 0)),
                    gl.zeros([64, 128], gl.float32, score_layout), use_acc=False, is_async=True,
                )  # fmt: skip
                accumulator = warpgroup_mma(
                    weights_16, v_tiles.index(value_stage), accumulator, is_async=True
                )
                if IN_TURNS:
                    mbarrier.arrive(other_turn)
                scores = warpgroup_mma_wait(1, deps=[scores])
                mbarrier.arrive(k_empty.index(key_stage))
                new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
                rescale = gl.exp2(row_max - new_max)
                weights = gl.exp2(scores * scale_log2 - new_max[:, None])
                row_sum = times_rows(row_sum, rescale) + lane_sums(weights)
                row_max = new_max
                # Over already: it keeps ptxas from putting the softmax after the products (see the sibling).
                mbarrier.wait(v_full.index(value_stage), value_phase)
                accumulator = warpgroup_mma_wait(0, deps=[accumulator])
                mbarrier.arrive(v_empty.index(value_stage))
                accumulator = rescale_rows(accumulator, rescale, out_layout)
                weights_16 = gl.convert_layout(weights.to(element), weight_layout)

            value_stage = block % STAGES
            mbarrier.wait(v_full.index(value_stage), block // STAGES & 1)
            fence_async_shared()
            accumulator = warpgroup_mma(weights_16, v_tiles.index(value_stage), accumulator, is_async=True)
            block += 1
            sums = gl.convert_layout(gl.sum(row_sum, 1), score_row)
            order_of_head = order + (slot_heads + head) * 2 * tokens
            place = gl.minimum(start + gl.arange(0, 64, layout=score_row), end - 1)
            row = _in_order(order_of_head, place, sparse)
            inside = start + gl.arange(0, 64, layout=score_row) < end
            lse_of_head = lse + head.to(gl.int64) * tokens
            gl.store(lse_of_head + row, (row_max + gl.log2(sums)) * _LN_2, mask=inside)
            place = gl.minimum(start + gl.arange(0, 64, layout=copy_row), end - 1)
            row = _in_order(order_of_head, place, sparse)
            inside = start + gl.arange(0, 64, layout=copy_row) < end
            accumulator = warpgroup_mma_wait(0, deps=[accumulator])
            mbarrier.arrive(v_empty.index(value_stage))

            result = accumulator * gl.convert_layout(1.0 / sums, out_row)[:, None]
            # Every warp has read its queries; none may still be writing the output of an earlier tile.
            _synchronise()
            queries.store(result.to(element))
            _synchronise()
            of_head = out + (head // heads).to(gl.int64) * stride_ob + (head % heads).to(gl.int64) * stride_oh
            feature = gl.arange(0, D, layout=gl.SliceLayout(0, copy_layout))
            target = of_head + (row * stride_on)[:, None] + feature[None, :]
            gl.store(target, queries.load(copy_layout), mask=inside[:, None])
        else:
            for _ in range(steps + 1):
                stage = block % STAGES
                phase = block // STAGES & 1
                mbarrier.wait(k_full.index(stage), phase)
                if IN_TURNS:
                    mbarrier.wait(my_turn, block & 1)
                    mbarrier.arrive(other_turn)
                mbarrier.arrive(k_empty.index(stage))
                mbarrier.wait(v_full.index(stage), phase)
                mbarrier.arrive(v_empty.index(stage))
                block += 1
        _synchronise()
        mbarrier.arrive(q_empty.index(slot))

        round_of_q += 1
        slot = round_of_q % Q_STAGES
        mbarrier.wait(q_full.index(slot), round_of_q // Q_STAGES & 1)
        head = _number(work, slot * 4)


@gluon.jit(do_not_specialize=["first", "all_heads", "heads", "tokens", "q_clusters", "most", "row_tiles"])
def variable_block_attention_hopper(
    q, k, v, out, lse, order, ctl, tiles, counts, lists, counter,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    first, all_heads, heads, tokens, q_clusters, most, row_tiles, scale,
    D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, IN_TURNS: gl.constexpr,
):  # fmt: skip
    """Grid: at most as many programs as multiprocessors.

    Args:
        q, k, v, out: pointers to [B, H, N, D], last stride 1, the others multiples of 16.
        lse: pointer to fp32 [B, H, N], contiguous.
        order, ctl: of the state; tiles, counts, lists: what the kernels of ``work_lists`` made.
        counter: pointer to an int32 that is 0.
        row_tiles: places in ``tiles``, heads of this turn times ``most``.
        scale: factor of q·k, > 0.
    """
    element: gl.constexpr = q.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    q_tiles = gl.allocate_shared_memory(element, [2 * Q_STAGES, 64, D], swizzled)
    k_tiles = gl.allocate_shared_memory(element, [STAGES, 128, D], swizzled)
    v_tiles = gl.allocate_shared_memory(element, [STAGES, 128, D], swizzled)
    # Of a row tile: head (or that there is none), first and last + 1 place in the order, listed keys.
    work = gl.allocate_shared_memory(gl.int32, [4 * Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for slot in gl.static_range(Q_STAGES):
        mbarrier.init(q_full.index(slot), count=_PRODUCERS + 1)
        mbarrier.init(q_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=_PRODUCERS)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=_PRODUCERS)
        mbarrier.init(v_empty.index(stage), count=2)
    for consumer in gl.static_range(2):
        mbarrier.init(turn.index(consumer), count=1)
    fence_async_shared()
    _synchronise()
    mbarrier.arrive(turn.index(0))  # the first consumer begins

    gl.warp_specialize(
        [
            (
                _consume,
                (
                    out, lse, order, ctl, q_tiles, k_tiles, v_tiles, work,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
                    stride_ob, stride_oh, stride_on, all_heads, heads, tokens, scale,
                    0, D, STAGES, Q_STAGES, IN_TURNS,
                ),
            ),
            (
                _consume,
                (
                    out, lse, order, ctl, q_tiles, k_tiles, v_tiles, work,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn,
                    stride_ob, stride_oh, stride_on, all_heads, heads, tokens, scale,
                    1, D, STAGES, Q_STAGES, IN_TURNS,
                ),
            ),
            (
                _produce,
                (
                    q, k, v, order, ctl, tiles, counts, lists, counter,
                    q_tiles, k_tiles, v_tiles, work,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
                    stride_vb, stride_vh, stride_vn,
                    first, all_heads, heads, tokens, q_clusters, most, row_tiles,
                    D, STAGES, Q_STAGES,
                ),
            ),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the work of a multiprocessor is laid out.

    Attributes:
        stages: tiles of K, and of V, in shared memory.
        q_stages: tiles of Q; the second hides the gathering of the next Q and the store of the last output.
        in_turns: the consumers issue their products one after the other.
        workspace: bytes of key lists; more of them, fewer turns of heads, each of which ends unevenly.
        small_last: the order of a turn's tiles, see ``work_lists.turns``.

    Shared memory is (stages + q_stages / 2) · 4 · BLOCK · D bytes: 192 KB for the default.
    """

    stages: int = 2
    q_stages: int = 2
    in_turns: bool = False
    workspace: int = 1 << 30
    small_last: bool = SMALL_LAST


def suits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether this kernel computes it; Triton's takes the rest."""
    return (
        q.is_cuda
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] == DIM
        and all(map(_copied_whole, (q, k, v, torch.empty_like(q, device="meta"))))
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    scale: float,
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`kernel.attend`, for what :func:`suits` it.

    Raises:
        InputError: what does not suit.
    """
    if not suits(q, k, v):
        raise InputError(
            found=f"{q.dtype}, head dim {q.shape[-1]}, {q.device}, "
            f"strides {q.stride()}, {k.stride()}, {v.stride()}",
            wanted=f"bf16 or fp16, head dim {DIM}, a Hopper GPU, strides of 16·n, < 2^31 elements a head",
            where="Hopper's kernel of variable_block_attention",
            fix="Use the Triton kernel.",
        )
    batch, heads, tokens, _ = q.shape
    schedule = schedule or Schedule()
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    for turn in turns(
        order, offsets, mask, ctl, rows=BLOCK, workspace=schedule.workspace, small_last=schedule.small_last
    ):
        row_tiles = turn.heads * turn.most
        launchable(variable_block_attention_hopper)[(min(row_tiles, processors),)](
            q, k, v, out, lse, order, ctl, turn.tiles, turn.counts, turn.lists, order.new_zeros(1),
            *_strides(q), *_strides(k), *_strides(v), *_strides(out),
            turn.first, batch * heads, heads, tokens, mask.shape[3], turn.most, row_tiles, scale,
            D=DIM, STAGES=schedule.stages, Q_STAGES=schedule.q_stages, IN_TURNS=schedule.in_turns,
            num_warps=4,
        )  # fmt: skip
    return out, lse


def _strides(x: Tensor) -> list[int]:
    """Of batch, head and token; that along an axis of one element is free, and says nothing."""
    return [step if size > 1 else DIM for step, size in zip(x.stride()[:3], x.shape[:3], strict=True)]


def _copied_whole(x: Tensor) -> bool:
    """Whether 16 bytes at a time can be copied, and 32 bits count the elements of a head."""
    steps = _strides(x)
    aligned = address(x) % 16 == 0
    return aligned and x.stride(-1) == 1 and all(s % 16 == 0 for s in steps) and x.shape[2] * steps[2] < 2**31
