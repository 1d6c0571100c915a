"""Every kernel under SVG2, in every launch configuration, compiles for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

pytest.importorskip("triton")
from haste_compile.kernels.cluster_map import kernel as cluster_map  # noqa: E402
from haste_compile.kernels.cluster_order import kernel as cluster_order  # noqa: E402
from haste_compile.kernels.cross_compile import (  # noqa: E402
    SHARED_MEMORY_LIMIT,
    CrossCompiled,
    Request,
    compile_all,
    kernel_name,
)
from haste_compile.kernels.kmeans import kernel as kmeans  # noqa: E402
from haste_compile.kernels.kmeans.variants import VARIANTS as KMEANS  # noqa: E402
from haste_compile.kernels.variable_block_attention import kernel as attention  # noqa: E402
from haste_compile.kernels.variable_block_attention import work_lists  # noqa: E402
from haste_compile.kernels.variable_block_attention.launch import choose_launch  # noqa: E402


def strides(names: str) -> dict[str, str]:
    return {f"stride_{x}{axis}": "i32:16" for x in names for axis in "bhn"}


def kmeans_request(
    dim: int, dtype: str, target: str = "sm_90a", tiles: kmeans.Tiles | None = None
) -> Request:  # fmt: skip
    tiles = tiles or kmeans.choose_tiles(int(target[3:].rstrip("a")), 2)
    signature = {
        "q": f"*{dtype}:16", "k": f"*{dtype}:16", "flags": "*i32:16", "ctl": "*i32:16", "counters": "*i64:16",
        "progress": "*i32:16", "centroids": "*fp32:16", "rounded": f"*{dtype}:16", "norms": "*fp32:16",
        "labels": "*i32:16", "table": "*i32:16", "placed": "*i32:16", "sizes": "*i32:16",
        "order": "*i32:16", "offsets": "*i32:16", "heads": "i32", "rows": "i32",
        "tokens": "i32:16", "chunks": "i32", "q_clusters": "i32",
        "k_clusters": "i32", "first_iterations": "i32", "iterations": "i32", "limit": "fp32",
        **strides("qk"),
    }  # fmt: skip
    tile = {
        "D": dim, "SIDES": 32, "TOKENS": tiles.tokens, "CENTROIDS": tiles.centroids,
        "STEPS": kmeans.fold_steps(tiles), "TURNS": tiles.turns, "OWNED": tiles.owned, "BUCKETS": 32,
        "MEMBERS": tiles.members, "CHUNKS": tiles.chunks, "DEALT": tiles.dealt,
    }  # fmt: skip
    return Request(
        kernel_name(kmeans.cluster_kernel),
        signature,
        tile,
        target,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        maxnreg=tiles.registers,
        disassemble=target == "sm_90a",
    )


def assert_fits(request: Request, compiled: CrossCompiled, programs: int) -> None:
    """So many programs stand on a multiprocessor of Hopper at once, and no loop over products spills."""
    registers = -(-compiled.registers // 8) * 8 * 32 * request.num_warps
    assert programs * registers <= 65536, request
    assert programs * (compiled.shared + 1024) <= 228 << 10, request
    lines = compiled.sass.splitlines()
    labels = {line.split(":")[0].strip(): place for place, line in enumerate(lines) if line.startswith(".L_")}
    jumps = [(place, re.search(r"BRA.*`\((\.L_\w+)\)", line)) for place, line in enumerate(lines)]
    loops = [(labels[jump[1]], end) for end, jump in jumps if jump and labels.get(jump[1], end) < end]
    inner = [
        "\n".join(lines[begin:end])
        for begin, end in loops
        if not any(begin <= a and b <= end and (a, b) != (begin, end) for a, b in loops)
    ]
    distances = [loop for loop in inner if "HGMMA" in loop and "FSETP" in loop]
    assert len(distances) == 1, request
    assert not re.search(r"\b(LDL|STL)\b", distances[0]), request


def attention_requests(dim: int, dtype: str, cluster: float) -> list[Request]:
    launch = choose_launch((9, 0), dim=dim, itemsize=2, cluster=cluster)
    shared = {
        "q": f"*{dtype}:16", "k": f"*{dtype}:16", "v": f"*{dtype}:16", "out": f"*{dtype}:16",
        "lse": "*fp32:16", "order": "*i32:16", "offsets": "*i32:16", "mask": "*i32:16", "ctl": "*i32:16",
        "tiles": "*i32:16", "counts": "*i32:16", "lists": "*i32:16", "ends": "*i32:16",
        "first": "i32", "all_heads": "i32",
        "heads": "i32", "tokens": "i32", "q_clusters": "i32", "k_clusters": "i32", "words": "i32",
        "most": "i32", "scale": "fp32", **strides("qkvo"),
    }  # fmt: skip
    tile = {"D": dim, "ROWS": launch.rows, "COLUMNS": launch.columns}
    return [
        Request(
            kernel_name(attention.variable_block_attention_kernel),
            shared,
            tile,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        ),
        Request(
            kernel_name(work_lists.row_tiles_kernel),
            shared,
            {"ROWS": launch.rows, "CLUSTERS": 512, "SMALL_LAST": 1},
        ),
        Request(
            kernel_name(work_lists.found_lists_kernel),
            shared,
            {"CLUSTERS": 1024, "HALVINGS": 10, "TILE": work_lists.FOUND_TILE},
        ),
    ]


def other_requests() -> list[Request]:
    shared = {
        "labels": "*i32:16", "flags": "*i32:16", "ctl": "*i32:16", "table": "*i32:16", "order": "*i32:16",
        "offsets": "*i32:16", "centroids": "*fp32:16", "logits": "*fp32:16", "top_p": "*fp32:16",
        "mask": "*i32:16", "counters": "*i64:16", "tokens": "i32", "chunks": "i32", "heads": "i32",
        "q_clusters": "i32", "k_clusters": "i32", "words": "i32", "least": "i32", "scale_log2": "fp32",
    }  # fmt: skip
    requests = []
    for padded in (32, 1024):
        chunk = {"CHUNK": cluster_order.CHUNK, "CLUSTERS": padded}
        tile = {"TILE": cluster_order.TILE}
        warps = cluster_map.choose_warps(padded)
        requests += [
            Request(kernel_name(cluster_order.count_kernel), shared, chunk),
            Request(kernel_name(cluster_order.begin_kernel), shared, {"CLUSTERS": padded}),
            Request(kernel_name(cluster_order.place_kernel), shared, chunk | tile, num_warps=8),
            Request(kernel_name(cluster_map.select_kernel), shared, {"CLUSTERS": padded}, num_warps=warps),
        ]
    for dim in (64, 128):
        size = cluster_map.LOGITS_TILE
        tile = {"D": dim, "FEATURES": 32, "ROWS": size, "COLUMNS": size}
        requests.append(Request(kernel_name(cluster_map.logits_kernel), shared, tile, num_warps=8))
    return requests


def test_every_kernel_fits_hopper_and_the_products_use_its_tensor_cores():
    requests = [
        *(kmeans_request(*kind) for kind in ((128, "bf16"), (64, "fp16"))),
        *itertools.chain(
            *(
                attention_requests(dim, dtype, cluster)
                for dim, dtype, cluster in ((128, "bf16", 252), (128, "bf16", 109), (64, "fp16", 64))
            )
        ),
        *other_requests(),
    ]
    on_tensor_cores = {
        kernel_name(kernel) for kernel in (kmeans.cluster_kernel, attention.variable_block_attention_kernel)
    }
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert compiled.shared <= SHARED_MEMORY_LIMIT[request.target], request
        if request.maxnreg is None:
            assert compiled.spill_bytes == 0, request
        if request.kernel in on_tensor_cores:
            assert "wgmma.mma_async" in compiled.ptx, request


@pytest.mark.parametrize("name", KMEANS)
def test_so_many_programs_of_kmeans_fit_as_are_launched(name: str):
    request = kmeans_request(128, "bf16", tiles=KMEANS[name])
    assert_fits(request, compile_all([request])[0], KMEANS[name].programs)


def test_the_cooperative_kernel_fits_every_gpu_and_its_programs_meet():
    requests = [
        dataclasses.replace(request, constexprs={**request.constexprs, "SIDES": 256, "BUCKETS": 64})
        for request in (kmeans_request(128, "bf16", target) for target in SHARED_MEMORY_LIMIT)
    ]  # a batch of 3, 40 heads, up to 2,048 clusters
    for request, compiled in zip(requests, compile_all(requests), strict=True):
        assert compiled.shared <= SHARED_MEMORY_LIMIT[request.target], request
        if request.maxnreg is None:
            assert compiled.spill_bytes == 0, request
        else:
            assert_fits(request, compiled, kmeans.choose_tiles(90, 2).programs)
        # A meeting: all threads have stored, one says so and comes; one looks who came, then all go on.
        flow = re.findall(
            r"bar\.sync|st\.global|atom\.global\.gpu\.release\.add|ld\.global\.gpu\.acquire", compiled.ptx
        )
        meetings = [place for place, word in enumerate(flow) if word.startswith("atom")]
        assert len(meetings) == 5, request
        for place in meetings:
            assert flow[place - 1] == "bar.sync"
            assert flow[place + 1 : place + 4] == ["bar.sync", "ld.global.gpu.acquire", "bar.sync"]
