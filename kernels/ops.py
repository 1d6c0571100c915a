"""The two ops of a rewritten attention site: schemas, shape rules, and what runs on which device.

    haste::refresh_mask_             drift → gate → scores → top-p where a head wants it; mutates the state
    haste::block_sparse_attention    attention over the kept blocks; pure

Two ops and not one, so that the mutation never stands in the way of autograd and functionalisation. Both
are opaque to graph compilers: the CPU path skips masked work in data-dependent Python, the CUDA path launches
a fixed sequence of Triton kernels and never reads device memory from the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.errors import AutogradError
from haste_compile.kernels.checks import bad_input, check_gate, check_heads, check_tensor, read_slot
from haste_compile.kernels.launching import implement_on_cuda
from haste_compile.kernels.layout import CTL_COLUMNS, Counter, Ctl

__all__ = ["Counter", "Ctl", "block_sparse_attention", "refresh_mask_"]

#: Bytes that the CPU's score matrix may take; more heads than fit are scored in turns.
_CPU_SCORE_BYTES = 1 << 28

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define(
    "haste::refresh_mask_",
    "(Tensor q, Tensor k, Tensor top_p, Tensor delta, Tensor ctl, Tensor(a!) mask, Tensor(b!) anchors, "
    'Tensor(c!) counters, *, int block, int stride, str reuse="drift", int interval=0, int max_age=0, '
    "float gate_low=0.4, float gate_high=0.8, bool relative=False) -> ()",
    tags=_TAGS,
)
torch.library.define(
    "haste::block_sparse_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor ctl, *, int block, float scale) "
    "-> (Tensor out, Tensor lse)",
    tags=_TAGS,
)
torch.library.define("haste::refuse_gradient", "(Tensor gradient) -> Tensor", tags=_TAGS)


def refresh_mask_(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    *,
    block: int,
    stride: int,
    reuse: str = "drift",
    interval: int = 0,
    max_age: int = 0,
    gate_low: float = 0.4,
    gate_high: float = 0.8,
    relative: bool = False,
) -> None:
    """Bring the masks of one site up to date, in place, for the slot that ``ctl`` names.

    Temporal mask reuse decides head by head and sample by sample (``drift_gate``); heads that rebuild score
    their blocks (``block_scores``), keep the top-p of every row (``top_p_select``) and move their anchors. Of
    heads that reuse, mask and anchors stay bit-identical. A dense step only counts.

    Args:
        q, k: [B, H, N, D], bf16, fp16 or (not on CUDA) fp32, last stride 1, D 64 or 128.
        top_p: fp32 [>= H], mass that a row must keep, in (0, 1].
        delta: fp32 [>= H], drift threshold.
        ctl: int32 [8], columns ``Ctl``; its slot must exist and its epoch be at least 1.
        mask: int32 [S, B, H, T, ceil(T / 32)], T = ceil(N / block); bit j % 32 of word j // 32: key block j.
        anchors: fp32 [S, B, H, 2, D], means of q and k when the mask was built.
        counters: int64 [S, B, H, 8], columns ``Counter``.
        block: tokens a block, 64 or 128; ``stride``: 4, 8, 16 or 32.
        reuse, interval, max_age, gate_low, gate_high, relative: see ``drift_gate.reference.decide``.

    Raises:
        InputError: a tensor or option that the op does not take; on the CPU also a slot that does not exist.
    """
    torch.ops.haste.refresh_mask_(
        q, k, top_p, delta, ctl, mask, anchors, counters, block=block, stride=stride, reuse=reuse,
        interval=interval, max_age=max_age, gate_low=gate_low, gate_high=gate_high, relative=relative,
    )  # fmt: skip


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention over the key blocks that the slot's mask keeps; over all of them in a dense step.

    Args:
        q, k, v: [B, H, N, D] as in ``refresh_mask_``.
        mask, ctl: as in ``refresh_mask_``; only read.
        block: tokens a block; ``scale``: factor of the scores, 1/√D in most models.

    Returns:
        out, like q in shape, dtype and (dense) strides; lse, fp32 [B, H, N], the natural logarithm of the
        softmax denominator over the kept keys.

    Raises:
        InputError: as in ``refresh_mask_``.
        AutogradError: when a gradient is asked for; the forward alone works in grad mode.
    """
    return torch.ops.haste.block_sparse_attention(q, k, v, mask, ctl, block=block, scale=scale)


