"""Specification of the order of tokens by cluster."""

from __future__ import annotations

import torch
from torch import Tensor


def cluster_order(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Sort the tokens of every head by cluster; inside a cluster they keep their order.

    Args:
        labels: int64 [M, N], in [0, clusters).
        clusters: C; a cluster may be empty.

    Returns:
        order: int64 [M, N], the tokens of cluster 0, then those of cluster 1, ...
        offsets: int64 [M, C + 1]; cluster c is ``order[offsets[c] : offsets[c + 1]]``.
    """
    sizes = torch.zeros(labels.shape[0], clusters, dtype=torch.int64, device=labels.device)
    sizes = sizes.scatter_add(1, labels, torch.ones_like(labels))
    return labels.argsort(dim=1, stable=True), torch.nn.functional.pad(sizes.cumsum(1), (1, 0))
