"""Temporal mask reuse by the book, in the reference and in the kernel."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from predictor import DEVICE, control, site_state
from torch import Tensor

from haste_compile.kernels.drift_gate import reference
from haste_compile.kernels.layout import Counter

pytest.importorskip("triton")
from haste_compile.kernels.drift_gate import kernel  # noqa: E402

TOKENS, DIM = 100, 64
RULE: dict[str, Any] = {
    "tokens": TOKENS, "reuse": "drift", "interval": 0, "max_age": 0, "gate_low": 0.0, "gate_high": 1.0,
    "relative": False,
}  # fmt: skip


class Gate:
    """A site whose head h has query mean (x_h, 0, 0, …) and key mean (0, y_h, 0, …): drift = |Δx| + |Δy|."""

    def __init__(self, implementation: str, heads: int, delta: float, *, slots: int = 2, **rule: Any) -> None:
        self.kernel, self.rule = implementation == "kernel", RULE | rule
        self.delta = torch.full((max(heads, 2),), delta)
        self.anchors, self.counters = site_state(slots, 1, heads, TOKENS, DIM, 64)[1:]
        self.heads = heads

    def means(self, x: Any, y: Any) -> Tensor:
        """fp32 [2, B, H, D] from numbers or nested [H] or [B][H] lists."""
        x = torch.as_tensor(x, dtype=torch.float32).broadcast_to(self.anchors.shape[1:3])
        means = torch.zeros(2, *x.shape, DIM)
        means[0, :, :, 0] = x
        means[1, :, :, 1] = torch.as_tensor(y, dtype=torch.float32).broadcast_to(x.shape)
        return means

    def batch(self, samples: int) -> Gate:
        self.anchors = self.anchors.repeat(1, samples, 1, 1, 1)
        self.counters = self.counters.repeat(1, samples, 1, 1)
        return self

    def __call__(self, x: Any, y: Any = 0.0, slot: int = 0, epoch: int = 1, **ctl: bool) -> list[Any]:
        """One call; returns which heads rebuild, [H] of 0/1, or [B][H] for several samples."""
        means, ctl_tensor = self.means(x, y), control(slot, epoch, **ctl)
        if self.kernel:
            moved = [t.to(DEVICE) for t in (means, self.delta, ctl_tensor, self.anchors, self.counters)]
            flags = kernel.decide_(*moved, **self.rule).cpu()
            self.anchors, self.counters = moved[3].cpu(), moved[4].cpu()
        else:
            flags, self.anchors[slot], self.counters[slot] = reference.decide(
                means[0],
                means[1],
                self.delta,
                ctl_tensor,
                self.anchors[slot],
                self.counters[slot],
                **self.rule,
            )
        rows = flags.int().tolist()
        return rows[0] if len(rows) == 1 else rows

    def column(self, column: Counter, slot: int = 0) -> list[int]:
        return self.counters[slot, 0, :, column].tolist()


both = pytest.mark.parametrize("implementation", ["reference", "kernel"])


@both
def test_small_drifts_add_up_until_they_exceed_delta(implementation: str):
    gate = Gate(implementation, heads=1, delta=1.0)
    drifts = [(0.0, 0.0), (0.5, 0.0), (0.5, 0.5), (0.5, 0.75), (1.0, 0.25), (1.0, 0.0), (2.0, 2.0)]
    # From the anchor:      0.5 ≤ δ     1.0 ≤ δ     1.25 > δ: (0.5, 0.75) is the anchor; 1.0 ≤ δ; 1.25; 3.0
    assert [gate(x, y) for x, y in drifts] == [[1], [0], [0], [1], [0], [1], [1]]
    assert gate.anchors[0, 0, 0, 0, 0] == 2.0 and gate.anchors[0, 0, 0, 1, 1] == 2.0
    assert gate.column(Counter.REFRESHES) == [4] and gate.column(Counter.CALLS) == [7]


@both
def test_reuse_leaves_anchor_and_kept_pairs_alone(implementation: str):
    gate = Gate(implementation, heads=2, delta=1.0)
    gate([0.25, 3.0])
    gate.counters[0, :, :, Counter.KEPT] = torch.tensor([70, 90])  # as top_p_select does
    before = gate.anchors.clone()
    assert gate([1.0, 4.5]) == [0, 1]
    assert torch.equal(gate.anchors[0, 0, 0], before[0, 0, 0])
    assert gate.anchors[0, 0, 1, 0, 0] == 4.5
    assert gate.column(Counter.AGE) == [1, 0]
    assert gate.column(Counter.KEPT) == [70, 0]  # the new mask of head 1 is yet to be counted
    assert gate.column(Counter.KEPT_SUM) == [70, 0]


@both
@pytest.mark.parametrize(
    ("wishes", "rebuilt"),
    [(0, 0), (3, 0), (4, 4), (5, 5), (8, 8), (9, 10), (10, 10)],  # of 10 heads: r < 0.4 none, r > 0.8 all
)
def test_layer_gate(implementation: str, wishes: int, rebuilt: int):
    gate = Gate(implementation, heads=10, delta=1.0, gate_low=0.4, gate_high=0.8)
    gate(0.0)
    drift = [2.0] * wishes + [0.5] * (10 - wishes)
    assert gate(drift) == [1] * rebuilt + [0] * (10 - rebuilt)


@both
@pytest.mark.parametrize(("heads", "wishes", "rebuilt"), [(5, 1, 0), (5, 2, 2), (5, 4, 4), (5, 5, 5)])
def test_layer_gate_at_exactly_its_limits(implementation: str, heads: int, wishes: int, rebuilt: int):
    gate = Gate(implementation, heads=heads, delta=1.0, gate_low=0.4, gate_high=0.8)
    gate(0.0)
    assert sum(gate([2.0] * wishes + [0.0] * (heads - wishes))) == rebuilt


@both
def test_a_vetoed_head_keeps_its_anchor_and_goes_on_drifting(implementation: str):
    gate = Gate(implementation, heads=5, delta=1.0, gate_low=0.4)
    gate(0.0)
    assert gate([1.5, 0.0, 0.0, 0.0, 0.0]) == [0] * 5
    assert gate([1.5, 1.5, 0.0, 0.0, 0.0]) == [1, 1, 0, 0, 0]


@both
def test_a_head_without_a_mask_rebuilds_alone_whatever_the_gate_says(implementation: str):
    gate = Gate(implementation, heads=10, delta=1.0, gate_low=0.4, gate_high=0.8)
    gate(0.0)
    gate.counters[0, 0, 3, Counter.EPOCH] = 0
    assert gate([2.0] + [0.0] * 9) == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]


@both
@pytest.mark.parametrize("reuse", ["drift", "freeze", "interval", "never"])
def test_force_rebuilds_every_head(implementation: str, reuse: str):
    gate = Gate(implementation, heads=3, delta=1.0, reuse=reuse, interval=9, gate_low=1.0)
    gate(0.0)
    assert gate(0.0, force=True) == [1, 1, 1]


@both
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"reuse": "never"}, [1, 1, 1, 1, 1, 1, 1]),
        ({"reuse": "freeze"}, [1, 0, 0, 0, 0, 0, 0]),
        ({"reuse": "interval", "interval": 1}, [1, 1, 1, 1, 1, 1, 1]),
        ({"reuse": "interval", "interval": 3}, [1, 0, 0, 1, 0, 0, 1]),
        ({"reuse": "freeze", "max_age": 1}, [1, 0, 1, 0, 1, 0, 1]),
        ({"reuse": "drift", "max_age": 2, "gate_low": 1.0}, [1, 0, 0, 1, 0, 0, 1]),
        ({"reuse": "interval", "interval": 5, "max_age": 2}, [1, 0, 0, 1, 0, 0, 1]),
    ],
)
def test_schedules(implementation: str, rule: dict[str, Any], expected: list[int]):
    gate = Gate(implementation, heads=2, delta=1.0, **rule)
    assert [gate(0.0)[1] for _ in expected] == expected


@both
def test_over_age_is_not_vetoed_by_the_gate(implementation: str):
    gate = Gate(implementation, heads=5, delta=1.0, max_age=2, gate_low=0.4)
    gate(0.0)
    gate.counters[0, 0, 2, Counter.AGE] = 2
    assert gate(0.0) == [0, 0, 1, 0, 0]


@both
def test_dense_steps_only_count(implementation: str):
    gate = Gate(implementation, heads=2, delta=1.0)
    assert gate(5.0, dense=True) == [0, 0]
    assert gate(6.0, dense=True, force=True) == [0, 0]
    assert torch.equal(gate.anchors, torch.zeros_like(gate.anchors))
    assert gate.column(Counter.EPOCH) == [0, 0] and gate.column(Counter.AGE) == [0, 0]
    assert gate.column(Counter.CALLS) == [2, 2]
    assert gate.column(Counter.KEPT_SUM) == [2 * TOKENS**2] * 2
    assert gate(6.0) == [1, 1]
    assert gate.column(Counter.REFRESHES) == [1, 1]
    assert gate.column(Counter.KEPT_SUM) == [2 * TOKENS**2] * 2  # the new mask is yet to be counted


@both
@pytest.mark.parametrize("dense_first", [False, True])
def test_a_new_video_rebuilds_everything_and_counts_from_zero(implementation: str, dense_first: bool):
    gate = Gate(implementation, heads=5, delta=1.0, reuse="freeze")
    for _ in range(3):
        gate(0.0)
    assert gate.column(Counter.AGE) == [2] * 5
    if dense_first:
        assert gate(0.0, epoch=2, dense=True) == [0] * 5
        assert gate.column(Counter.AGE) == [0] * 5
    assert gate(0.0, epoch=2) == [1] * 5
    assert gate.column(Counter.REFRESHES) == [1] * 5
    assert gate.column(Counter.CALLS) == [1 + dense_first] * 5
    assert gate.column(Counter.EPOCH) == [2] * 5 and gate.column(Counter.SEEN) == [2] * 5


@both
def test_slots_do_not_know_of_each_other(implementation: str):
    gate = Gate(implementation, heads=2, delta=1.0)
    gate(0.0, slot=0)
    first = gate.anchors[0].clone(), gate.counters[0].clone()
    assert gate(5.0, slot=1) == [1, 1]
    assert gate(5.5, slot=1) == [0, 0]
    assert torch.equal(gate.anchors[0], first[0]) and torch.equal(gate.counters[0], first[1])
    assert gate(0.5, slot=0) == [0, 0]


@both
def test_samples_of_a_batch_pass_gates_of_their_own(implementation: str):
    gate = Gate(implementation, heads=5, delta=1.0, gate_low=0.4, gate_high=0.8).batch(3)
    gate(0.0)
    drift = [[2.0] * 1 + [0.0] * 4, [2.0] * 3 + [0.0] * 2, [2.0] * 5]
    assert gate(drift) == [[0] * 5, [1] * 3 + [0] * 2, [1] * 5]


@both
def test_relative_drift_divides_by_the_norm_of_the_anchors(implementation: str):
    gate = Gate(implementation, heads=2, delta=0.25, relative=True)
    gate([1.0, 100.0], [3.0, 300.0])
    assert gate([2.0, 101.0], [3.0, 300.0]) == [0, 0]  # 1/4 and 1/400
    assert gate([2.5, 100.0], [3.0, 300.0]) == [1, 0]  # 1.5/4


@both
def test_a_zero_anchor_is_no_special_case_of_the_relative_drift(implementation: str):
    gate = Gate(implementation, heads=2, delta=0.25, relative=True)
    gate(0.0)
    assert gate([0.0, 1e-3]) == [0, 1]


@both
def test_nan_rebuilds(implementation: str):
    gate = Gate(implementation, heads=2, delta=1.0)
    gate(0.0)
    assert gate([float("nan"), 0.0]) == [1, 0]
    assert gate(0.0) == [1, 0]  # the anchor is NaN now: never trusted


@pytest.mark.parametrize("reuse", ["drift", "never", "freeze", "interval"])
@pytest.mark.parametrize("relative", [False, True])
def test_kernel_keeps_the_same_books_as_the_reference(reuse: str, relative: bool):
    rule: dict[str, Any] = {"reuse": reuse, "relative": relative, "interval": 2, "max_age": 3}
    delta = 0.5 if relative else 64.0
    gates = [
        Gate(name, 12, delta, gate_low=0.4, gate_high=0.8, **rule).batch(2)
        for name in ("reference", "kernel")
    ]
    generator = torch.Generator().manual_seed(3)
    for call in range(8):
        x, y = (torch.randint(0, 64, (2, 12), generator=generator).float() for _ in range(2))
        arguments = {"slot": call % 2, "epoch": 1 + call // 5, "dense": call == 5}
        assert gates[0](x, y, **arguments) == gates[1](x, y, **arguments)
        assert torch.equal(gates[0].anchors, gates[1].anchors)
        assert torch.equal(gates[0].counters, gates[1].counters)


def test_gate_counts_agree_with_shares_in_float64():
    shares = (0.0, 0.1, 0.3, 1 / 3, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)
    for heads, low, high in itertools.product((1, 2, 5, 7, 10, 12, 40), shares, shares):
        fewest, most = kernel.gate_counts(heads, low, high)
        for count in range(heads + 1):
            assert (count < fewest) == (count / heads < low)
            assert (count > most) == (count / heads > high)
