"""How the plugins make up the two ops: one wiring for TensorRT's layers and the tests' kernel calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

#: A tensor of torch, or of a TensorRT network.
AnyTensor: TypeAlias = Any
#: ``call(name, inputs, attributes)`` -> the outputs of one plugin.
Call = Callable[[str, tuple[Any, ...], Mapping[str, Any]], tuple[Any, ...]]


def refresh_mask(
    call: Call,
    q: AnyTensor,
    k: AnyTensor,
    top_p: AnyTensor,
    delta: AnyTensor,
    ctl: AnyTensor,
    mask: AnyTensor,
    anchors: AnyTensor,
    counters: AnyTensor,
    *,
    block: int,
    stride: int,
    reuse: str = "drift",
    interval: int = 0,
    max_age: int = 0,
    gate_low: float = 0.4,
    gate_high: float = 0.8,
    relative: bool = False,
) -> tuple[AnyTensor, AnyTensor, AnyTensor]:
    """``haste::refresh_mask`` as six plugins; tensors and options as in ``kernels.ops.refresh_mask_``.

    Returns:
        The new mask, anchors and counters; the old ones are only read.
    """
    tokens = int(q.shape[2])
    gate = {
        "tokens": tokens,
        "reuse": reuse,
        "interval": interval,
        "max_age": max_age,
        "gate_low": gate_low,
        "gate_high": gate_high,
        "relative": relative,
    }
    (sums,) = call("token_sums", (q, k), {})
    (means,) = call("token_means", (sums,), {"tokens": tokens})
    flags, new_anchors, decided = call("drift_gate", (means, delta, ctl, anchors, counters), gate)
    (lse,) = call("group_lse", (q, k, flags), {"block": block, "stride": stride})
    selection = {"tokens": tokens, "block": block, "stride": stride}
    new_mask, pairs = call("top_p_select", (lse, top_p, flags, ctl, mask), selection)
    (new_counters,) = call("count_pairs", (pairs, ctl, decided), {})
    return new_mask, new_anchors, new_counters


def block_sparse_attention(
    call: Call,
    q: AnyTensor,
    k: AnyTensor,
    v: AnyTensor,
    mask: AnyTensor,
    ctl: AnyTensor,
    *,
    block: int,
    scale: float,
) -> tuple[AnyTensor, AnyTensor]:
    """``haste::block_sparse_attention`` as two plugins; arguments and results as in ``kernels.ops``."""
    counts, indices = call("expand_mask", (mask, ctl), {})
    out, lse = call("block_sparse_attention", (q, k, v, counts, indices), {"block": block, "scale": scale})
    return out, lse
