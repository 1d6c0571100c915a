"""The two ops of an attention site under clusters (Sparse VideoGen 2), as ``ops.py`` has them for blocks.

haste::refresh_clusters_           drift → gate → (k-means → order → map) where a head wants it; mutates
haste::cluster_sparse_attention    attention over the kept clusters; pure
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

import haste_compile.kernels.ops  # noqa: F401  (defines haste::refuse_gradient)
from haste_compile.kernels.checks import bad_input, check_gate, check_heads, check_tensor, read_slot
from haste_compile.kernels.launching import implement_on_cuda
from haste_compile.kernels.layout import CTL_COLUMNS, Counter, Ctl

__all__ = ["cluster_sparse_attention", "refresh_clusters_"]

#: Bytes that the CPU's distances may take; more heads than fit are clustered in turns.
_CPU_DISTANCE_BYTES = 1 << 26

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

torch.library.define(
    "haste::refresh_clusters_",
    "(Tensor q, Tensor k, Tensor top_p, Tensor delta, Tensor ctl, Tensor(a!) centroids, Tensor(b!) order, "
    "Tensor(c!) offsets, Tensor(d!) mask, Tensor(e!) anchors, Tensor(f!) counters, *, float scale, "
    "int first_iterations=50, int iterations=2, float tolerance=0.0, float floor=0.1, "
    'str reuse="drift", int interval=0, int max_age=0, '
    "float gate_low=0.4, float gate_high=0.8, bool relative=False) -> ()",
    tags=_TAGS,
)
torch.library.define(
    "haste::cluster_sparse_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor order, Tensor offsets, Tensor mask, Tensor ctl, *, float scale) "
    "-> (Tensor out, Tensor lse)",
    tags=_TAGS,
)


def refresh_clusters_(
    q: Tensor,
    k: Tensor,
    top_p: Tensor,
    delta: Tensor,
    ctl: Tensor,
    centroids: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    anchors: Tensor,
    counters: Tensor,
    *,
    scale: float,
    first_iterations: int = 50,
    iterations: int = 2,
    tolerance: float = 0.0,
    floor: float = 0.1,
    reuse: str = "drift",
    interval: int = 0,
    max_age: int = 0,
    gate_low: float = 0.4,
    gate_high: float = 0.8,
    relative: bool = False,
) -> None:
    """Bring the clusters and the maps of one site up to date, in place, for the slot that ``ctl`` names.

    Temporal mask reuse decides head by head and sample by sample, as for ``ops.refresh_mask_``. A head that
    rebuilds clusters its queries and its keys (``kmeans``), from its tokens at its first rebuild in a video
    and from its own last centroids afterwards, sorts them (``cluster_order``), and keeps the top-p of every
    query cluster (``cluster_map``). A head that reuses keeps all of that bit-identical, and costs none of it.

    Args:
        q, k: [B, H, N, D], bf16, fp16 or (not on CUDA) fp32, last stride 1, D 64 or 128.
        top_p: fp32 [>= H], mass that a query cluster keeps, in (0, 1].
        delta: fp32 [>= H], drift threshold.
        ctl: int32 [8], columns ``Ctl``; its slot must exist and its epoch be at least 1.
        centroids: fp32 [S, B, H, Cq + Ck, D], of queries, then of keys.
        order: int32 [S, B, H, 2, N], queries and keys sorted by cluster.
        offsets: int32 [S, B, H, Cq + Ck + 2], where clusters begin in that order: of queries, then of keys.
        mask: int32 [S, B, H, Cq, ceil(Ck / 32)]; bit v % 32 of word v // 32: key cluster v.
        anchors: fp32 [S, B, H, 2, D]; ``counters``: int64 [S, B, H, 8], as for ``ops.refresh_mask_``.
        scale: factor of q·k.
        first_iterations, iterations: of k-means, at a head's first rebuild in a video and later.
        tolerance: k-means of a head ends early when no centroid moves further; 0 gives up nothing.
        floor: share of the key clusters that every row keeps, in [0, 1]; rounded up.
        reuse, interval, max_age, gate_low, gate_high, relative: see ``drift_gate.reference.decide``.

    Raises:
        InputError: a tensor or option that the op does not take; on the CPU also a slot that does not exist.
    """
    torch.ops.haste.refresh_clusters_(
        q, k, top_p, delta, ctl, centroids, order, offsets, mask, anchors, counters, scale=scale,
        first_iterations=first_iterations, iterations=iterations, tolerance=tolerance, floor=floor,
        reuse=reuse, interval=interval, max_age=max_age, gate_low=gate_low, gate_high=gate_high,
        relative=relative,
    )  # fmt: skip


def cluster_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the key clusters that the slot's map keeps; over all keys in a dense step.

    Args:
        q, k, v: [B, H, N, D] as in ``refresh_clusters_``.
        order, offsets, mask, ctl: as in ``refresh_clusters_``; only read.
        scale: factor of q·k.

    Returns:
        out, like q in shape, dtype and (dense) strides; lse, fp32 [B, H, N], the natural logarithm of the
        softmax denominator over the kept keys.

    Raises:
        InputError: as in ``refresh_clusters_``.
        AutogradError: when a gradient is asked for; the forward alone works in grad mode.
    """
    return torch.ops.haste.cluster_sparse_attention(q, k, v, order, offsets, mask, ctl, scale=scale)


