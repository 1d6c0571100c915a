"""Hopper's attention kernel as a C++ operator, for graphs that Inductor compiles.

Live graphs on Hopper run a Gluon kernel, which Inductor cannot compile. So an exported graph calls it as an
operator: its machine code and that of ``tail_order_kernel``, made by Triton at export, lie in a small shared
library that registers the operator, makes the TMA descriptors and launches both (``attention.cpp``). The
library is a file of the artifact and must be loaded before it; that takes neither Triton nor haste_compile,
and C++ does it with ``dlopen``.

The operator's name holds a digest of all that went into the library, so that artifacts of several kinds live
side by side in one process.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from haste_compile.errors import ArtifactError
from haste_compile.kernels.cross_compile import CrossCompiled, Request, compile_all, kernel_name
from haste_compile.loading import import_optional

if TYPE_CHECKING:
    from haste_compile.artifacts.capture import Captured

NAMESPACE = "haste_native"

_SOURCE = Path(__file__).with_name("attention.cpp")

#: torch's dtype -> Triton's name, CUDA's name for descriptors, C++ name.
_DTYPES = {
    torch.bfloat16: ("bf16", "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16", "BFloat16"),
    torch.float16: ("fp16", "CU_TENSOR_MAP_DATA_TYPE_FLOAT16", "Half"),
}

#: Triton's number of a swizzle -> CUDA's name.
_SWIZZLES = {3: "CU_TENSOR_MAP_SWIZZLE_128B"}

_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, float scale) -> Tensor"


def suits(captured: Captured, capability: tuple[int, int]) -> bool:
    """Whether live graphs of this transformer run Hopper's kernel, at every site and with equal sizes."""
    from haste_compile.kernels.block_sparse_attention import hopper

    return (
        capability[0] == 9
        and captured.config.block_size == hopper.BLOCK
        and captured.dtype in _DTYPES
        and {spec.D for spec in captured.specs} == {hopper.DIM}
        and len({spec.N for spec in captured.specs}) == 1
    )


def build(dtype: torch.dtype, tokens: int, library: Path) -> str:
    """Compile the kernels for Hopper and the library around them; takes seconds, needs a C++ compiler.

    Args:
        dtype: of q, k and v: bfloat16 or float16.
        tokens: N, of which only matters whether it is whole blocks.
        library: the file to write.

    Returns:
        The operator's name in ``torch.ops.haste_native``.

    Raises:
        DependencyError: triton is missing, or rejects a kernel.
        ArtifactError: the C++ compiler is missing or fails.
    """
    from haste_compile.kernels.block_sparse_attention import hopper

    ragged = tokens % hopper.BLOCK != 0
    order, attention = compile_all([order_request(), attention_request(dtype, ragged=ragged)])
    header = _header(order, attention, dtype, ragged)
    parts = [_SOURCE.read_bytes(), header.encode(), order.cubin, attention.cubin]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()
    operator = f"attention_{digest[:16]}"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "order.cubin").write_bytes(order.cubin)
        (work / "attention.cubin").write_bytes(attention.cubin)
        (work / "kernels.h").write_text(
            f'#define HASTE_OPERATOR "{operator}"\n#define HASTE_SCHEMA "{operator}{_SCHEMA}"\n{header}'
        )
        _compile(work, library)
    return operator


def order_request() -> Request:
    """The kernel that ``tail_order.order_tail`` launches, for the usual schedule.

    Raises:
        ArtifactError: the kernel takes other arguments than ``attention.cpp`` passes.
    """
    from haste_compile.kernels.block_sparse_attention import hopper, tail_order

    signature = {"counts": "*i32:16", "order": "*i32:16", "counter": "*i32:16", "tiles": "i32"}
    constexprs = {"TAIL": hopper.Schedule().tail, "PART": tail_order.PART}
    return _request(tail_order.tail_order_kernel, signature, constexprs)


