"""Every kernel of the mask predictor, in every launch configuration, compiles for GPUs that are not here."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("triton")
from haste_compile.kernels.block_scores import kernel as block_scores  # noqa: E402
from haste_compile.kernels.cross_compile import (  # noqa: E402
    SHARED_MEMORY_LIMIT,
    CrossCompiled,
    Request,
    compile_all,
    kernel_name,
)
from haste_compile.kernels.drift_gate import kernel as drift_gate  # noqa: E402
from haste_compile.kernels.expand_mask import kernel as expand_mask  # noqa: E402
from haste_compile.kernels.token_means import kernel as token_means  # noqa: E402
from haste_compile.kernels.top_p_select import kernel as top_p_select  # noqa: E402

STRIDES = {f"stride_{x}{axis}": "i64:16" for x in "qk" for axis in "bhn"}
HEAD_DIMS, BLOCKS, GROUP_STRIDES = (64, 128), (64, 128), (4, 8, 16, 32)


def lse_request(block: int, stride: int, dim: int, dtype: str, target: str) -> Request:
    capability = int("".join(c for c in target if c.isdigit()))
    tile = block_scores.choose_tile(capability, 2, block // stride)
    signature = {
        "q": f"*{dtype}:16", "k": f"*{dtype}:16", "flags": "*i32:16", "lse": "*fp32:16", **STRIDES,
        "first": "i32", "heads": "i32", "tokens": "i32", "scale_log2": "fp32",
    }  # fmt: skip
    constexprs = {
        "STRIDE": stride, "PER_BLOCK": block // stride, "D": dim,
        "QUERIES": tile.queries, "KEYS": tile.keys, "FEATURES": tile.features, "SWIZZLE": 8,
    }  # fmt: skip
    name = kernel_name(block_scores.group_lse_kernel)
    return Request(name, signature, constexprs, target, tile.num_warps, tile.num_stages)


def other_requests(target: str) -> list[Request]:
    requests: list[Request] = []
    for dim in HEAD_DIMS:
        requests += [
            Request(
                kernel_name(token_means.chunk_sums_kernel),
                {"q": "*bf16:16", "k": "*bf16:16", "sums": "*fp32:16", "tokens": "i32", **STRIDES},
                {"D": dim, "CHUNK": token_means.CHUNK, "TILE": 64},
                target,
            ),
            Request(
                kernel_name(token_means.combine_kernel),
                {"sums": "*fp32:16", "means": "*fp32:16", "chunks": "i32", "tokens": "i32"},
                {"D": dim, "TILE": 32},
                target,
            ),
        ]
    books = {
        "means": "*fp32:16", "delta": "*fp32:16", "ctl": "*i32:16", "anchors": "*fp32:16",
        "counters": "*i64:16", "flags": "*i32:16", "heads": "i32", "every_pair": "i64", "interval": "i32",
        "max_age": "i32", "fewest": "i32", "most": "i32",
    }  # fmt: skip
    for reuse, heads in itertools.product(("drift", "never", "freeze", "interval"), (16, 64)):
        constexprs = {"REUSE": reuse, "RELATIVE": heads == 64, "HEADS": heads, "D": 128, "FEATURES": 32}
        requests.append(Request(kernel_name(drift_gate.decide_kernel), books, constexprs, target))
    for padded in (32, 1024, 8192):
        selection = {
            "lse": "*fp32:16", "top_p": "*fp32:16", "flags": "*i32:16", "ctl": "*i32:16",
            "mask": "*i32:16", "counters": "*i64:16", "first": "i32", "samples_heads": "i32", "heads": "i32",
            "tokens": "i32", "words": "i32",
        }  # fmt: skip
        expansion = {
            "mask": "*i32:16", "ctl": "*i32:16", "counts": "*i32:16", "indices": "*i32:16",
            "key_blocks": "i32", "words": "i32",
        }  # fmt: skip
        requests += [
            Request(
                kernel_name(top_p_select.select_kernel),
                selection,
                {"STRIDE": 16, "PER_BLOCK": 8, "BLOCK": 128, "BLOCKS": padded},
                target,
                top_p_select.choose_warps(padded),
            ),
            Request(
                kernel_name(expand_mask.expand_kernel),
                expansion,
                {"BLOCKS": padded},
                target,
                expand_mask.choose_warps(padded),
            ),
        ]
    return requests


def assert_fits(request: Request, compiled: CrossCompiled) -> None:
    assert compiled.shared <= SHARED_MEMORY_LIMIT[request.target], request
    assert compiled.spill_bytes == 0, request


def test_score_kernel_uses_wgmma_on_hopper_in_every_configuration():
    shapes = itertools.product(BLOCKS, GROUP_STRIDES, HEAD_DIMS)
    requests = [lse_request(*shape, dtype="bf16", target="sm_90a") for shape in shapes]
    requests.append(lse_request(128, 16, 128, "fp16", "sm_90a"))
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert_fits(request, compiled)
        assert "wgmma.mma_async" in compiled.ptx, request
        # The score tile must not travel through memory on its way to one number a key block.
        assert compiled.ttgir.count("ttg.convert_layout") <= 1, request


@pytest.mark.parametrize("target", ["sm_80", "sm_89", "sm_120a"])
def test_score_kernel_fits_smaller_gpus(target: str):
    shapes = ((128, 16, 128), (128, 4, 128), (64, 32, 64))
    requests = [lse_request(*shape, "bf16", target) for shape in shapes]
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert_fits(request, compiled)
        assert "mma.sync" in compiled.ptx, request


def test_other_kernels_fit():
    requests = other_requests("sm_90a")
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert_fits(request, compiled)
