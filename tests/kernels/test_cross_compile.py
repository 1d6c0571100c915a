from __future__ import annotations

import itertools
import math
import re

import pytest

from haste_compile.errors import DependencyError

pytest.importorskip("triton")
from haste_compile.kernels.block_sparse_attention.kernel import block_sparse_attention_kernel  # noqa: E402
from haste_compile.kernels.block_sparse_attention.launch import Launch, choose_launch  # noqa: E402
from haste_compile.kernels.cross_compile import (  # noqa: E402
    SHARED_MEMORY_LIMIT,
    CrossCompiled,
    Request,
    compile_all,
    compile_for,
    kernel_name,
)

TYPES = {"bf16": 2, "fp16": 2}


def request(
    target: str,
    block: int,
    dim: int,
    dtype: str,
    *,
    ragged: bool = True,
    tma_ready: bool = True,
    launch: Launch | None = None,
) -> Request:
    """The attention kernel with the launch parameters of ``target``; without TMA, with strides of 64 bits."""
    version = int(re.sub(r"\D", "", target))
    launch = launch or choose_launch(
        (version // 10, version % 10), block=block, dim=dim, itemsize=TYPES[dtype], tma_ready=tma_ready
    )
    host = launch.tma and launch.host_descriptors
    tile = f"tensordesc<{dtype}[1,1,{block},{dim}]>" if host else f"*{dtype}:16"
    signature = {"q": f"*{dtype}:16", "k": tile, "v": tile, "out": f"*{dtype}:16", "lse": "*fp32:16"}
    signature |= {
        "counts": "*i32:16",
        "indices": "*i32:16",
        "tokens": "i32",
        "key_blocks": "i32",
        "scale": "fp32",
    }
    signature |= {f"stride_{x}{axis}": "i32:16" if tma_ready else "i64" for x in "qkvo" for axis in "bhn"}
    constexprs = {
        "BLOCK": block,
        "D": dim,
        "RAGGED": ragged,
        "TMA": launch.tma,
        "HOST_DESCRIPTORS": launch.host_descriptors,
        "PARTS": launch.parts,
    }
    return Request(
        kernel=kernel_name(block_sparse_attention_kernel),
        signature=signature,
        constexprs=constexprs,
        target=target,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


HOPPER = {
    f"{block} × {dim} {dtype}{'' if ragged else ', whole blocks'}": request(
        "sm_90a", block, dim, dtype, ragged=ragged
    )
    for block, dim, dtype, ragged in (
        (128, 128, "bf16", True),
        (128, 128, "bf16", False),
        (128, 64, "fp16", True),
        (64, 128, "bf16", True),
        (64, 64, "fp16", True),
    )
}
ON_THE_DEVICE = {
    f"{block} × {dim} {dtype}, descriptors made on the device": request(
        "sm_90a",
        block,
        dim,
        dtype,
        launch=Launch(True, num_warps=8, num_stages=stages, host_descriptors=False),
    )
    for block, dim, dtype, stages in ((128, 128, "bf16", 2), (128, 64, "fp16", 4))
}
#: Every launch that the table gives to other architectures. None of them has run on such a GPU.
ELSEWHERE = {
    f"{target}, {block} × {dim}": request(target, block, dim, "bf16")
    for target, block, dim in itertools.product(("sm_80", "sm_89", "sm_120a"), (64, 128), (64, 128))
} | {"sm_90a, no TMA": request("sm_90a", 128, 128, "bf16", tma_ready=False)}


@pytest.fixture(scope="module")
def compiled() -> dict[str, CrossCompiled]:
    requests = HOPPER | ON_THE_DEVICE | ELSEWHERE
    return dict(zip(requests, compile_all(list(requests.values())), strict=True))


@pytest.mark.parametrize("name", [*HOPPER, *ON_THE_DEVICE, *ELSEWHERE])
def test_every_launch_fits(name: str, compiled: dict[str, CrossCompiled]) -> None:
    request = (HOPPER | ON_THE_DEVICE | ELSEWHERE)[name]
    assert 0 < compiled[name].shared <= SHARED_MEMORY_LIMIT[request.target]
    assert 0 < compiled[name].registers <= 255


@pytest.mark.parametrize("name", ELSEWHERE)
def test_other_architectures_use_tensor_cores_and_spill_nothing(
    name: str, compiled: dict[str, CrossCompiled]
) -> None:
    assert "mma.sync" in compiled[name].ptx or "wgmma.mma_async" in compiled[name].ptx
    assert compiled[name].spill_bytes == 0


@pytest.mark.parametrize("name", [*HOPPER, *ON_THE_DEVICE])
def test_hopper_uses_its_tensor_cores_and_tma_and_spills_nothing(
    name: str, compiled: dict[str, CrossCompiled]
) -> None:
    assert "wgmma.mma_async" in compiled[name].ptx
    assert "cp.async.bulk.tensor" in compiled[name].ptx
    assert compiled[name].spill_bytes == 0


@pytest.mark.parametrize("name", [*HOPPER, *ON_THE_DEVICE])
def test_no_tma_copy_writes_past_its_tile(name: str, compiled: dict[str, CrossCompiled]) -> None:
    # Triton 3.6 splits a tile between consumers and leaves a host-made descriptor as large as it was.
    copies = re.findall(
        r"async_tma_copy_global_to_local .*tensordesc<tensor<([\dx]+)x\w+,.*-> !ttg\.memdesc<([\dx]+)x",
        compiled[name].ttgir,
    )
    assert len(copies) >= 3
    for described, tile in copies:
        assert math.prod(map(int, described.split("x"))) == math.prod(map(int, tile.split("x")))


def test_a_kernel_that_does_not_compile_is_an_error_with_the_compilers_words() -> None:
    good = HOPPER["64 × 64 fp16"]
    with pytest.raises(DependencyError, match="block_sparse_attention_kernel"):
        compile_for(
            block_sparse_attention_kernel,
            good.signature,
            good.constexprs | {"BLOCK": 65},  # no power of two
            num_warps=good.num_warps,
        )
