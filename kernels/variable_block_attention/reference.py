"""Attention over blocks of any size, specification: every score is computed, masked scores are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import unpack_bits


def attend(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, offsets: Tensor, mask: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query cluster renormalised over the key clusters that it keeps (SVG2).

    The permutation that makes clusters contiguous, attention, and the way back in one: tokens stay where they
    are. What dropped keys hold, even NaN, does not reach the result.

    Args:
        q, k, v: [B, H, N, D].
        order: int32 [B, H, 2, N], queries and keys sorted by cluster (``cluster_order``).
        offsets: int32 [B, H, Cq + Ck + 2], where clusters begin in that order: of queries, then of keys.
        mask: int32 [B, H, Cq, ceil(Ck / 32)], bit v of row u: query cluster u keeps key cluster v.
        scale: factor of q·k.

    Returns:
        out: like q in shape, strides and dtype.
        lse: [B, H, N], natural log of the sum of exponentials over kept keys; fp32 (fp64 for fp64 inputs).
    """
    query_clusters = mask.shape[2]
    of_query = labels(order[:, :, 0], offsets[:, :, : query_clusters + 1])
    of_key = labels(order[:, :, 1], offsets[:, :, query_clusters + 1 :])
    kept = unpack_bits(mask, offsets.shape[2] - query_clusters - 2)
    kept = kept.gather(2, of_query.unsqueeze(-1).expand(-1, -1, -1, kept.shape[3]))
    kept = kept.gather(3, of_key.unsqueeze(2).expand(-1, -1, q.shape[2], -1))
    compute = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(compute) @ k.to(compute).transpose(-1, -2) * scale
    scores = torch.where(kept, scores, float("-inf"))
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp()
    # 0 · NaN is NaN: multiply finite values only, then spoil just the rows that keep a spoiled one.
    finite = v.isfinite()
    spoiled = kept.to(compute) @ finite.logical_not().to(compute) > 0
    exact = weights @ torch.where(finite, v, 0).to(compute)
    out = torch.empty_like(q)
    out.copy_(torch.where(spoiled, float("nan"), exact))
    return out, lse


def labels(order: Tensor, offsets: Tensor) -> Tensor:
    """The cluster of every token, int64 [B, H, N], from the sorted order and where clusters begin in it."""
    place = torch.arange(order.shape[-1], dtype=offsets.dtype, device=order.device).expand(order.shape)
    cluster = torch.searchsorted(offsets[..., 1:].contiguous(), place.contiguous(), right=True)
    return torch.empty_like(cluster).scatter(-1, order.long(), cluster)