class _Site(NamedTuple):
    """The tensors of ``haste::refresh_clusters_``."""

    q: Tensor
    k: Tensor
    top_p: Tensor
    delta: Tensor
    ctl: Tensor
    centroids: Tensor
    order: Tensor
    offsets: Tensor
    mask: Tensor
    anchors: Tensor
    counters: Tensor

    @property
    def q_clusters(self) -> int:
        return self.mask.shape[3]

    @property
    def k_clusters(self) -> int:
        return self.centroids.shape[3] - self.mask.shape[3]


class _Rule(NamedTuple):
    """Its options; the dispatcher leaves out those that have their default."""

    scale: float
    first_iterations: int = 50
    iterations: int = 2
    tolerance: float = 0.0
    floor: float = 0.1
    reuse: str = "drift"
    interval: int = 0
    max_age: int = 0
    gate_low: float = 0.4
    gate_high: float = 0.8
    relative: bool = False

    def gate(self) -> dict[str, Any]:
        """The options of ``drift_gate``."""
        names = ("reuse", "interval", "max_age", "gate_low", "gate_high", "relative")
        return {name: getattr(self, name) for name in names}

    def least(self, k_clusters: int) -> int:
        """Key clusters that every row keeps; a product that ought to be whole must not round up."""
        return max(1, math.ceil(self.floor * k_clusters - 1e-9))


@torch.no_grad()  # autograd does not see this op: nothing it does may be recorded
def _refresh_cpu(*tensors: Tensor, **options: Any) -> None:
    site, rule = _checked(tensors, options)
    from haste_compile.kernels.drift_gate import reference as drift_gate
    from haste_compile.kernels.token_means import reference as token_means

    slot, tokens = read_slot(site.ctl, site.mask), site.q.shape[2]
    rebuild, anchors, counters = drift_gate.decide(
        token_means.token_means(site.q),
        token_means.token_means(site.k),
        site.delta,
        site.ctl,
        site.anchors[slot],
        site.counters[slot],
        tokens=tokens,
        **rule.gate(),
    )
    first = counters[..., Counter.REFRESHES] == 1
    at_once = max(1, _CPU_DISTANCE_BYTES // (4 * tokens * max(site.q_clusters, site.k_clusters)))
    for is_first in (True, False):
        samples, heads = (rebuild & (first == is_first)).nonzero(as_tuple=True)
        for b, h in zip(samples.split(at_once), heads.split(at_once), strict=True):
            if b.numel() > 0:  # split() of nothing is one empty piece
                pairs = _rebuild_cpu(site, rule, slot, b, h, first=is_first)
                counters[b, h, Counter.KEPT] = pairs
                counters[b, h, Counter.KEPT_SUM] += pairs
    # Last, so that an interrupted call never leaves a head that claims a map it has not got.
    site.anchors[slot] = anchors
    site.counters[slot] = counters


def _rebuild_cpu(site: _Site, rule: _Rule, slot: int, b: Tensor, h: Tensor, *, first: bool) -> Tensor:
    """Clusters, order and map of the heads (b, h), int64 [M] each; returns their token pairs, int64 [M]."""
    from haste_compile.kernels.cluster_map import reference as cluster_map
    from haste_compile.kernels.cluster_order import reference as cluster_order
    from haste_compile.kernels.kmeans import reference as kmeans

    def cluster(x: Tensor, old: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = kmeans.first_centroids(x, old.shape[1]) if first else old
        iterations = rule.first_iterations if first else rule.iterations
        labels, means = kmeans.kmeans(x, start, iterations=iterations, tolerance=rule.tolerance)
        return means, *cluster_order.cluster_order(labels, old.shape[1])

    of_queries, of_keys = site.centroids[slot, b, h].split((site.q_clusters, site.k_clusters), 1)
    q_means, q_order, q_offsets = cluster(site.q[b, h], of_queries)
    k_means, k_order, k_offsets = cluster(site.k[b, h], of_keys)
    least = rule.least(site.k_clusters)
    sizes = q_offsets.diff(), k_offsets.diff()
    bits = cluster_map.cluster_map(q_means, k_means, sizes[1], site.top_p[h], scale=rule.scale, least=least)
    site.centroids[slot, b, h] = torch.cat((q_means, k_means), 1)
    site.order[slot, b, h] = torch.stack((q_order, k_order), 1).int()
    site.offsets[slot, b, h] = torch.cat((q_offsets, k_offsets), 1).int()
    site.mask[slot, b, h] = bits
    return cluster_map.token_pairs(bits, *sizes)


def _refresh_cuda(*tensors: Tensor, **options: Any) -> None:
    site, rule = _checked(tensors, options)
    from haste_compile.kernels.cluster_map import kernel as cluster_map
    from haste_compile.kernels.drift_gate import kernel as drift_gate
    from haste_compile.kernels.kmeans import kernel as kmeans
    from haste_compile.kernels.token_means import kernel as token_means

    q, k, ctl, counters = site.q, site.k, site.ctl, site.counters
    with torch.cuda.device_of(q):
        means = token_means.token_means(q, k)
        flags = drift_gate.decide_(
            means, site.delta, ctl, site.anchors, counters, tokens=q.shape[2], **rule.gate()
        )
        kmeans.cluster_(
            q, k, flags, ctl, counters, site.centroids,
            q_clusters=site.q_clusters, first_iterations=rule.first_iterations, iterations=rule.iterations,
            tolerance=rule.tolerance, order=site.order, offsets=site.offsets,
        )  # fmt: skip
        cluster_map.select_(
            site.centroids, site.offsets, site.top_p, flags, ctl, site.mask, counters,
            scale=rule.scale, least=rule.least(site.k_clusters),
        )  # fmt: skip


def _refresh_fake(*tensors: Tensor, **options: Any) -> None:
    _checked(tensors, options)


def _attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, order, offsets, mask, ctl)
    from haste_compile.kernels.variable_block_attention import cpu as attention

    if int(ctl[Ctl.DENSE]):  # there may be no clusters yet
        out, lse = attention.flash(q, k, v, scale)
    else:
        slot = read_slot(ctl, mask)
        out, lse = attention.attend(q, k, v, order[slot], offsets[slot], mask[slot], scale=scale)
    result = torch.empty_like(q)
    # SDPA chooses strides of its own; graph compilers were promised those of the fake.
    return (out if out.stride() == result.stride() else result.copy_(out)), lse.contiguous()


def _attention_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, order, offsets, mask, ctl)
    from haste_compile.kernels.variable_block_attention import dispatch as attention

    with torch.cuda.device_of(q):
        return attention.attend(q, k, v, order, offsets, mask, ctl, scale=scale)


