"""Specification of the cluster map."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import pack_bits, unpack_bits


def cluster_map(
    q_centroids: Tensor, k_centroids: Tensor, k_sizes: Tensor, top_p: Tensor, *, scale: float, least: int
) -> Tensor:
    """Keep for every query cluster the fewest key clusters that hold ``top_p`` of its estimated attention.

    A[u, v] = n_v · exp(scale · q̄_u·k̄_v), normalised over v, n_v tokens in key cluster v (Sparse VideoGen
    2). The cluster that crosses the threshold is kept, and the ``least`` largest ones always are. *Ours*:
    ties go to the lower index; a share that is no positive finite number counts as zero; sums are float64
    here. The kernel sums in float32 and may differ where a prefix lies within rounding of the threshold.

    Args:
        q_centroids: fp32 [M, Cq, D]; ``k_centroids``: fp32 [M, Ck, D].
        k_sizes: int64 [M, Ck]; a cluster without tokens has no share.
        top_p: fp32 [M], in (0, 1].
        scale: factor of q·k; ``least``: key clusters that a row keeps at least, in [1, Ck].

    Returns:
        Mask bits, int32 [M, Cq, ceil(Ck / 32)], see ``block_mask.pack_bits``.
    """
    logits = (q_centroids @ k_centroids.transpose(1, 2)) * scale + k_sizes.float().log().unsqueeze(1)
    share = logits.softmax(-1)
    share = torch.where(share > 0, share, 0.0).double()
    ranked, order = share.sort(dim=-1, descending=True, stable=True)
    before = torch.nn.functional.pad(ranked.cumsum(-1), (1, -1))
    needed = before < top_p.double()[:, None, None] * ranked.sum(-1, keepdim=True)
    needed = needed | (torch.arange(share.shape[-1], device=share.device) < least)
    return pack_bits(torch.zeros_like(needed).scatter(-1, order, needed))


def token_pairs(bits: Tensor, q_sizes: Tensor, k_sizes: Tensor) -> Tensor:
    """Kept query-key token pairs of every head, int64 [M].

    Args:
        bits: int32 [M, Cq, W]; ``q_sizes``: int64 [M, Cq]; ``k_sizes``: int64 [M, Ck].
    """
    kept = unpack_bits(bits, k_sizes.shape[-1])
    return ((kept * k_sizes.unsqueeze(1)).sum(-1) * q_sizes).sum(-1)
