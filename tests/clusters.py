"""Inputs shared by the tests of SVG2's kernels: tokens that form clusters, and the state of a site."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from predictor import DEVICE, tokens_first
from torch import Tensor

from haste_compile.kernels import cluster_ops
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter


def clustered(
    batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> Tensor:
    """As ``tokens_first``, around nine centres of norm √D each, in no order."""
    generator = torch.Generator().manual_seed(100 + seed)
    centres = torch.randn(batch, heads, 9, dim, generator=generator)
    which = torch.randint(9, (batch, heads, tokens, 1), generator=generator)
    x = tokens_first(batch, heads, tokens, dim, dtype, seed=seed, scale=0.5)
    x += centres.gather(2, which.expand(-1, -1, -1, dim)).to(dtype).to(x.device)
    return x


@dataclasses.dataclass
class Site:
    """Inputs and state of one attention site; fields in the order of the op's arguments."""

    q: Tensor
    k: Tensor
    v: Tensor
    top_p: Tensor
    delta: Tensor
    centroids: Tensor
    order: Tensor
    offsets: Tensor
    mask: Tensor
    anchors: Tensor
    counters: Tensor

    def state(self) -> dict[str, Tensor]:
        names = ("centroids", "order", "offsets", "mask", "anchors", "counters")
        return {name: getattr(self, name) for name in names}

    def copy(self) -> dict[str, Tensor]:
        return {name: x.clone() for name, x in self.state().items()}

    def refresh(self, ctl: Tensor, *, q: Tensor | None = None, k: Tensor | None = None, **rule: Any) -> None:
        rule = {"gate_low": 0.0, "gate_high": 1.0, "first_iterations": 6, "scale": self.scale} | rule
        inputs = (self.q if q is None else q, self.k if k is None else k, self.top_p, self.delta, ctl)
        cluster_ops.refresh_clusters_(*inputs, **self.state(), **rule)

    def attend(self, ctl: Tensor) -> tuple[Tensor, Tensor]:
        state = (self.order, self.offsets, self.mask, ctl)
        return cluster_ops.cluster_sparse_attention(self.q, self.k, self.v, *state, scale=self.scale)

    @property
    def scale(self) -> float:
        return self.q.shape[-1] ** -0.5

    def to(self, device: str) -> Site:
        return Site(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def make_site(
    batch: int = 2,
    heads: int = 3,
    tokens: int = 333,
    dim: int = 64,
    clusters: tuple[int, int] = (5, 21),
    dtype: torch.dtype = torch.float32,
    slots: int = 2,
) -> Site:
    """A site that has seen no call yet."""
    q, k, v = (clustered(batch, heads, tokens, dim, dtype, seed=seed) for seed in range(3))
    leading, (rows, columns) = (slots, batch, heads), clusters

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(*leading, *shape, dtype=dtype, device=DEVICE)

    return Site(
        q,
        k,
        v,
        torch.full((max(heads, 2),), 0.7, device=DEVICE),
        torch.full((max(heads, 2),), 10.0, device=DEVICE),
        zeros(rows + columns, dim, dtype=torch.float32),
        zeros(2, tokens),
        zeros(rows + columns + 2),
        zeros(rows, -(-columns // 32)),
        zeros(2, dim, dtype=torch.float32),
        zeros(COUNTER_COLUMNS, dtype=torch.int64),
    )


def begun(site: Site, slot: int = 0) -> tuple[Tensor, Tensor]:
    """``counters`` in which every head of the slot rebuilds for the first time in a video, and flags."""
    counters = torch.zeros_like(site.counters)
    counters[slot, ..., Counter.REFRESHES] = 1
    flags = torch.ones(counters.shape[1:3], dtype=torch.int32, device=counters.device)
    return counters, flags