def _attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _check_attention(q, k, v, order, offsets, mask, ctl)
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attention_backward(ctx: object, out_gradient: Tensor, lse_gradient: Tensor) -> tuple[Tensor | None, ...]:
    refused = torch.ops.haste.refuse_gradient(out_gradient)
    return refused, refused, refused, None, None, None, None, None


def _checked(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[_Site, _Rule]:
    site, rule = _Site(*tensors), _Rule(**options)
    q = site.q
    check_heads({"q": q, "k": site.k})
    _check_state(q, site.order, site.offsets, site.mask, site.ctl)
    slots, batch, heads, _, _ = site.mask.shape
    clusters = site.offsets.shape[3] - 2
    check_tensor("centroids", site.centroids, q, torch.float32, (slots, batch, heads, clusters, q.shape[3]))
    check_gate(
        q, site.top_p, site.delta, site.ctl, site.anchors, site.counters, slots, rule.reuse, rule.interval
    )
    for name in ("first_iterations", "iterations"):
        if getattr(rule, name) < 1:
            raise bad_input(name, str(getattr(rule, name)), "at least 1", "Give k-means an iteration.")
    if not 0 <= rule.floor <= 1:
        raise bad_input("floor", str(rule.floor), "a share in [0, 1]", "Correct the value.")
    return site, rule


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor, offsets: Tensor, mask: Tensor, ctl: Tensor
) -> None:
    check_heads({"q": q, "k": k, "v": v})
    _check_state(q, order, offsets, mask, ctl)


def _check_state(q: Tensor, order: Tensor, offsets: Tensor, mask: Tensor, ctl: Tensor) -> None:
    batch, heads, tokens, _ = q.shape
    slots, q_clusters = (mask.shape[0], mask.shape[3]) if mask.dim() == 5 else (1, 1)
    k_clusters = (offsets.shape[3] if offsets.dim() == 4 else 0) - 2 - q_clusters
    if k_clusters < 1:
        wanted = "[S, B, H, Cq + Ck + 2] for Cq rows of the mask and at least one key cluster"
        raise bad_input(
            "offsets", f"shape {tuple(offsets.shape)}", wanted, "Allocate mask and offsets alike."
        )
    leading = (slots, batch, heads)
    check_tensor("mask", mask, q, torch.int32, (*leading, q_clusters, -(-k_clusters // 32)))
    check_tensor("offsets", offsets, q, torch.int32, (*leading, q_clusters + k_clusters + 2))
    check_tensor("order", order, q, torch.int32, (*leading, 2, tokens))
    check_tensor("ctl", ctl, q, torch.int32, (CTL_COLUMNS,))


torch.library.impl("haste::refresh_clusters_", "cpu", _refresh_cpu)
implement_on_cuda("haste::refresh_clusters_", _refresh_cuda)
torch.library.register_fake("haste::refresh_clusters_", _refresh_fake)
torch.library.impl("haste::cluster_sparse_attention", "cpu", _attention_cpu)
implement_on_cuda("haste::cluster_sparse_attention", _attention_cuda)
torch.library.register_fake("haste::cluster_sparse_attention", _attention_fake)
torch.library.register_autograd("haste::cluster_sparse_attention", _attention_backward)
