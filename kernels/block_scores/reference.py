"""Specification of XAttention's block scores."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block_scores(q: Tensor, k: Tensor, *, block: int, stride: int) -> Tensor:
    """Estimate the softmax mass between blocks from every ``stride``-th antidiagonal (XAttention §2.1).

    Groups are ``stride`` consecutive tokens; a query group meets a key group with its tokens reversed,
    S[i, j] = Σ_r q[i·s + s−1−r] · k[j·s + r] / (√D · s), which samples the antidiagonals of QKᵀ. The softmax
    over key groups is summed over the (block/s)² group pairs of each block pair. *Ours*: groups past the last
    token have no mass on either side, a ragged last group uses its real tokens under the same scale, scores
    are float32 throughout.

    Args:
        q, k: [B, H, N, D], any strides, floating point.
        block: tokens a block; ``stride``: s, a divisor of ``block``.

    Returns:
        [B, H, T, T], T = ceil(N / block), float32 (float64 for float64 input); a row sums to the number of
        query groups in its block that hold a real token.
    """
    batch, heads, tokens, dim = q.shape
    blocks = -(-tokens // block)
    groups = blocks * block // stride
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    pad = (0, 0, 0, blocks * block - tokens)
    grouped_q = torch.nn.functional.pad(q.to(wide), pad).reshape(batch, heads, groups, stride, dim)
    grouped_k = torch.nn.functional.pad(k.to(wide), pad).reshape(batch, heads, groups, stride, dim)

    pairs = grouped_q.flip(3).flatten(3) @ grouped_k.flatten(3).transpose(2, 3)
    real = torch.arange(groups, device=q.device) * stride < tokens
    mass = torch.softmax((pairs / (math.sqrt(dim) * stride)).masked_fill(~real, -math.inf), dim=-1)
    mass = mass.masked_fill(~real[:, None], 0.0)
    per_block = block // stride
    return mass.reshape(batch, heads, blocks, per_block, blocks, per_block).sum(dim=(3, 5))