def attention_request(dtype: torch.dtype, *, ragged: bool) -> Request:
    """The live kernel with its usual schedule, as ``hopper.attend`` launches it.

    Raises:
        ArtifactError: as :func:`order_request`.
    """
    from haste_compile.kernels.block_sparse_attention import hopper

    name = _DTYPES[dtype][0]
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"

    def tile(rows: int) -> str:
        return f"tensordesc<{name}[1, 1, {rows}, {hopper.DIM}],{layout}>"

    query, key, pointer = tile(hopper.BLOCK // 2), tile(hopper.BLOCK), "*i32:16"
    signature = {
        "q": query, "k": key, "v": key, "out": query, "lse": "*fp32:16", "counts": pointer,
        "indices": pointer, "order": pointer, "counter": pointer, "heads": "i32", "query_blocks": "i32",
        "key_blocks": "i32", "tokens": "i32", "tiles": "i32", "scale": "fp32",
    }  # fmt: skip
    schedule = {field.upper(): value for field, value in dataclasses.asdict(hopper.Schedule()).items()}
    constexprs = {"D": hopper.DIM, "RAGGED": ragged, **schedule}
    return _request(hopper.block_sparse_attention_hopper, signature, constexprs)


def _request(kernel: Any, signature: dict[str, str], constexprs: dict[str, Any]) -> Request:
    found = list(inspect.signature(kernel.fn).parameters)
    if found[: len(signature)] != list(signature) or set(found[len(signature) :]) != set(constexprs):
        raise ArtifactError(
            found=", ".join(found),
            wanted=", ".join([*signature, *constexprs]),
            where=kernel_name(kernel),
            fix="Make attention.cpp pass what the kernel takes.",
        )
    return Request(kernel=kernel_name(kernel), signature=signature, constexprs=constexprs)


def load(operator: str, library: Path) -> None:
    """Make the operator known to this process, unless it is."""
    if not hasattr(getattr(torch.ops, NAMESPACE), operator):
        torch.ops.load_library(str(library.resolve()))


def declare(operator: str) -> None:
    """Tell tracers what the loaded operator returns."""

    def fake(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, indices: Tensor, scale: float) -> Tensor:
        batch, heads, tokens, dim = q.shape
        return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)

    torch.library.register_fake(f"{NAMESPACE}::{operator}", fake, allow_override=True)


def _header(order: CrossCompiled, attention: CrossCompiled, dtype: torch.dtype, ragged: bool) -> str:
    """What ``attention.cpp`` has to know of the kernels."""
    from haste_compile.kernels.block_sparse_attention import hopper, tail_order

    read: Any = ast.literal_eval
    tiles = read(attention.metadata["tensordesc_meta"])
    query, key, value, out = (tile["block_size"] for tile in tiles)
    kernels = {"ORDER": order, "ATTENTION": attention}
    for kernel in kernels.values():
        metadata = kernel.metadata
        scratch = read(metadata["global_scratch_size"]) or read(metadata["profile_scratch_size"])
        cluster = read(metadata["num_ctas"])
        if scratch or query != out or key != value or cluster != 1:
            raise ArtifactError(
                found=f"descriptors {tiles}, {scratch} bytes of scratch, {cluster} blocks a cluster",
                wanted="a kernel that attention.cpp can launch",
                where=f"{read(metadata['name'])}, compiled by this Triton",
                fix="Install triton 3.6 or 3.7.",
            )

    def box(sizes: list[int]) -> str:
        return "{" + ", ".join(map(str, reversed(sizes))) + "}"

    _, data_type, scalar_type = _DTYPES[dtype]
    values = {
        "DATA_TYPE": data_type,
        "SCALAR_TYPE": f"torch::headeronly::ScalarType::{scalar_type}",
        "SWIZZLE": _SWIZZLES[tiles[0]["swizzle"]],
        "QUERY_BOX": box(query),
        "KEY_BOX": box(key),
        "DIM": hopper.DIM,
        "DIM_TEXT": f'"{hopper.DIM}"',
        "BLOCK": hopper.BLOCK,
        "RAGGED": str(ragged).lower(),
        "TAIL": hopper.Schedule().tail,
        "PART": tail_order.PART,
    }
    for name, kernel in kernels.items():
        values |= {
            f"{name}_CUBIN": f'"{name.lower()}.cubin"',
            f"{name}_KERNEL": f'"{read(kernel.metadata["name"])}"',
            f"{name}_SHARED": kernel.shared,
            f"{name}_THREADS": 32 * read(kernel.metadata["num_warps"]),
        }
    return "".join(f"#define HASTE_{name} {value}\n" for name, value in values.items())


def _compile(work: Path, library: Path) -> None:
    from torch.utils import cpp_extension

    triton = import_optional("triton", extra="gpu")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or "g++"
    of_cuda = Path(triton.__file__).parent / "backends" / "nvidia" / "include"  # cuda.h, without a toolkit
    command = [
        compiler, "-std=c++20", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", str(_SOURCE),
        *(f"-I{path}" for path in (work, *cpp_extension.include_paths("cpu"), of_cuda)),
        *(f"-L{path}" for path in cpp_extension.library_paths("cpu")),
        "-ltorch_cpu", "-lc10", "-ldl", "-o", str(library.resolve()),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, cwd=work)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ArtifactError(
            found=said.strip()[-2000:],
            wanted="a C++20 compiler that builds the attention operator",
            where=compiler,
            fix="Install g++ 10 or later, or set CXX; AOTInductor needs it too.",
        ) from error
