"""Inputs shared by the tests of the mask predictor."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from haste_compile.kernels.layout import COUNTER_COLUMNS, CTL_COLUMNS, Ctl

#: Where Triton kernels run: compiled on a GPU, else interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Kernels run in Triton's interpreter (conftest.py asks for it where there is no GPU).
INTERPRETED = DEVICE == "cpu" and importlib.util.find_spec("triton") is not None

gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")


def tokens_first(
    batch: int,
    heads: int,
    tokens: int,
    dim: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Normal [B, H, N, D] with the strides of a graph, (N·H·D, D, H·D, 1), cut out of a longer tensor of NaN.

    A kernel that reads a token too many finds NaN.
    """
    whole = torch.full((batch, tokens + 40, heads, dim), float("nan"), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    whole[:, :tokens] = (scale * torch.randn(batch, tokens, heads, dim, generator=generator)).to(dtype)
    return whole.to(DEVICE)[:, :tokens].transpose(1, 2)


def control(slot: int = 0, epoch: int = 1, *, dense: bool = False, force: bool = False) -> Tensor:
    """``ctl`` of one call."""
    ctl = torch.zeros(CTL_COLUMNS, dtype=torch.int32)
    ctl[Ctl.SLOT], ctl[Ctl.EPOCH], ctl[Ctl.DENSE], ctl[Ctl.FORCE] = slot, epoch, dense, force
    return ctl


def site_state(
    slots: int, batch: int, heads: int, tokens: int, dim: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fresh mask, anchors and counters of a site."""
    blocks = -(-tokens // block)
    return (
        torch.zeros(slots, batch, heads, blocks, -(-blocks // 32), dtype=torch.int32),
        torch.zeros(slots, batch, heads, 2, dim),
        torch.zeros(slots, batch, heads, COUNTER_COLUMNS, dtype=torch.int64),
    )
