"""Block-sparse attention, Triton: one program for each query block of each head.

A program walks the ascending list of its kept key blocks with an online softmax (Milakov and Gimelshein 2018,
in FlashAttention-2's order of operations), so its time follows the number of kept blocks. On Hopper it loads
through TMA.

Triton's own warp specialisation is not used. Beside other processes on the GPU, one of 645 launches of this
loop with it had NaN in 148 half tiles; through plain pointers and without it, none of 645.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from haste_compile.errors import InputError
from haste_compile.kernels.block_mask import BlockMask
from haste_compile.kernels.block_sparse_attention.launch import Launch, choose_launch
from haste_compile.kernels.launching import address, described, launchable

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
#: Added to the score of a key that does not exist. Finite: the tensor cores add it to a sum of products.
_NO_KEY = tl.constexpr(-1.0e38)


@triton.jit
def _load_rows(
    source, batch, head, start, stride_b, stride_h, stride_n, tokens,
    BLOCK: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr, HOST_DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows ``start .. start + BLOCK`` of one head, [BLOCK, D]; rows past the last token are zero."""
    if TMA and HOST_DESCRIPTORS:
        return source.load([batch, head, start, 0]).reshape([BLOCK, D])
    elif TMA:
        return source.load([start, 0])
    else:
        rows = start + tl.arange(0, BLOCK)
        base = source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
        pointers = base + rows.to(tl.int64)[:, None] * stride_n + tl.arange(0, D)[None, :]
        return tl.load(pointers, mask=rows[:, None] < tokens, other=0.0)


@triton.jit
def _describe(
    source, batch, head, stride_b, stride_h, stride_n, tokens, BLOCK: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """TMA descriptor of one head, [N, D], made on the device."""
    return tl.make_tensor_descriptor(
        source + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h,
        shape=[tokens, D], strides=[stride_n, 1], block_shape=[BLOCK, D],
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "key_blocks"])
def block_sparse_attention_kernel(
    q, k, v, out, lse, counts, indices,
    stride_qb, stride_qh, stride_qn,
    stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    stride_ob, stride_oh, stride_on,
    tokens, key_blocks, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr,
    TMA: tl.constexpr, HOST_DESCRIPTORS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Attend one query block. Grid (Tq, H, B): rows of a head run side by side and meet in L2 on its K and V.

    Args:
        q, out: pointers to [B, H, N, D], last stride 1.
        k, v: the same, or TMA descriptors of [B, H, N, D] with box [1, 1, BLOCK, D] where they are made on
            the host.
        lse: pointer to fp32 [B, H, N], contiguous.
        counts, indices: pointers to int32 [B, H, Tq] and [B, H, Tq, key_blocks], contiguous.
        tokens: N. key_blocks: Tk. scale: factor of q·k, > 0.
        RAGGED: N is no multiple of BLOCK.
        PARTS: steps that a key block takes, each of BLOCK / PARTS keys; 1 with ``TMA``.
    """
    block_row = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2)
    row = (batch.to(tl.int64) * tl.num_programs(1) + head) * tl.num_programs(0) + block_row
    kept = tl.load(counts + row)
    row_indices = indices + row * key_blocks
    start = block_row * BLOCK
    columns = tl.arange(0, BLOCK)
    KEYS: tl.constexpr = BLOCK // PARTS

    if TMA:
        # Made on the device also where K's and V's are not: the form of it that has run on a GPU.
        queries = _describe(q, batch, head, stride_qb, stride_qh, stride_qn, tokens, BLOCK, D).load(
            [start, 0]
        )
        if not HOST_DESCRIPTORS:
            k = _describe(k, batch, head, stride_kb, stride_kh, stride_kn, tokens, BLOCK, D)
            v = _describe(v, batch, head, stride_vb, stride_vh, stride_vn, tokens, BLOCK, D)
    else:
        queries = _load_rows(
            q, batch, head, start, stride_qb, stride_qh, stride_qn, tokens, BLOCK, D, False, False
        )
    if RAGGED:
        # Indices ascend, so only the last step can meet the block that reaches past the last token.
        ragged_step = tl.where(tl.load(row_indices + kept - 1) == key_blocks - 1, kept - 1, -1)
        keys_left = tokens - (key_blocks - 1) * BLOCK
        penalty = tl.where(tl.arange(0, KEYS) < keys_left, 0.0, _NO_KEY)

    # Scores are kept in units of log2: exp2 then needs no multiplication by log2(e) for every score.
    # The cast is for Inductor, which passes Python's floats in double precision.
    scale_log2 = tl.cast(scale, tl.float32) * _LOG2_E
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    accumulator = tl.zeros([BLOCK, D], tl.float32)
    for step in range(0, kept * PARTS):
        key_start = tl.load(row_indices + step // PARTS) * BLOCK + step % PARTS * KEYS
        keys = _load_rows(
            k, batch, head, key_start, stride_kb, stride_kh, stride_kn, tokens,
            KEYS, D, TMA, HOST_DESCRIPTORS,
        )  # fmt: skip
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if RAGGED:
            # A multiplication a column, which becomes the initial accumulator of the product, is cheaper
            # than a comparison and a selection a score.
            if PARTS > 1:
                penalty = tl.where(tl.arange(0, KEYS) < keys_left - step % PARTS * KEYS, 0.0, _NO_KEY)
            scores += penalty[None, :] * (step // PARTS == ragged_step).to(tl.float32)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        accumulator = accumulator * rescale[:, None]
        values = _load_rows(
            v, batch, head, key_start, stride_vb, stride_vh, stride_vn, tokens,
            KEYS, D, TMA, HOST_DESCRIPTORS,
        )  # fmt: skip
        accumulator = tl.dot(weights.to(values.dtype), values, accumulator, input_precision="ieee")
        row_max = new_max

    inside = columns < tokens - start
    head_row = batch.to(tl.int64) * tl.num_programs(1) + head
    lse_of_block = lse + head_row * tokens + start
    tl.store(lse_of_block + columns, (row_max + tl.log2(row_sum)) * _LN_2, mask=inside)
    result = (accumulator * (1.0 / row_sum)[:, None]).to(out.dtype.element_ty)
    out_of_head = out + batch.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    out_of_block = out_of_head + start.to(tl.int64) * stride_on
    pointers = out_of_block + columns.to(tl.int64)[:, None] * stride_on + tl.arange(0, D)[None, :]
    tl.store(pointers, result, mask=inside[:, None])


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
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.attend`, on the current stream and without a host read.

    Args:
        q, k, v: [B, H, N, D], bf16 or fp16 (fp32 under Triton's interpreter), last stride 1, D 64 or 128.
        mask: lists of kept key blocks, contiguous; every row keeps a block.
        block: tokens a block, 64 or 128.
        scale: factor of q·k, > 0.
        out: like q; made here when None.
        lse: fp32 [B, H, N], contiguous; made here when None.
        launch: parameters other than :func:`launch.choose_launch`'s.

    Returns:
        out, lse.

    Raises:
        InputError: a dtype, stride, block, head dim or scale that the kernel does not take.
    """
    dim = q.shape[-1]
    check_inputs(q, k, v, mask, block, scale)
    out = torch.empty_like(q) if out is None else out
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if lse is None else lse
    launch = launch or choose_launch(
        torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0),  # interpreted: Hopper's path
        block=block,
        dim=dim,
        itemsize=q.element_size(),
        tma_ready=all(map(tma_ready, (q, k, v))),
    )
    # Each program makes its descriptor of Q in scratch memory, for which Triton asks an allocator kept in a
    # context variable. Set in a copy of the context, ours does not meet anybody else's kernels.
    contextvars.copy_context().run(_start, q, k, v, mask, scale, out, lse, launch)
    return out, lse