@torch.no_grad()  # autograd does not see this op: nothing it does may be recorded
def _refresh_cpu(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    *,
    block: int,
    stride: int,
    reuse: str = "drift",
    interval: int = 0,
    max_age: int = 0,
    gate_low: float = 0.4,
    gate_high: float = 0.8,
    relative: bool = False,
) -> None:
    _check_refresh(q, k, top_p, delta, ctl, mask, anchors, counters, block, stride, reuse, interval)
    from haste_compile.kernels.block_mask import token_pairs
    from haste_compile.kernels.block_scores import reference as block_scores
    from haste_compile.kernels.drift_gate import reference as drift_gate
    from haste_compile.kernels.token_means import reference as token_means
    from haste_compile.kernels.top_p_select import reference as top_p_select

    slot = read_slot(ctl, mask)
    rebuild, new_anchors, new_counters = drift_gate.decide(
        token_means.token_means(q),
        token_means.token_means(k),
        delta,
        ctl,
        anchors[slot],
        counters[slot],
        tokens=q.shape[2],
        reuse=reuse,
        interval=interval,
        max_age=max_age,
        gate_low=gate_low,
        gate_high=gate_high,
        relative=relative,
    )
    samples, heads = rebuild.nonzero(as_tuple=True)
    groups = mask.shape[3] * block // stride
    at_once = max(1, _CPU_SCORE_BYTES // (4 * groups * groups))
    for sample, head in zip(samples.split(at_once), heads.split(at_once), strict=True):
        if sample.numel() == 0:  # split() of nothing is one empty piece
            continue
        scores = block_scores.block_scores(
            q[sample, head][None], k[sample, head][None], block=block, stride=stride
        )
        bits = top_p_select.top_p_select(scores, top_p[head])
        pairs = token_pairs(bits, q.shape[2], block)[0]
        mask[slot, sample, head] = bits[0]
        new_counters[sample, head, Counter.KEPT] = pairs
        new_counters[sample, head, Counter.KEPT_SUM] += pairs
    # Last, so that an interrupted call never leaves a head that claims a mask it has not got.
    anchors[slot] = new_anchors
    counters[slot] = new_counters


def refresh_cuda(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    *,
    block: int,
    stride: int,
    reuse: str = "drift",
    interval: int = 0,
    max_age: int = 0,
    gate_low: float = 0.4,
    gate_high: float = 0.8,
    relative: bool = False,
) -> None:
    """The CUDA implementation; a public name because ``kernels.traced`` traces it."""
    _check_refresh(q, k, top_p, delta, ctl, mask, anchors, counters, block, stride, reuse, interval)
    from haste_compile.kernels.drift_gate import kernel as drift_gate
    from haste_compile.kernels.token_means import kernel as token_means
    from haste_compile.kernels.top_p_select import kernel as top_p_select

    with torch.cuda.device_of(q):
        flags = drift_gate.decide_(
            token_means.token_means(q, k),
            delta,
            ctl,
            anchors,
            counters,
            tokens=q.shape[2],
            reuse=reuse,
            interval=interval,
            max_age=max_age,
            gate_low=gate_low,
            gate_high=gate_high,
            relative=relative,
        )
        top_p_select.select_(q, k, top_p, flags, ctl, mask, counters, block=block, stride=stride)


def _attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, mask, ctl, block)
    from haste_compile.kernels.block_sparse_attention import cpu as attention

    bits = mask[read_slot(ctl, mask)]
    if int(ctl[Ctl.DENSE]):
        bits = torch.full_like(bits, -1)
    out, lse = attention.attend(q, k, v, bits, block=block, scale=scale)
    result = torch.empty_like(q)
    # SDPA chooses strides of its own; graph compilers were promised those of the fake.
    return (out if out.stride() == result.stride() else result.copy_(out)), lse.contiguous()


