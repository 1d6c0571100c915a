"""The nine plugins: what each reads and writes, and how its kernel is launched.

Shapes are written once, in arithmetic that integers and TensorRT's symbolic dimensions both obey: while a
network is made, only expressions are known; when a kernel is asked for, all sizes are numbers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import triton

from haste_compile.kernels.block_scores.kernel import choose_tile
from haste_compile.kernels.block_sparse_attention.launch import choose_launch
from haste_compile.kernels.drift_gate.kernel import gate_counts
from haste_compile.kernels.expand_mask.kernel import choose_warps as expand_warps
from haste_compile.kernels.token_means.kernel import CHUNK
from haste_compile.kernels.top_p_select.kernel import choose_warps as select_warps

#: An integer, or a dimension expression of TensorRT.
Size: TypeAlias = Any
Capability: TypeAlias = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a contiguous tensor; the dtype in Triton's spelling: fp32, fp16, bf16, i32, i64."""

    shape: tuple[Size, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a plugin's kernel.

    Attributes:
        grid: programs along x, y, z.
        scalars: int32 arguments by name, in the kernel's order; they stand between inputs and outputs.
        constexprs: compile-time arguments.
        num_warps, num_stages: as Triton means them.
    """

    grid: tuple[int, ...]
    scalars: dict[str, int]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2


@dataclasses.dataclass(frozen=True)
class Plugin:
    """One ahead-of-time plugin, which is one kernel.

    Attributes:
        name: of the plugin within the namespace ``haste``, and of its kernel in ``plugins.kernels``.
        inputs, outputs: names of the tensors, in order.
        attributes: names and types (int, float, bool or str) of what is fixed when the network is made.
        describe: ``(inputs..., attributes...)`` by name -> a spec for each output.
        launch: the same with integer shapes, and ``capability`` -> the launch.
    """

    name: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, type]
    outputs: tuple[str, ...]
    describe: Callable[..., tuple[TensorSpec, ...]]
    launch: Callable[..., Launch]


def ceil_div(size: Size, divisor: int) -> Size:
    """⌈size / divisor⌉ by operations that TensorRT's expressions have."""
    return (size + (divisor - 1)) // divisor


def _token_sums(q: TensorSpec, k: TensorSpec) -> tuple[TensorSpec, ...]:
    B, H, N, D = q.shape
    return (TensorSpec((2, B, H, ceil_div(N, CHUNK), D), "fp32"),)


def _launch_token_sums(q: TensorSpec, k: TensorSpec, capability: Capability) -> Launch:
    B, H, N, D = q.shape
    grid = (H, ceil_div(N, CHUNK), 2 * B)
    return Launch(grid, {"tokens": N}, {"D": D, "CHUNK": CHUNK, "TILE": 64})


def _token_means(sums: TensorSpec, tokens: int) -> tuple[TensorSpec, ...]:
    _, B, H, _, D = sums.shape
    return (TensorSpec((2, B, H, D), "fp32"),)


def _launch_token_means(sums: TensorSpec, tokens: int, capability: Capability) -> Launch:
    _, B, H, chunks, D = sums.shape
    return Launch((2 * B * H,), {"chunks": chunks, "tokens": tokens}, {"D": D, "TILE": 32})


def _drift_gate(
    means: TensorSpec,
    delta: TensorSpec,
    ctl: TensorSpec,
    anchors: TensorSpec,
    counters: TensorSpec,
    **attributes: Any,
) -> tuple[TensorSpec, ...]:
    _, B, H, _ = means.shape
    return TensorSpec((B, H), "i32"), anchors, counters


def _launch_drift_gate(
    means: TensorSpec,
    delta: TensorSpec,
    ctl: TensorSpec,
    anchors: TensorSpec,
    counters: TensorSpec,
    tokens: int,
    reuse: str,
    interval: int,
    max_age: int,
    gate_low: float,
    gate_high: float,
    relative: bool,
    capability: Capability,
) -> Launch:
    _, B, H, D = means.shape
    fewest, most = gate_counts(H, gate_low, gate_high)
    scalars = {"slots": anchors.shape[0], "heads": H, "tokens": tokens, "interval": interval}
    scalars |= {"max_age": max_age, "fewest": fewest, "most": most}
    constexprs = {"REUSE": reuse, "RELATIVE": relative, "HEADS": triton.next_power_of_2(H), "D": D}
    return Launch((B,), scalars, constexprs | {"FEATURES": 32})


def _group_lse(
    q: TensorSpec, k: TensorSpec, flags: TensorSpec, block: int, stride: int
) -> tuple[TensorSpec, ...]:
    B, H, N, _ = q.shape
    return (TensorSpec((B, H, ceil_div(N, stride), ceil_div(N, block)), "fp32"),)


def _launch_group_lse(
    q: TensorSpec, k: TensorSpec, flags: TensorSpec, block: int, stride: int, capability: Capability
) -> Launch:
    B, H, N, D = q.shape
    groups, per_block = ceil_div(N, stride), block // stride
    tile = choose_tile(10 * capability[0] + capability[1], _bytes(q), per_block)
    constexprs = {
        "SCALE_LOG2": math.log2(math.e) / (math.sqrt(D) * stride),
        "STRIDE": stride,
        "PER_BLOCK": per_block,
        "D": D,
        "QUERIES": tile.queries,
        "KEYS": tile.keys,
        "FEATURES": tile.features,
        "SWIZZLE": 8,
    }
    tiles = ceil_div(groups, tile.queries) * ceil_div(groups, tile.keys)
    return Launch((tiles, B * H), {"heads": H, "tokens": N}, constexprs, tile.num_warps, tile.num_stages)


def _top_p_select(
    lse: TensorSpec,
    top_p: TensorSpec,
    flags: TensorSpec,
    ctl: TensorSpec,
    mask: TensorSpec,
    tokens: int,
    block: int,
    stride: int,
) -> tuple[TensorSpec, ...]:
    B, H, _, blocks = lse.shape
    return mask, TensorSpec((B, H, blocks), "i64")


def _launch_top_p_select(
    lse: TensorSpec,
    top_p: TensorSpec,
    flags: TensorSpec,
    ctl: TensorSpec,
    mask: TensorSpec,
    tokens: int,
    block: int,
    stride: int,
    capability: Capability,
) -> Launch:
    B, H, groups, blocks = lse.shape
    padded = max(32, triton.next_power_of_2(blocks))
    scalars = {"slots": mask.shape[0], "heads": H, "tokens": tokens, "groups": groups, "words": mask.shape[4]}
    constexprs = {"PER_BLOCK": block // stride, "BLOCK": block, "BLOCKS": padded}
    return Launch((blocks, B * H), scalars, constexprs, num_warps=select_warps(padded))


def _count_pairs(pairs: TensorSpec, ctl: TensorSpec, counters: TensorSpec) -> tuple[TensorSpec, ...]:
    return (counters,)


def _launch_count_pairs(
    pairs: TensorSpec, ctl: TensorSpec, counters: TensorSpec, capability: Capability
) -> Launch:
    B, H, blocks = pairs.shape
    return Launch((B * H,), {"slots": counters.shape[0], "rows": blocks}, {"TILE": 128})


def _expand_mask(mask: TensorSpec, ctl: TensorSpec) -> tuple[TensorSpec, ...]:
    _, B, H, blocks, _ = mask.shape
    return TensorSpec((B, H, blocks), "i32"), TensorSpec((B, H, blocks, blocks), "i32")


def _launch_expand_mask(mask: TensorSpec, ctl: TensorSpec, capability: Capability) -> Launch:
    _, B, H, blocks, words = mask.shape
    padded = max(32, triton.next_power_of_2(blocks))
    scalars = {"key_blocks": blocks, "words": words}
    return Launch((blocks, B * H), scalars, {"BLOCKS": padded}, num_warps=expand_warps(padded))


def _attention(
    q: TensorSpec,
    k: TensorSpec,
    v: TensorSpec,
    counts: TensorSpec,
    indices: TensorSpec,
    block: int,
    scale: float,
) -> tuple[TensorSpec, ...]:
    B, H, N, _ = q.shape
    return q, TensorSpec((B, H, N), "fp32")


def _launch_attention(
    q: TensorSpec,
    k: TensorSpec,
    v: TensorSpec,
    counts: TensorSpec,
    indices: TensorSpec,
    block: int,
    scale: float,
    capability: Capability,
) -> Launch:
    B, H, N, D = q.shape
    blocks = ceil_div(N, block)
    launch = choose_launch(capability, block=block, dim=D, itemsize=_bytes(q), tma_ready=False)
    constexprs = {
        "SCALE": scale,
        "BLOCK": block,
        "D": D,
        "RAGGED": N % block != 0,
        "PARTS": launch.parts,
    }
    scalars = {"tokens": N, "key_blocks": blocks}
    return Launch((blocks, H, B), scalars, constexprs, launch.num_warps, launch.num_stages)


def _bytes(x: TensorSpec) -> int:
    return {"fp32": 4, "i32": 4, "i64": 8}.get(x.dtype, 2)


_GATE = {
    "tokens": int,
    "reuse": str,
    "interval": int,
    "max_age": int,
    "gate_low": float,
    "gate_high": float,
    "relative": bool,
}

#: In the order in which a site runs them; the last two are ``haste::block_sparse_attention``.
PLUGINS = (
    Plugin("token_sums", ("q", "k"), {}, ("sums",), _token_sums, _launch_token_sums),
    Plugin("token_means", ("sums",), {"tokens": int}, ("means",), _token_means, _launch_token_means),
    Plugin(
        "drift_gate",
        ("means", "delta", "ctl", "anchors", "counters"),
        _GATE,
        ("flags", "new_anchors", "new_counters"),
        _drift_gate,
        _launch_drift_gate,
    ),
    Plugin(
        "group_lse",
        ("q", "k", "flags"),
        {"block": int, "stride": int},
        ("lse",),
        _group_lse,
        _launch_group_lse,
    ),
    Plugin(
        "top_p_select",
        ("lse", "top_p", "flags", "ctl", "mask"),
        {"tokens": int, "block": int, "stride": int},
        ("new_mask", "pairs"),
        _top_p_select,
        _launch_top_p_select,
    ),
    Plugin(
        "count_pairs", ("pairs", "ctl", "counters"), {}, ("new_counters",), _count_pairs, _launch_count_pairs
    ),
    Plugin("expand_mask", ("mask", "ctl"), {}, ("counts", "indices"), _expand_mask, _launch_expand_mask),
    Plugin(
        "block_sparse_attention",
        ("q", "k", "v", "counts", "indices"),
        {"block": int, "scale": float},
        ("out", "lse"),
        _attention,
        _launch_attention,
    ),
)

BY_NAME = {plugin.name: plugin for plugin in PLUGINS}
