"""Specification of the top-p selection of key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import pack_bits

#: Smallest positive normal float32.
_TINY = 2.0**-126


def top_p_select(scores: Tensor, top_p: Tensor, *, sums: torch.dtype = torch.float64) -> Tensor:
    """Keep for every row the fewest blocks, largest first, whose scores reach ``top_p`` of the row's sum.

    The block that crosses the threshold is kept (XAttention §2.2). *Ours*: ties go to the lower index; a
    score that is not a positive finite number counts as zero; a row without any positive score keeps block 0,
    so no row is empty.

    No sort: the smallest score that is still kept is put together bit by bit, exponent before mantissa, as
    the largest float32 at or above which the scores reach the target. That is exact, in 32 steps and O(T)
    memory; ranking by pairwise comparison would need O(T²) a row. Products and sums of floats alone, so that
    formats without a bit cast (ONNX) can hold it. Sums are float64, so with ``top_p = 1`` every block that
    changes the float64 row sum is kept. The kernel sums in float32 and may differ where a prefix lies within
    rounding (about 1e-6 of the row sum) of the threshold.

    Args:
        scores: fp32 [..., H, Tq, Tk].
        top_p: fp32 [>= H], in (0, 1].
        sums: dtype of the sums; float32 for runtimes that have no other, and then as exact as the kernel.

    Returns:
        Mask bits, int32 [..., H, Tq, ceil(Tk / 32)], see ``block_mask.pack_bits``.
    """
    heads = scores.shape[-3]
    usable = torch.isfinite(scores) & (scores > 0)
    score = torch.where(usable, scores, torch.zeros_like(scores)).float()
    value = score.to(sums)
    target = top_p[:heads].to(sums)[:, None, None] * value.sum(-1, keepdim=True)
    peak = score.amax(-1, keepdim=True)
    zero = torch.zeros_like(value)

    def reaches(candidate: Tensor) -> Tensor:
        enough = torch.where(score >= candidate, value, zero).sum(-1, keepdim=True) >= target
        return enough & (candidate <= peak)

    normal = reaches(torch.full_like(peak, _TINY))
    threshold = torch.where(normal, _TINY, 0.0)  # 0 always reaches the target
    for bit in range(7, -1, -1):
        root = 2.0 ** (2**bit / 2)  # multiplied twice: 2^128 is no float32
        candidate = threshold * root * root if bit else threshold * 2.0
        threshold = torch.where(reaches(candidate), candidate, threshold)
    power = torch.where(normal, threshold, _TINY)
    for bit in range(1, 24):
        candidate = threshold + power * 2.0**-bit
        threshold = torch.where(reaches(candidate), candidate, threshold)

    above = score > threshold
    ties = score == threshold
    tie_value = threshold.to(sums)
    missing = target - torch.where(above, value, zero).sum(-1, keepdim=True)
    # The tie's value is 0 only in a row without mass: one block then stands for the row.
    needed = torch.ceil(missing / torch.where(tie_value > 0, tie_value, 1.0)).clamp(min=1)
    return pack_bits(above | (ties & (ties.long().cumsum(-1) <= needed)))
