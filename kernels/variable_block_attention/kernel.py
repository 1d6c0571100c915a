"""Attention over blocks of any size, Triton: query clusters in row tiles, kept keys in full column tiles.

Key clusters hold a few dozen tokens, fewer than a tile of the tensor cores. So the keys that a query cluster
keeps are concatenated: a list of token numbers without gaps, walked in full tiles of which only the last may
be ragged. Nothing is permuted in memory: rows of q, k and v are gathered where they lie, a row of 128 or 256
bytes at a time, and results go back to where their queries came from.

Row tiles and key lists come from ``work_lists``, for some heads at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import Ctl
from haste_compile.kernels.variable_block_attention.launch import Launch, choose_launch
from haste_compile.kernels.variable_block_attention.work_lists import turns

_SLOT = tl.constexpr(int(Ctl.SLOT))
_DENSE = tl.constexpr(int(Ctl.DENSE))
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["first", "tokens"])
def variable_block_attention_kernel(
    q, k, v, out, lse, order, ctl, tiles, counts, lists,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    first, all_heads, heads, tokens, q_clusters, most, scale,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Attend one row tile. Grid (most row tiles, heads of this turn).

    Args:
        q, k, v, out: pointers to [B, H, N, D], last stride 1.
        lse: pointer to fp32 [B, H, N], contiguous.
        order, ctl: of the state; tiles, counts, lists: what the kernels of ``work_lists`` made.
        scale: factor of q·k, > 0.
    """
    tile = tiles + (tl.program_id(1) * most + tl.program_id(0)) * 3
    cluster = tl.load(tile)
    if cluster < 0:
        return
    head = (first + tl.program_id(1)).to(tl.int64)
    batch_of, head_of = head // heads, head % heads
    place = tl.load(tile + 1) + tl.arange(0, ROWS)
    inside = place < tl.load(tile + 2)
    feature = tl.arange(0, D)
    state_head = tl.load(ctl + _SLOT).to(tl.int64) * all_heads + head
    dense = tl.load(ctl + _DENSE) != 0
    row = tl.load(order + state_head * 2 * tokens + place, mask=inside & (dense == 0), other=0)
    row = tl.where(dense, place, row).to(tl.int64)
    of_head = q + batch_of * stride_qb + head_of * stride_qh
    queries = tl.load(of_head + row[:, None] * stride_qn + feature[None, :], mask=inside[:, None], other=0.0)

    list_row = tl.program_id(1).to(tl.int64) * q_clusters + cluster
    count = tl.load(counts + list_row)
    listed = lists + list_row * tokens
    keys_of_head = k + batch_of * stride_kb + head_of * stride_kh
    values_of_head = v + batch_of * stride_vb + head_of * stride_vh
    # Scores are kept in units of log2: exp2 then needs no multiplication by log2(e) for every score.
    scale_log2 = tl.cast(scale, tl.float32) * _LOG2_E
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    accumulator = tl.zeros([ROWS, D], tl.float32)
    for start in range(0, count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        real = column < count
        key = tl.load(listed + column, mask=real, other=0).to(tl.int64)
        pointers = keys_of_head + key[:, None] * stride_kn + feature[None, :]
        keys = tl.load(pointers, mask=real[:, None], other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        scores = tl.where(real[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        accumulator = accumulator * rescale[:, None]
        pointers = values_of_head + key[:, None] * stride_vn + feature[None, :]
        values = tl.load(pointers, mask=real[:, None], other=0.0)
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
        row_max = new_max

    tl.store(lse + head * tokens + row, (row_max + tl.log2(row_sum)) * _LN_2, mask=inside)
    result = (accumulator * (1.0 / row_sum)[:, None]).to(out.dtype.element_ty)
    out_of_head = out + batch_of * stride_ob + head_of * stride_oh
    tl.store(out_of_head + row[:, None] * stride_on + feature[None, :], result, mask=inside[:, None])


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.attend` for the slot in ``ctl``, dense in a dense step; never reads from the host.

    Args:
        q, k, v: [B, H, N, D], bf16 or fp16 (fp32 under Triton's interpreter), last stride 1, D 64 or 128.
        order: int32 [S, B, H, 2, N]; ``offsets``: int32 [S, B, H, Cq + Ck + 2].
        mask: int32 [S, B, H, Cq, ceil(Ck / 32)]; ``ctl``: int32 [8].
        scale: factor of q·k, > 0.
        launch: parameters other than :func:`launch.choose_launch`'s.

    Returns:
        out, lse.
    """
    batch, heads, tokens, dim = q.shape
    q_clusters = mask.shape[3]
    launch = launch or choose_launch(
        torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0),  # interpreted: Hopper's path
        dim=dim,
        itemsize=q.element_size(),
        cluster=tokens / q_clusters,
    )
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    for turn in turns(order, offsets, mask, ctl, rows=launch.rows):
        launchable(variable_block_attention_kernel)[(turn.most, turn.heads)](
            q, k, v, out, lse, order, ctl, turn.tiles, turn.counts, turn.lists,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            turn.first, batch * heads, heads, tokens, q_clusters, turn.most, scale,
            D=dim, ROWS=launch.rows, COLUMNS=launch.columns,
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return out, lse
