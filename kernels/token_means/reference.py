"""Specification of the token means."""

from __future__ import annotations

import torch
from torch import Tensor


def token_means(x: Tensor) -> Tensor:
    """Mean over the tokens of every head, Q̄ and K̄ of HASTE §3, accumulated in float32 at least.

    Args:
        x: [B, H, N, D], any strides, floating point.

    Returns:
        [B, H, D], float32 (float64 for float64 input).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.sum(dim=2, dtype=wide) / x.shape[2]
