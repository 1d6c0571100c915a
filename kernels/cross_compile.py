"""Compile any Triton kernel for a GPU that is not there, and read what came out.

A launch configuration that does not fit (too much shared memory, a spilled accumulator, a loop that was not
warp-specialised, ``wgmma`` missing) is found here, on the CPU, and not by the first user with that GPU.
The compiler runs in a child process for two reasons: ``TRITON_INTERPRET=1``, which tests of the numerics
need, turns off compilation for the whole life of a process; and the child can be given another Triton.

    compiled = compile_for(my_kernel, {"x": "*bf16:16", "n": "i32"}, {"BLOCK": 128}, num_warps=4)
    assert "wgmma" in compiled.ptx and compiled.spill_bytes == 0
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from haste_compile.errors import DependencyError

#: Shared memory that one block may use, in bytes, by compute capability (CUDA C Programming Guide, table 27).
SHARED_MEMORY_LIMIT = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": 227 << 10, "sm_120a": 99 << 10}


@dataclasses.dataclass(frozen=True)
class Request:
    """One kernel with one launch configuration.

    Attributes:
        kernel: ``"module:name"`` of a ``@triton.jit`` or ``@gluon.jit`` function.
        signature: type of every argument that is no constexpr, in Triton's spelling (``"*bf16"``, ``"i32"``,
            ``"tensordesc<bf16[1,1,128,128]>"``); a suffix ``":16"`` states divisibility by 16.
        constexprs: value of every constexpr argument.
        target: "sm_90a", "sm_80", ...
        disassemble: give the machine code too.
        maxnreg: registers a thread that ptxas may use; None: as many as it likes.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, Any]
    target: str = "sm_90a"
    num_warps: int = 4
    num_stages: int = 2
    disassemble: bool = False
    maxnreg: int | None = None


@dataclasses.dataclass(frozen=True)
class CrossCompiled:
    """What the compiler made of a :class:`Request`.

    Attributes:
        ptx, ttgir: the final assembly and the GPU dialect before lowering.
        cubin: what the driver loads.
        shared: shared memory a block, bytes.
        registers: per thread, as ptxas allocated them (before ``setmaxnreg`` of a warp-specialised kernel).
        spill_bytes: local memory that ptxas spilled to, stores and loads together.
        log: what ptxas said.
        sass: the machine code, where the request asked for it, by the nvdisasm that Triton carries.
        metadata: Triton's own record.
        triton: version of the compiler.
    """

    ptx: str
    ttgir: str
    cubin: bytes
    shared: int
    registers: int
    spill_bytes: int
    log: str
    sass: str
    metadata: dict[str, Any]
    triton: str


def compile_for(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    target: str = "sm_90a",
    num_warps: int = 4,
    num_stages: int = 2,
    triton_path: str | None = None,
) -> CrossCompiled:
    """Compile ``fn``, a module-level ``@triton.jit`` function, for ``target``; see :class:`Request`.

    Raises:
        DependencyError: the compiler is missing or rejects the kernel; its own message is included.
    """
    request = Request(
        kernel=kernel_name(fn),
        signature=dict(signature),
        constexprs=dict(constexprs),
        target=target,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return compile_all([request], triton_path=triton_path)[0]


def kernel_name(fn: Any) -> str:
    """``"module:name"`` of a ``@triton.jit`` function, compiled or interpreted."""
    return f"{fn.fn.__module__}:{fn.fn.__name__}"


def compile_all(requests: Sequence[Request], *, triton_path: str | None = None) -> list[CrossCompiled]:
    """Compile several requests in one child process (about a second each, and two to start).

    Args:
        triton_path: folder that holds another Triton, put before everything else on the child's path.

    Raises:
        DependencyError: as :func:`compile_for`.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [triton_path] if triton_path else []
    environment["PYTHONPATH"] = os.pathsep.join(paths + [path for path in sys.path if path])
    environment["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel carries no ptxas log
    environment["TRITON_DUMP_PTXAS_LOG"] = "1"
    child = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
        input=pickle.dumps(list(requests)),
        capture_output=True,
        env=environment,
        check=False,
    )
    if child.returncode != 0:
        raise DependencyError(
            found=child.stderr.decode(errors="replace")[-4000:],
            wanted=f"{len(requests)} compiled kernels",
            where="cross-compilation of " + ", ".join(sorted({request.kernel for request in requests})),
            fix="Install triton 3.6 or 3.7, or correct the kernel or its launch configuration.",
        )
    return pickle.loads(child.stdout)


def _serve() -> None:
    """The child: pickled requests on stdin, pickled results on stdout, everything else on stderr."""
    reply = os.dup(1)
    os.dup2(2, 1)  # ptxas and Triton may print; keep the reply clean
    results = [_compile(request) for request in pickle.load(sys.stdin.buffer)]
    with os.fdopen(reply, "wb") as stream:
        pickle.dump(results, stream)


def _compile(request: Request) -> CrossCompiled:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    module, name = request.kernel.split(":")
    fn = getattr(importlib.import_module(module), name)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, argument in enumerate(fn.arg_names):
        if argument in request.constexprs:
            signature[argument] = "constexpr"
            continue
        kind, _, divisor = request.signature[argument].partition(":")
        signature[argument] = kind
        if divisor:
            attributes[(index,)] = [["tt.divisibility", int(divisor)]]
    kind_of_source = GluonASTSource if fn.is_gluon() else ASTSource
    source = kind_of_source(fn, signature, request.constexprs, attributes)
    capability = int(re.sub(r"\D", "", request.target))
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={
                "num_warps": request.num_warps,
                "num_stages": request.num_stages,
                "maxnreg": request.maxnreg,
            },
        )
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log.getvalue())
    registers = re.findall(r"Used (\d+) registers", log.getvalue())
    metadata = compiled.metadata._asdict()
    return CrossCompiled(
        ptx=compiled.asm["ptx"],
        ttgir=compiled.asm["ttgir"],
        cubin=compiled.asm["cubin"],
        shared=metadata["shared"],
        registers=max(map(int, registers)),
        spill_bytes=sum(map(int, spills)),
        log=log.getvalue(),
        sass=_disassemble(compiled.asm["cubin"], knobs.nvidia.nvdisasm.path) if request.disassemble else "",
        metadata={key: repr(value) for key, value in metadata.items()},
        triton=triton.__version__,
    )


def _disassemble(cubin: bytes, nvdisasm: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, file.name], capture_output=True, check=True, text=True).stdout
