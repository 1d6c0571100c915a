"""Attention over blocks of any size on the CPU: PyTorch's own flash kernel over just the kept keys.

The kept keys of a query cluster are gathered and attended as one call: no padding, no masked work. Clusters
that keep every key need no gathering. Reads the map on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import unpack_bits


def attend(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, offsets: Tensor, mask: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """As :func:`reference.attend`; a full map gives ``F.scaled_dot_product_attention`` bit for bit.

    Args:
        q, k, v: [B, H, N, D].
        order: int32 [B, H, 2, N]; ``offsets``: int32 [B, H, Cq + Ck + 2]; ``mask``: int32 [B, H, Cq, W].
        scale: factor of q·k.

    Returns:
        out like q, lse fp32 [B, H, N] (fp64 for fp64 inputs).
    """
    query_clusters = mask.shape[2]
    kept = unpack_bits(mask, offsets.shape[2] - query_clusters - 2)
    if bool(kept.all()):
        out, lse = flash(q, k, v, scale)
        return torch.empty_like(q).copy_(out), lse
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            head = (q[b, h], k[b, h], v[b, h], order[b, h].long(), offsets[b, h], kept[b, h])
            _attend_head(*head, scale, out[b, h], lse[b, h])
    return out, lse


def _attend_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    kept: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """Fill ``out`` [N, D] and ``lse`` [N] of one head; q, k, v: [N, D], kept: bool [Cq, Ck]."""
    query_clusters = kept.shape[0]
    begins = offsets[: query_clusters + 1].tolist()
    key_sizes = offsets[query_clusters + 1 :].diff()
    key_cluster = torch.repeat_interleave(key_sizes)  # of every sorted key
    queries, keys, values = q[order[0]], k[order[1]], v[order[1]]
    sorted_out, sorted_lse = torch.empty_like(queries), torch.empty_like(lse)
    for cluster, (begin, end) in enumerate(zip(begins, begins[1:], strict=False)):
        if begin == end:
            continue
        listed = kept[cluster][key_cluster].nonzero().flatten()
        everything = listed.numel() == keys.shape[0]
        out_part, lse_part = flash(
            queries[None, None, begin:end],
            (keys if everything else keys[listed])[None, None],
            (values if everything else values[listed])[None, None],
            scale,
        )
        sorted_out[begin:end], sorted_lse[begin:end] = out_part[0, 0], lse_part[0, 0]
    out[order[0]] = sorted_out
    lse[order[0]] = sorted_lse


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel behind ``F.scaled_dot_product_attention`` on the CPU, with its LSE [B, H, N]."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, scale=scale)
