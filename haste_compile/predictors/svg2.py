"""Sparse VideoGen 2: semantic clusters of queries and of keys as blocks of any size (NeurIPS 2025)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

import haste_compile.kernels.cluster_ops  # noqa: F401  (defines the ops)
from haste_compile._torch import guarded
from haste_compile.config import HasteConfig
from haste_compile.predictors.base import Layout, OpCall, Predictor, Size, reuse_options

REFRESH = torch.ops.haste.refresh_clusters_.default
ATTENTION = torch.ops.haste.cluster_sparse_attention.default

#: Tokens that fall to a query cluster, and to a key cluster, at least on average (*ours*): a model with fewer
#: tokens than Wan gets fewer clusters. Wan at 480p has 109 and 33, so there the numbers are the paper's. On
#: nano-wan coarser clusters lose to XAttention: what a centroid hides of its tokens' scores misleads the map.
TOKENS_A_CLUSTER = (16, 8)


class SVG2(Predictor):
    """HASTE's second host. A head keeps centroids, the order of its tokens by cluster, and the map."""

    #: δ of HASTE for SVG2 on Wan.
    defaults: ClassVar[dict[str, Any]] = {"delta": 8.0}

    def blocks(self, tokens: Size, config: HasteConfig) -> tuple[Size, Size]:
        q_clusters, k_clusters = (
            most if guarded(tokens > most * each) else -(-tokens // each)
            for most, each in zip(config.clusters, TOKENS_A_CLUSTER, strict=True)
        )
        return q_clusters, k_clusters

    def why_not(self, tokens: Size, config: HasteConfig) -> str | None:
        if not guarded(tokens > TOKENS_A_CLUSTER[0]):
            return f"{tokens} tokens are a single cluster of queries"
        return None

    def state(self, tokens: Size, dim: Size, config: HasteConfig) -> dict[str, Layout]:
        q_clusters, k_clusters = self.blocks(tokens, config)
        return {
            "centroids": ((q_clusters + k_clusters, dim), torch.float32),
            "order": ((2, tokens), torch.int32),
            "offsets": ((q_clusters + k_clusters + 2,), torch.int32),
            "mask": ((q_clusters, -(-k_clusters // 32)), torch.int32),
            "anchors": ((2, dim), torch.float32),
        }

    def refresh(self, config: HasteConfig, scale: float) -> OpCall:
        fields = ("centroids", "order", "offsets", "mask", "anchors", "counters")
        options = {
            "scale": scale,
            "first_iterations": config.cluster_iterations[0],
            "iterations": config.cluster_iterations[1],
            "tolerance": config.cluster_tolerance,
            "floor": config.cluster_floor,
            **reuse_options(config),
        }
        return OpCall(REFRESH, ("top_p", "delta", "ctl", *fields), options)

    def attention(self, config: HasteConfig, scale: float) -> OpCall:
        return OpCall(ATTENTION, ("order", "offsets", "mask", "ctl"), {"scale": scale})
