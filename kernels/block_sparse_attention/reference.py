"""Block-sparse attention, specification: every score is computed, masked scores are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.block_mask import unpack_bits


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention renormalised over the kept key blocks, the last step of HASTE's host pipeline (§3).

    What dropped keys hold, even NaN, does not reach the result.

    Args:
        q, k, v: [B, H, N, D].
        mask: int32 [B, H, Tq, W], bit j of a row set = key block j kept; every row keeps a block.
        block: tokens a block; the last block may hold fewer.
        scale: factor of q·k.

    Returns:
        out: like q in shape, strides and dtype.
        lse: [B, H, N], natural log of the sum of exponentials over kept keys; fp32 (fp64 for fp64 inputs).
    """
    tokens = k.shape[2]
    kept_blocks = unpack_bits(mask, -(-tokens // block))
    of_token = torch.arange(tokens, device=q.device) // block
    kept = kept_blocks[:, :, of_token][..., of_token]
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
