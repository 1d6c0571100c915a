"""Specification of the k-means clustering of tokens (Sparse VideoGen 2)."""

from __future__ import annotations

import torch
from torch import Tensor


def first_centroids(x: Tensor, clusters: int) -> Tensor:
    """Where the first step of a video starts (*ours*): tokens at even distances along the sequence.

    Taken from the data and drawn from nothing, so that a video is the same on every run; neighbours in a
    video are alike, so tokens that lie apart make better starts than the first ones.

    Args:
        x: [M, N, D]; ``clusters``: C.

    Returns:
        fp32 [M, C, D] (fp64 for fp64 input).
    """
    tokens = x.shape[1]
    place = (2 * torch.arange(clusters, device=x.device) + 1) * tokens // (2 * clusters)
    return x[:, place].to(torch.promote_types(x.dtype, torch.float32))


def assign(x: Tensor, centroids: Tensor) -> Tensor:
    """The nearest centroid of every token by squared Euclidean distance; ties go to the lower index.

    ‖x‖² is the same for all centroids and left out. *Ours*: centroids are rounded to the dtype of the tokens
    before the product, so that the tensor cores take them; norms are those of the rounded values, so
    distances to the rounded centroids are exact up to fp32 sums.

    Args:
        x: [M, N, D]; ``centroids``: fp32 [M, C, D].

    Returns:
        int64 [M, N].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded = centroids.to(x.dtype).to(wide)
    norms = rounded.square().sum(-1).unsqueeze(1)
    return torch.baddbmm(norms, x.to(wide), rounded.transpose(1, 2), alpha=-2).min(-1).indices


def update(x: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """The mean of every cluster's tokens; an empty cluster keeps its centroid.

    Args:
        x: [M, N, D]; ``labels``: int64 [M, N]; ``centroids``: fp32 [M, C, D].

    Returns:
        fp32 [M, C, D].
    """
    wide = x.to(centroids.dtype)
    index = labels.unsqueeze(-1)
    sizes = wide.new_zeros(*centroids.shape[:2], 1).scatter_add(1, index, torch.ones_like(wide[..., :1]))
    sums = torch.zeros_like(centroids).scatter_add(1, index.expand_as(wide), wide)
    return torch.where(sizes > 0, sums / sizes.clamp(min=1), centroids)


def kmeans(x: Tensor, centroids: Tensor, *, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: ``iterations`` times ``assign`` and ``update``.

    Labels are those of the last assignment, and centroids the means of exactly these clusters. A head stops
    before its iterations are up when no centroid of it moved further than ``tolerance``; with 0 that changes
    nothing, since what does not move is assigned alike for ever.

    Args:
        x: [M, N, D], the tokens of M heads, any strides, floating point.
        centroids: fp32 [M, C, D], where to start.
        iterations: at least 1.
        tolerance: Euclidean distance, at least 0.

    Returns:
        labels int64 [M, N], centroids fp32 [M, C, D].
    """
    labels = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    moving = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    for _ in range(iterations):
        labels = torch.where(moving[:, None], assign(x, centroids), labels)
        means = update(x, labels, centroids)
        moving &= (means - centroids).square().sum(-1).amax(-1) > tolerance**2
        centroids = means
        if not bool(moving.any()):
            break
    return labels, centroids