def _attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, mask, ctl, block)
    from haste_compile.kernels.block_mask import BlockMask
    from haste_compile.kernels.block_sparse_attention import dispatch as attention
    from haste_compile.kernels.expand_mask import kernel as expand_mask

    with torch.cuda.device_of(q):
        counts, indices = expand_mask.expand(mask, ctl, mask.shape[3])
        return attention.attend(q, k, v, BlockMask(counts, indices, block), block=block, scale=scale)


def _refresh_fake(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    *,
    block: int,
    stride: int,
    reuse: str = "drift",
    interval: int = 0,
    max_age: int = 0,
    gate_low: float = 0.4,
    gate_high: float = 0.8,
    relative: bool = False,
) -> None:
    _check_refresh(q, k, top_p, delta, ctl, mask, anchors, counters, block, stride, reuse, interval)


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, mask, ctl, block)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


# The backward is an op of its own, because a graph compiler traces it while it compiles the forward of a
# model whose parameters require grad: tracing must pass, running must not.
def _refuse_gradient(gradient: Tensor) -> Tensor:
    raise AutogradError(
        found="a backward pass",
        wanted="inference: sparse attention has no gradient",
        where="an attention op of haste",
        fix="Run the model under torch.no_grad() or train it without the haste backend.",
    )


def _refuse_gradient_fake(gradient: Tensor) -> Tensor:
    return torch.empty_like(gradient)


def _attention_backward(ctx: object, out_gradient: Tensor, lse_gradient: Tensor) -> tuple[Tensor | None, ...]:
    refused = torch.ops.haste.refuse_gradient(out_gradient)
    return refused, refused, refused, None, None, None, None


def _check_refresh(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    block: int,
    stride: int,
    reuse: str,
    interval: int,
) -> None:
    check_heads({"q": q, "k": k})
    _check_state(q, mask, ctl, block)
    check_gate(q, top_p, delta, ctl, anchors, counters, mask.shape[0], reuse, interval)
    if stride not in (4, 8, 16, 32):
        raise bad_input("stride", str(stride), "4, 8, 16 or 32", "Choose another stride.")


def _check_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, block: int) -> None:
    check_heads({"q": q, "k": k, "v": v})
    _check_state(q, mask, ctl, block)


def _check_state(q: Tensor, mask: Tensor, ctl: Tensor, block: int) -> None:
    if block not in (64, 128):
        raise bad_input("block", str(block), "64 or 128", "Choose another block size.")
    batch, heads, tokens, _ = q.shape
    blocks = -(-tokens // block)
    slots = mask.shape[0] if mask.dim() == 5 else 1
    check_tensor("mask", mask, q, torch.int32, (slots, batch, heads, blocks, -(-blocks // 32)))
    check_tensor("ctl", ctl, q, torch.int32, (CTL_COLUMNS,))


torch.library.impl("haste::refresh_mask_", "cpu", _refresh_cpu)
implement_on_cuda("haste::refresh_mask_", refresh_cuda)
torch.library.register_fake("haste::refresh_mask_", _refresh_fake)
torch.library.impl("haste::block_sparse_attention", "cpu", _attention_cpu)
implement_on_cuda("haste::block_sparse_attention", _attention_cuda)
torch.library.register_fake("haste::block_sparse_attention", _attention_fake)
torch.library.register_autograd("haste::block_sparse_attention", _attention_backward)
torch.library.impl("haste::refuse_gradient", "CompositeExplicitAutograd", _refuse_gradient)
torch.library.register_fake("haste::refuse_gradient", _refuse_gradient_fake)
