"""Temporal mask reuse, Triton: one program for each sample decides for all its heads and keeps their books.

The decision never leaves the device: the predictor kernels that follow are always launched and read the flags
that this one writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl

_SLOT = tl.constexpr(int(Ctl.SLOT))
_VIDEO = tl.constexpr(int(Ctl.EPOCH))
_DENSE = tl.constexpr(int(Ctl.DENSE))
_FORCE = tl.constexpr(int(Ctl.FORCE))
_COLUMNS = tl.constexpr(COUNTER_COLUMNS)
_EPOCH = tl.constexpr(int(Counter.EPOCH))
_AGE = tl.constexpr(int(Counter.AGE))
_REFRESHES = tl.constexpr(int(Counter.REFRESHES))
_CALLS = tl.constexpr(int(Counter.CALLS))
_KEPT = tl.constexpr(int(Counter.KEPT))
_KEPT_SUM = tl.constexpr(int(Counter.KEPT_SUM))
_SEEN = tl.constexpr(int(Counter.SEEN))


@triton.jit(do_not_specialize=["interval", "max_age", "fewest", "most"])
def decide_kernel(
    means, delta, ctl, anchors, counters, flags,
    heads, every_pair, interval, max_age, fewest, most,
    REUSE: tl.constexpr, RELATIVE: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """Grid (B,).

    every_pair: N², what a dense step computes. fewest, most: the layer gate as head counts; with fewer wishes
    than ``fewest`` none rebuilds, with more than ``most`` all do.
    """
    sample = tl.program_id(0)
    samples = tl.num_programs(0)
    slot = tl.load(ctl + _SLOT).to(tl.int64)
    epoch = tl.load(ctl + _VIDEO).to(tl.int64)
    dense = tl.load(ctl + _DENSE) != 0
    force = tl.load(ctl + _FORCE) != 0

    head = tl.arange(0, HEADS)
    real = head < heads
    row = (slot * samples + sample) * heads + head
    book = counters + row * _COLUMNS
    same_video = tl.load(book + _SEEN, mask=real, other=0) == epoch
    age = tl.where(same_video, tl.load(book + _AGE, mask=real, other=0), 0)

    drift = tl.zeros([HEADS], tl.float32)
    norm = tl.zeros([HEADS], tl.float32)
    for of_keys in tl.static_range(2):
        mean_rows = means + ((of_keys * samples + sample).to(tl.int64) * heads + head) * D
        anchor_rows = anchors + (row * 2 + of_keys) * D
        for feature in range(0, D, FEATURES):
            columns = feature + tl.arange(0, FEATURES)
            mean = tl.load(mean_rows[:, None] + columns[None, :], mask=real[:, None], other=0.0)
            anchor = tl.load(anchor_rows[:, None] + columns[None, :], mask=real[:, None], other=0.0)
            drift += tl.sum(tl.abs(anchor - mean), 1)
            norm += tl.sum(tl.abs(anchor), 1)

    limit = tl.load(delta + head, mask=real, other=0.0)
    if RELATIVE:
        limit = limit * norm
    built = tl.load(book + _EPOCH, mask=real, other=0)
    forced = (built != epoch) | force | ((max_age > 0) & (age + 1 > max_age))
    if REUSE == "drift":
        within = drift <= limit  # false for NaN, which therefore rebuilds
        wants = forced | (within == 0)
        wishes = tl.sum((wants & real).to(tl.int32), 0)
        rebuild = forced | ((wants | (wishes > most)) & (wishes >= fewest))
    elif REUSE == "interval":
        rebuild = forced | (age + 1 >= interval)
    elif REUSE == "never":
        rebuild = forced | (head >= 0)
    else:
        rebuild = forced
    rebuild = rebuild & real & (dense == 0)

    refreshes = tl.where(same_video, tl.load(book + _REFRESHES, mask=real, other=0), 0)
    calls = tl.where(same_video, tl.load(book + _CALLS, mask=real, other=0), 0)
    kept_sum = tl.where(same_video, tl.load(book + _KEPT_SUM, mask=real, other=0), 0)
    kept = tl.where(rebuild, 0, tl.load(book + _KEPT, mask=real, other=0))
    tl.store(book + _EPOCH, tl.where(rebuild, epoch, built), mask=real)
    tl.store(book + _AGE, tl.where(rebuild, 0, tl.where(dense, age, age + 1)), mask=real)
    tl.store(book + _REFRESHES, refreshes + rebuild.to(tl.int64), mask=real)
    tl.store(book + _CALLS, calls + 1, mask=real)
    tl.store(book + _KEPT, kept, mask=real)
    tl.store(book + _KEPT_SUM, kept_sum + tl.where(dense, every_pair, kept), mask=real)
    tl.store(book + _SEEN, tl.zeros([HEADS], tl.int64) + epoch, mask=real)
    tl.store(flags + sample.to(tl.int64) * heads + head, rebuild.to(tl.int32), mask=real)

    for of_keys in tl.static_range(2):
        mean_rows = means + ((of_keys * samples + sample).to(tl.int64) * heads + head) * D
        anchor_rows = anchors + (row * 2 + of_keys) * D
        for feature in range(0, D, FEATURES):
            columns = feature + tl.arange(0, FEATURES)
            mean = tl.load(mean_rows[:, None] + columns[None, :], mask=rebuild[:, None], other=0.0)
            tl.store(anchor_rows[:, None] + columns[None, :], mean, mask=rebuild[:, None])


def gate_counts(heads: int, low: float, high: float) -> tuple[int, int]:
    """The layer gate in heads: count/heads < low ⟺ count < fewest, and count/heads > high ⟺ count > most.

    Counted out on the host in float64: a share of exactly 0.4 or 0.8 must not depend on float32 rounding.
    """
    fewest = sum(count / heads < low for count in range(heads + 1))
    most = sum(count / heads <= high for count in range(heads + 1)) - 1
    return fewest, most


def decide_(
    means: Tensor,
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
) -> Tensor:
    """Decide which heads rebuild; moves ``anchors`` and keeps ``counters`` of the slot in ``ctl``, in place.

    Args:
        means: fp32 [2, B, H, D], present means of q and of k.
        delta: fp32 [>= H]; ``ctl``: int32 [8].
        anchors: fp32 [S, B, H, 2, D]; ``counters``: int64 [S, B, H, 8]; both contiguous.
        tokens, reuse, interval, max_age, gate_low, gate_high, relative: as in the reference.

    Returns:
        flags, int32 [B, H], 1 where the head rebuilds. For those heads KEPT is 0 and their pairs are still to
        be added to KEPT and KEPT_SUM, which ``top_p_select`` does.
    """
    _, batch, heads, dim = means.shape
    flags = torch.empty(batch, heads, dtype=torch.int32, device=means.device)
    fewest, most = gate_counts(heads, gate_low, gate_high)
    launchable(decide_kernel)[(batch,)](
        means, delta, ctl, anchors, counters, flags,
        heads, tokens * tokens, interval, max_age, fewest, most,
        REUSE=reuse, RELATIVE=relative, HEADS=triton.next_power_of_2(heads), D=dim, FEATURES=32, num_warps=4,
    )  # fmt: skip
    return flags
