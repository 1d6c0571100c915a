"""Specification of the top-p selection of key blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import pack_bits


def top_p_select(scores: Tensor, top_p: Tensor, *, sums: torch.dtype = torch.float64) -> Tensor:
    """Keep for every row the fewest blocks, largest first, whose scores reach ``top_p`` of the row's sum.

    The block that crosses the threshold is kept (XAttention §2.2). *Ours*: ties go to the lower index; a
    score that is not a positive finite number counts as zero; a row without any positive score keeps block 0,
    so no row is empty.

    No sort: the smallest score that is still kept is put together four bits at a time, exponent before
    mantissa, as the largest float32 at or above which the scores reach the target. That is exact, in 8 steps
    and O(T) memory; ranking by pairwise comparison would need O(T²) a row. Products and sums of floats alone,
    so that formats without a bit cast (ONNX) can hold it. Sums are float64, so with ``top_p = 1`` every block
    that changes the float64 row sum is kept. The kernel sums in float32 and may differ where a prefix lies
    within rounding (about 1e-6 of the row sum) of the threshold.

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

    def largest(candidates: Tensor, otherwise: Tensor) -> Tensor:
        """The largest candidate [..., Tq, C] that reaches the target, else ``otherwise`` [..., Tq, 1]."""
        above = score.unsqueeze(-2) >= candidates.unsqueeze(-1)
        enough = torch.where(above, value.unsqueeze(-2), zero.unsqueeze(-2)).sum(-1) >= target
        return torch.where(enough & (candidates <= peak), candidates, otherwise).amax(-1, keepdim=True)

    def steps(count: int) -> Tensor:
        return torch.arange(1, count, dtype=torch.float32, device=score.device)

    powers = torch.tensor([2.0 ** (e - 126) for e in range(0, 256, 16)], device=score.device)
    finer = torch.tensor([2.0**e for e in range(1, 16)], device=score.device)
    threshold = largest(powers.expand(*peak.shape[:-1], -1), torch.zeros_like(peak))  # 0 always reaches it
    normal = threshold > 0
    threshold = largest(threshold * finer, threshold)
    power = torch.where(normal, threshold, powers[:1])
    for bits in (4, 8, 12, 16, 20):
        threshold = largest(threshold + power * (steps(16) * 2.0**-bits), threshold)
    threshold = largest(threshold + power * (steps(8) * 2.0**-23), threshold)

    above = score > threshold
    ties = score == threshold
    tie_value = threshold.to(sums)
    missing = target - torch.where(above, value, zero).sum(-1, keepdim=True)
    # The tie's value is 0 only in a row without mass: one block then stands for the row.
    needed = torch.ceil(missing / torch.where(tie_value > 0, tie_value, 1.0)).clamp(min=1)
    return pack_bits(above | (ties & (ties.long().cumsum(-1) <= needed)))
