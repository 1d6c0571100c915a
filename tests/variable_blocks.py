"""Inputs of variable-block attention: tokens in clusters of very different sizes, and a map."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from predictor import DEVICE, control, tokens_first
from torch import Tensor

from haste_compile.kernels.block_mask import pack_bits
from haste_compile.kernels.cluster_order.reference import cluster_order
from haste_compile.kernels.variable_block_attention import cpu, reference


class Problem:
    """q, k, v as a graph delivers them, random clusters of very different sizes, some empty, a random map."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.5) -> None:
        batch, heads, tokens, dim, rows, columns = shape
        self.q, self.k, self.v = (
            tokens_first(batch, heads, tokens, dim, dtype, seed=seed) for seed in range(3)
        )
        generator = torch.Generator().manual_seed(7)
        self.labels = [
            (torch.rand(batch, heads, tokens, generator=generator).square() * clusters).long()
            for clusters in (rows, columns)
        ]
        sorted_ = [
            cluster_order(x.flatten(0, 1), n) for x, n in zip(self.labels, (rows, columns), strict=True)
        ]
        leading = (batch, heads)
        self.order = torch.stack([order for order, _ in sorted_], 1).int().unflatten(0, leading).to(DEVICE)
        offsets = torch.cat([offsets for _, offsets in sorted_], 1).int()
        self.offsets = offsets.unflatten(0, leading).to(DEVICE)
        self.map = torch.rand(batch, heads, rows, columns, generator=generator) < density
        self.map.scatter_(3, self.labels[1][:, :, :1, None].expand(-1, -1, rows, 1), True)  # no row is empty

    @property
    def mask(self) -> Tensor:
        return pack_bits(self.map).to(DEVICE)

    @property
    def kept(self) -> Tensor:
        """The map token by token, bool [B, H, N, N]."""
        rows = self.map.gather(2, self.labels[0].unsqueeze(-1).expand(-1, -1, -1, self.map.shape[3]))
        return rows.gather(3, self.labels[1].unsqueeze(2).expand(-1, -1, self.q.shape[2], -1)).to(DEVICE)

    def attend(self, name: str, *, scale: float = 0.1, **launch: Any) -> tuple[Tensor, Tensor]:
        """By the reference, the CPU path, or the kernel with this state in the second of two slots."""
        from haste_compile.kernels.variable_block_attention import kernel

        state = (self.order, self.offsets, self.mask)
        if name != "kernel":
            return {"reference": reference, "cpu": cpu}[name].attend(
                self.q, self.k, self.v, *state, scale=scale
            )
        return kernel.attend(self.q, self.k, self.v, *self.slots(), scale=scale, **launch)

    def slots(self, *, dense: bool = False) -> list[Tensor]:
        """order, offsets, mask, ctl: this state in the second of two slots, the other one rubbish."""
        state = (self.order, self.offsets, self.mask)
        slots = [torch.stack((torch.full_like(x, 2**20), x)) for x in state]
        return [*slots, control(slot=1, dense=dense).to(DEVICE)]

    def exact(self, scale: float = 0.1) -> tuple[Tensor, Tensor]:
        """In float64, by the definition."""
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~self.kept, float("-inf"))
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    def allowed(self, exact: Tensor, scale: float = 0.1) -> float:
        """Twice the error of SDPA in the same dtype with the mask written out."""
        out = F.scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.kept, scale=scale)
        return 2 * max((out - exact).abs().max().item(), torch.finfo(self.q.dtype).eps)
