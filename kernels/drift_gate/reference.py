"""Specification of temporal mask reuse: drift, layer gate, and the bookkeeping of masks and videos."""

from __future__ import annotations

import torch
from torch import Tensor

from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl


def decide(
    q_mean: Tensor,
    k_mean: Tensor,
    delta: Tensor,
    ctl: Tensor,
    anchors: Tensor,
    counters: Tensor,
    *,
    tokens: int,
    reuse: str,
    interval: int,
    max_age: int,
    gate_low: float,
    gate_high: float,
    relative: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Decide for one slot which heads rebuild, move their anchors, keep the counts.

    A head *wants* a rebuild when its drift d = ‖Q̄_a − Q̄‖₁ + ‖K̄_a − K̄‖₁ exceeds δ (HASTE §3; an unordered
    comparison counts as exceeding, so NaN rebuilds). The layer gate (HEART) then looks at the share of heads
    that want one: below ``gate_low`` none rebuilds, above ``gate_high`` all do. *Ours*: heads without a mask
    of this video, forced ones and over-aged ones rebuild whatever the gate says; the relative drift divides
    by ‖Q̄_a‖₁ + ‖K̄_a‖₁ (written as a product, so that an all-zero anchor needs no special case).

    Args:
        q_mean, k_mean: fp32 [B, H, D], present token means.
        delta: fp32 [>= H], drift threshold per head.
        ctl: int32 [8], see ``Ctl``.
        anchors: fp32 [B, H, 2, D] of the slot; ``counters``: int64 [B, H, 8] of the slot, see ``Counter``.
        tokens: N.
        reuse: "drift", "never" (always rebuild), "freeze" (never rebuild) or "interval".
        interval: calls between two rebuilds when ``reuse="interval"``.
        max_age: longest run of reuses of one mask; 0 for no limit.
        gate_low, gate_high: layer gate, used by ``reuse="drift"`` alone.
        relative: δ is a ratio, not a raw norm.

    Returns:
        rebuild, bool [B, H]; the new anchors; the new counters, with KEPT = 0 for rebuilding heads and their
        pairs still to be added to KEPT and KEPT_SUM, which only the new mask can tell.
    """
    heads = q_mean.shape[1]
    epoch = ctl[Ctl.EPOCH].long()
    sparse = ctl[Ctl.DENSE] == 0

    means = torch.stack((q_mean, k_mean), dim=2)
    drift = (anchors - means).abs().sum(dim=(2, 3))
    limit = delta[:heads] * (anchors.abs().sum(dim=(2, 3)) if relative else torch.ones_like(drift))

    same_video = counters[..., Counter.SEEN] == epoch
    age = torch.where(same_video, counters[..., Counter.AGE], 0)
    forced = (counters[..., Counter.EPOCH] != epoch) | (ctl[Ctl.FORCE] != 0)
    if max_age > 0:
        forced = forced | (age + 1 > max_age)
    if reuse == "drift":
        wants = forced | ~(drift <= limit)
        share = wants.double().sum(dim=1, keepdim=True) / heads
        rebuild = forced | ((wants | (share > gate_high)) & ~(share < gate_low))
    elif reuse == "interval":
        rebuild = forced | (age + 1 >= interval)
    elif reuse == "never":
        rebuild = torch.ones_like(forced)
    else:  # "freeze"
        rebuild = forced
    rebuild = rebuild & sparse

    refreshes = torch.where(same_video, counters[..., Counter.REFRESHES], 0)
    calls = torch.where(same_video, counters[..., Counter.CALLS], 0)
    kept = torch.where(rebuild, 0, counters[..., Counter.KEPT])
    kept_sum = torch.where(same_video, counters[..., Counter.KEPT_SUM], 0)
    columns: dict[int, Tensor] = {
        Counter.EPOCH: torch.where(rebuild, epoch, counters[..., Counter.EPOCH]),
        Counter.AGE: torch.where(rebuild, 0, age + sparse.long()),
        Counter.REFRESHES: refreshes + rebuild.long(),
        Counter.CALLS: calls + 1,
        Counter.KEPT: kept,
        Counter.KEPT_SUM: kept_sum + torch.where(sparse, kept, tokens * tokens),
        Counter.SEEN: epoch.expand_as(kept),
    }
    # Put together and not assigned column by column: an exported graph then holds one node for all.
    new = torch.stack([columns.get(i, counters[..., i]) for i in range(COUNTER_COLUMNS)], dim=-1)
    return rebuild, torch.where(rebuild[..., None, None], means, anchors), new
