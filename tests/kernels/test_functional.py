"""The pure functions against the ops: the same masks, anchors, counters and outputs, call by call."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from predictor import control, site_state
from torch import Tensor, nn

from haste_compile.kernels import functional, ops
from haste_compile.kernels.layout import Counter

FIELDS = ("mask", "anchors", "counters")
#: (slot, epoch, dense, force, drift): a dense step, a first mask, reuse, drift, a second branch, a new video.
CALLS = [
    (0, 1, True, False, 0.0),
    (0, 1, False, False, 0.0),
    (0, 1, False, False, 0.01),
    (1, 2, False, False, 0.0),
    (0, 1, False, False, 0.5),
    (1, 2, False, False, 0.02),
    (0, 1, False, True, 0.0),
    (0, 3, False, False, 0.3),
    (1, 2, True, False, 0.0),
]
RULES: dict[str, dict[str, Any]] = {
    "drift": {},
    "drift with a gate": {"gate_low": 0.4, "gate_high": 0.8},
    "relative drift": {"relative": True},
    "an age limit": {"max_age": 1},
    "never": {"reuse": "never"},
    "freeze": {"reuse": "freeze"},
    "interval": {"reuse": "interval", "interval": 2},
}
SIZES = {"plain": (1, 2, 320, 64, 64), "ragged": (2, 3, 333, 64, 64), "wide": (1, 1, 300, 128, 128)}


def qkv(size: tuple[int, ...], call: int, drift: float) -> list[Tensor]:
    """Tensors that move a little with every call, laid out as a graph delivers them."""
    batch, heads, tokens, dim, _ = size
    generator = torch.Generator().manual_seed(0)
    base = [2 * torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(3)]
    generator.manual_seed(call)
    return [(x + drift * torch.randn(heads, dim, generator=generator)).transpose(1, 2) for x in base]


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_a_sequence_of_calls_equals_the_ops(rule: dict[str, Any], size: tuple[int, ...]):
    batch, heads, tokens, dim, block = size
    options = {"block": block, "stride": 16, "gate_low": 0.0, "gate_high": 1.0, **rule}
    limit = 0.3 if rule.get("relative") else 10.0
    top_p = torch.linspace(0.5, 0.9, max(2, heads))
    delta = torch.linspace(limit, 2 * limit, max(2, heads))
    live = site_state(2, batch, heads, tokens, dim, block)
    state = tuple(x.clone() for x in live)
    for call, (slot, epoch, dense, force, drift) in enumerate(CALLS):
        q, k, v = qkv(size, call, drift)
        ctl = control(slot, epoch, dense=dense, force=force)
        before = [x.clone() for x in state]
        ops.refresh_mask_(q, k, top_p, delta, ctl, *live, **options)
        new = functional.refresh_mask(q, k, top_p, delta, ctl, *state, **options)
        for field, old, untouched, mine, theirs in zip(FIELDS, state, before, new, live, strict=True):
            assert torch.equal(old, untouched), f"{field} was changed in place"
            close = (
                torch.allclose(mine, theirs, rtol=1e-6) if field == "anchors" else torch.equal(mine, theirs)
            )
            assert close, f"{field} differs in call {call}"
        state = new
        scale = 1 / math.sqrt(dim)
        out = functional.block_sparse_attention(q, k, v, state[0], ctl, block=block, scale=scale)
        expected = ops.block_sparse_attention(q, k, v, live[0], ctl, block=block, scale=scale)[0]
        torch.testing.assert_close(out, expected)


def test_the_sequence_meets_reuse_and_rebuilds():
    """Guards the test above: under "drift" some calls rebuild, some reuse, and masks drop blocks."""
    size = SIZES["plain"]
    state = site_state(2, *size)
    rebuilt, kept = [], []
    for call, (slot, epoch, dense, force, drift) in enumerate(CALLS):
        q, k, _ = qkv(size, call, drift)
        ctl = control(slot, epoch, dense=dense, force=force)
        thresholds = torch.full((2,), 0.5), torch.full((2,), 10.0)
        new = functional.refresh_mask(q, k, *thresholds, ctl, *state, block=64, stride=16)
        rebuilt.append(not torch.equal(new[0], state[0]) or not torch.equal(new[1], state[1]))
        kept.append(int(new[2][slot, 0, 0, Counter.KEPT]))
        state = new
    assert rebuilt == [False, True, False, True, True, False, True, True, False]
    assert 0 < max(kept) < size[2] ** 2


def test_the_op_gives_what_the_function_gives():
    size = SIZES["ragged"]
    q, k, _ = qkv(size, 0, 0.0)
    thresholds = torch.full((3,), 0.7), torch.full((3,), 10.0)
    arguments = (q, k, *thresholds, control(1), *site_state(2, *size))
    options = {"block": 64, "stride": 16}
    expected = functional.refresh_mask(*arguments, **options)
    got = torch.ops.haste.refresh_mask(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch.library.opcheck(torch.ops.haste.refresh_mask.default, arguments, options)


class _Site(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctl: Tensor, *state: Tensor) -> Any:
        thresholds = torch.full((3,), 0.7), torch.full((3,), 10.0)
        new = functional.refresh_mask(q, k, *thresholds, ctl, *state, block=64, stride=16)
        return functional.block_sparse_attention(q, k, v, new[0], ctl, block=64, scale=0.125), *new


def test_they_trace_to_a_graph_without_sort_shift_cast_or_mutation():
    """What ONNX's opset 20 has no operator for must not come back unnoticed."""
    size = SIZES["ragged"]
    arguments = (*qkv(size, 0, 0.0), control(), *site_state(2, *size))
    program = torch.export.export(_Site(), arguments).run_decompositions()
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    results = {n.target: n.meta.get("val") for n in calls}
    names = [str(t) for t, x in results.items() if getattr(x, "dtype", None) != torch.bool]  # "&" is fine
    refused = ("sort", "topk", "shift", "bitwise", "view.dtype", "nonzero", "_local_scalar_dense", "haste.")
    assert [name for name in names if any(word in name for word in refused)] == []
    assert not any(target._schema.is_mutable for target in results)
    (slot, epoch, dense, force, drift) = CALLS[4]
    moved = (*qkv(size, 4, drift), control(slot, epoch, dense=dense, force=force), *arguments[4:])
    for got, expected in zip(program.module()(*moved), _Site()(*moved), strict=True):
        torch.testing.assert_close(got, expected)
