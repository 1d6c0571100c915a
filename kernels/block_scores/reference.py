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
    tokens, dim = q.shape[2:]
    blocks, groups, per_block = -(-tokens // block), -(-tokens // stride), block // stride
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    pad = (0, 0, 0, groups * stride - tokens)  # completes a ragged last group; no group is all padding
    grouped_q = torch.nn.functional.pad(q.to(wide), pad).unflatten(2, (groups, stride))
    grouped_k = torch.nn.functional.pad(k.to(wide), pad).unflatten(2, (groups, stride))

    scaled_q = grouped_q.flip(3).flatten(3) / (math.sqrt(dim) * stride)
    mass = torch.softmax(scaled_q @ grouped_k.flatten(3).transpose(2, 3), dim=-1)
    missing = blocks * per_block - groups
    mass = torch.nn.functional.pad(mass, (0, missing, 0, missing))
    return mass.unflatten(3, (blocks, per_block)).sum(4).unflatten(2, (blocks, per_block)).sum(3)