def _start(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, out: Tensor, lse: Tensor, launch: Launch
) -> None:
    batch, heads, tokens, dim = q.shape
    query_blocks, key_blocks = mask.indices.shape[2:]
    triton.set_allocator(lambda size, _alignment, _stream: q.new_empty(size, dtype=torch.int8))
    launchable(block_sparse_attention_kernel)[(query_blocks, heads, batch)](
        q,
        *((_descriptor(x, mask.block) if launch.tma and launch.host_descriptors else x) for x in (k, v)),
        out, lse, mask.counts, mask.indices,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        tokens, key_blocks, scale,
        BLOCK=mask.block,
        D=dim,
        RAGGED=tokens % mask.block != 0,
        TMA=launch.tma,
        HOST_DESCRIPTORS=launch.host_descriptors,
        PARTS=launch.parts,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )  # fmt: skip


def _descriptor(x: Tensor, block: int) -> TensorDescriptor:
    """TMA descriptor of [B, H, N, D]; its third bound clips the ragged last block of every head alike."""
    # The stride along an axis of one element is free, and some views put there what TMA does not take.
    strides = [step if size > 1 else x.shape[-1] for step, size in zip(x.stride(), x.shape, strict=True)]
    return TensorDescriptor(described(x), list(x.shape), [*strides[:3], 1], [1, 1, block, x.shape[-1]])


def tma_ready(x: Tensor) -> bool:
    """Whether a TMA descriptor can describe x: address and strides of whole 16 bytes."""
    steps = (step for step, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1)
    return address(x) % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)


def check_inputs(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, block: int, scale: float) -> None:
    """Raise InputError for inputs that no form of the kernel takes."""
    where = "kernel of block_sparse_attention"
    dtypes = (torch.bfloat16, torch.float16) if q.is_cuda else (torch.float16, torch.float32)
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        raise InputError(
            found=f"dtypes {q.dtype}, {k.dtype}, {v.dtype}",
            wanted="one of " + ", ".join(map(str, dtypes)),
            where=where,
            fix="Convert q, k and v.",
        )
    if block not in (64, 128) or mask.block != block or q.shape[-1] not in (64, 128):
        raise InputError(
            found=f"block {block}, mask of blocks of {mask.block}, head dim {q.shape[-1]}",
            wanted="blocks of 64 or 128 and a head dim of 64 or 128",
            where=where,
            fix="Leave this site dense.",
        )
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        raise InputError(
            found=f"last strides {q.stride(-1)}, {k.stride(-1)}, {v.stride(-1)}",
            wanted="1",
            where=where,
            fix="Make q, k and v contiguous along the head dim.",
        )
    if not (mask.counts.is_contiguous() and mask.indices.is_contiguous()):
        raise InputError(
            found="strided lists", wanted="contiguous lists", where=where, fix="Call .contiguous() on both."
        )
    if scale <= 0:
        raise InputError(found=f"scale {scale}", wanted="a scale above 0", where=where, fix="Negate q.")
