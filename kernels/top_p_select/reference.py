"""Specification of the top-p selection of key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import pack_bits


def top_p_select(scores: Tensor, top_p: Tensor) -> Tensor:
    """Keep for every row the fewest blocks, largest first, whose scores reach ``top_p`` of the row's sum.

    The block that crosses the threshold is kept (XAttention §2.2). *Ours*: ties go to the lower index; a
    score that is not a positive finite number counts as zero; a row without any positive score keeps block 0,
    so no row is empty.

    No sort: the bit pattern of a non-negative float32 orders like the number, so 31 halvings of the range of
    patterns find the smallest score that is still kept, exactly, in O(T) memory; ranking by pairwise
    comparison would need O(T²) a row. Sums are float64, so with ``top_p = 1`` every block that changes the
    float64 row sum is kept. The kernel sums in float32 and may differ where a prefix lies within rounding
    (about 1e-6 of the row sum) of the threshold.

    Args:
        scores: fp32 [..., H, Tq, Tk].
        top_p: fp32 [>= H], in (0, 1].

    Returns:
        Mask bits, int32 [..., H, Tq, ceil(Tk / 32)], see ``block_mask.pack_bits``.
    """
    heads = scores.shape[-3]
    usable = torch.isfinite(scores) & (scores > 0)
    clean = torch.where(usable, scores, torch.zeros_like(scores)).float()
    pattern = clean.contiguous().view(torch.int32)
    value = clean.double()
    target = top_p[:heads].double()[:, None, None] * value.sum(-1, keepdim=True)

    low = torch.zeros_like(pattern[..., :1])  # a threshold of 0 always reaches the target
    high = pattern.amax(-1, keepdim=True)
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = torch.where(pattern >= middle, value, 0.0).sum(-1, keepdim=True) >= target
        low = torch.where(enough, middle, low)
        high = torch.where(enough, high, middle - 1)

    above = pattern > low
    ties = pattern == low
    tie_value = torch.where(ties, value, 0.0).amax(-1, keepdim=True)
    missing = target - torch.where(above, value, 0.0).sum(-1, keepdim=True)
    # tie_value is 0 only in a row without mass: one block then stands for the row.
    needed = torch.ceil(missing / torch.where(tie_value > 0, tie_value, 1.0)).clamp(min=1)
    return pack_bits(above | (ties & (ties.cumsum(-1) <= needed)))
