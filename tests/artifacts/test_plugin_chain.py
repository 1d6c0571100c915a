"""The chain of plugins against the pure ops: the same masks, anchors, counters and outputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from predictor import DEVICE, control, site_state
from torch import Tensor

from haste_compile.artifacts.plugins import chain
from haste_compile.kernels import functional

pytest.importorskip("triton")
import plugin_calls  # noqa: E402

#: Every branch of the gate that a launch parameter decides; the rules of reuse are one kernel's own matter.
OPTIONS: dict[str, Any] = {
    "reuse": "drift",
    "interval": 0,
    "max_age": 3,
    "gate_low": 0.4,
    "gate_high": 0.8,
    "relative": True,
}
#: (slot, epoch, dense, drift): a first mask, a second branch, reuse, a dense step, a new video.
CALLS = [
    (0, 1, False, 0.0),
    (1, 2, False, 0.0),
    (0, 1, False, 0.01),
    (1, 2, True, 0.5),
    (0, 3, False, 0.3),
]


def qkv(batch: int, heads: int, tokens: int, dim: int, call: int, drift: float) -> list[Tensor]:
    """Tensors that move a little with every call."""
    generator = torch.Generator().manual_seed(0)
    base = [2 * torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3)]
    generator.manual_seed(call)
    return [(x + drift * torch.randn(heads, 1, dim, generator=generator)).to(DEVICE) for x in base]


def test_a_sequence_of_calls_equals_the_pure_ops() -> None:
    batch, heads, tokens, dim, block = 2, 2, 197, 64, 64
    options = {"block": block, "stride": 4, **OPTIONS}
    top_p = torch.linspace(0.5, 0.9, heads)
    delta = torch.linspace(0.3, 0.6, heads)
    state = site_state(2, batch, heads, tokens, dim, block)
    rebuilt = []
    for number, (slot, epoch, dense, drift) in enumerate(CALLS):
        q, k, v = qkv(batch, heads, tokens, dim, number, drift)
        ctl = control(slot, epoch, dense=dense)
        before = [x.clone() for x in state]
        got = chain.refresh_mask(plugin_calls.call, q, k, top_p, delta, ctl, *state, **options)
        expected = functional.refresh_mask(q, k, top_p, delta, ctl, *state, **options)
        assert all(map(torch.equal, state, before)), "the old state is only read"
        assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2]), f"call {number}"
        torch.testing.assert_close(got[1], expected[1], rtol=1e-5, atol=1e-6)
        rebuilt.append(not torch.equal(got[0], before[0]))
        state = got

        scale = 1 / math.sqrt(dim)
        out, lse = chain.block_sparse_attention(
            plugin_calls.call, q, k, v, state[0], ctl, block=block, scale=scale
        )
        wanted = functional.block_sparse_attention(q, k, v, state[0], ctl, block=block, scale=scale)
        torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
        assert lse.isfinite().all()
    assert rebuilt[0] and not all(rebuilt)  # some masks were built, some reused
