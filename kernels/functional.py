"""The two ops as pure functions: state in, state out, nothing that depends on data, nothing but tensors.

What an exported artifact holds (``haste_compile.artifacts``). Live graphs keep the ops of ``kernels.ops``,
which skip masked work. Here every head is scored at every call and attention is dense under a mask: a graph
of tensors has no other way. Put together from the references, so that specification and artifact are one; no
sort, no bit cast, no shift and no in-place update, and so all of it has a form in ONNX's opset 20.

``haste::refresh_mask`` is the first function as an op, for graphs that name it instead of spelling it out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from haste_compile.kernels.block_mask import token_pairs, unpack_bits
from haste_compile.kernels.block_scores.reference import block_scores
from haste_compile.kernels.drift_gate.reference import decide
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl
from haste_compile.kernels.token_means.reference import token_means
from haste_compile.kernels.top_p_select.reference import top_p_select

torch.library.define(
    "haste::refresh_mask",
    "(Tensor q, Tensor k, Tensor top_p, Tensor delta, Tensor ctl, Tensor mask, Tensor anchors, "
    'Tensor counters, *, int block, int stride, str reuse="drift", int interval=0, int max_age=0, '
    "float gate_low=0.4, float gate_high=0.8, bool relative=False) "
    "-> (Tensor mask, Tensor anchors, Tensor counters)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.no_grad()
def refresh_mask(
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
    sums: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``kernels.ops.refresh_mask_``, with the new state as its result.

    Other slots' rows, and masks and anchors of heads that reuse, are bit-identical copies. Arguments are not
    checked: a graph was checked when it was rewritten.

    Args:
        q, k, top_p, delta, ctl, mask, anchors, counters: as in ``refresh_mask_``; only read.
        sums: see ``top_p_select``.

    Returns:
        mask, anchors, counters: new tensors, shaped like the arguments.
    """
    slot = ctl[Ctl.SLOT : Ctl.SLOT + 1].long()
    mask_now, anchors_now, counters_now = (x.index_select(0, slot)[0] for x in (mask, anchors, counters))
    rebuild, anchors_new, counters_new = decide(
        token_means(q),
        token_means(k),
        delta,
        ctl,
        anchors_now,
        counters_now,
        tokens=q.shape[2],
        reuse=reuse,
        interval=interval,
        max_age=max_age,
        gate_low=gate_low,
        gate_high=gate_high,
        relative=relative,
    )
    bits = top_p_select(block_scores(q, k, block=block, stride=stride), top_p, sums=sums)
    pairs = torch.where(rebuild, token_pairs(bits, q.shape[2], block), 0)
    counted = [int(i in (Counter.KEPT, Counter.KEPT_SUM)) for i in range(COUNTER_COLUMNS)]
    counters_new = counters_new + pairs.unsqueeze(-1) * torch.tensor(counted, device=q.device)
    mask_new = torch.where(rebuild[..., None, None], bits, mask_now)

    here = torch.arange(mask.shape[0], device=q.device) == slot
    return (
        _in_slot(here, mask_new, mask),
        _in_slot(here, anchors_new, anchors),
        _in_slot(here, counters_new, counters),
    )


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, ctl: Tensor, *, block: int, scale: float
) -> Tensor:
    """As ``kernels.ops.block_sparse_attention``, without the logarithms that no rewritten graph reads.

    Dense attention with the dropped pairs masked out: O(N²) time and memory whatever the mask keeps, and
    unlike the op it takes a NaN among dropped values into the result.
    """
    slot = ctl[Ctl.SLOT : Ctl.SLOT + 1].long()
    kept = unpack_bits(mask.index_select(0, slot)[0], mask.shape[3]) | (ctl[Ctl.DENSE] != 0)
    batch, heads, blocks, _ = kept.shape
    of_tokens = kept[:, :, :, None, :, None].expand(batch, heads, blocks, block, blocks, block)
    tokens = q.shape[2]
    pairs = of_tokens.reshape(batch, heads, blocks * block, blocks * block)[:, :, :tokens, :tokens]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=pairs, scale=scale)


def _in_slot(here: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """``old`` [S, ...] with ``new`` [...] in the one slot where ``here``, bool [S], is set."""
    return torch.where(here.view(-1, *[1] * new.dim()), new.unsqueeze(0), old)


def _refresh_fake(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    **_options: object,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(mask), torch.empty_like(anchors), torch.empty_like(counters)


torch.library.impl("haste::refresh_mask", "CompositeExplicitAutograd", refresh_mask)
torch.library.register_fake("haste::refresh_mask", _refresh_fake)
