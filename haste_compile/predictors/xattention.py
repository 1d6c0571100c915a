"""XAttention: blocks of consecutive tokens, scored by sums over antidiagonals (arXiv 2503.16428)."""

from __future__ import annotations

import torch

import haste_compile.kernels.ops  # noqa: F401  (defines torch.ops.haste)
from haste_compile._torch import guarded
from haste_compile.config import HasteConfig
from haste_compile.predictors.base import Layout, OpCall, Predictor, Size, reuse_options

REFRESH = torch.ops.haste.refresh_mask_.default
ATTENTION = torch.ops.haste.block_sparse_attention.default


class XAttention(Predictor):
    """HASTE's first host. A head's state is its mask, in bits, and its anchors."""

    def blocks(self, tokens: Size, config: HasteConfig) -> tuple[Size, Size]:
        blocks = -(-tokens // config.block_size)
        return blocks, blocks

    def why_not(self, tokens: Size, config: HasteConfig) -> str | None:
        # One block has nothing to skip (and a mask of a single word would be folded away by AOTInductor).
        if not guarded(tokens > config.block_size):
            return f"{tokens} tokens are a single block of {config.block_size}"
        return None

    def state(self, tokens: Size, dim: Size, config: HasteConfig) -> dict[str, Layout]:
        rows, columns = self.blocks(tokens, config)
        return {
            "mask": ((rows, -(-columns // 32)), torch.int32),
            "anchors": ((2, dim), torch.float32),
        }

    def refresh(self, config: HasteConfig, scale: float) -> OpCall:
        # The scores have a scale of their own, 1/(√D·s): they only rank blocks.
        options = {"block": config.block_size, "stride": config.stride, **reuse_options(config)}
        return OpCall(REFRESH, ("top_p", "delta", "ctl", "mask", "anchors", "counters"), options)

    def attention(self, config: HasteConfig, scale: float) -> OpCall:
        return OpCall(ATTENTION, ("mask", "ctl"), {"block": config.block_size, "scale": scale})
