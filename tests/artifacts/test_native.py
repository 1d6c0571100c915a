"""Hopper's kernels as a C++ operator: what its library asks of a CUDA driver that only takes notes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from haste_compile.artifacts import aoti, native
from haste_compile.config import HasteConfig
from haste_compile.errors import ArtifactError
from haste_compile.kernels.cross_compile import CrossCompiled, compile_all

pytest.importorskip("triton")
from haste_compile.kernels.block_sparse_attention.tail_order import (  # noqa: E402
    PART,
    TAIL,
    tail_order_kernel,
)

#: Ragged, several heads, q as a projection gives it and v as a slice of a fused one.
B, H, N, D = 2, 3, 300, 128
STRIDES = {
    "q": (N * H * D, D, H * D, 1),
    "k": (H * N * D, N * D, D, 1),
    "v": (3 * N * H * D, D, 3 * H * D, 1),
    "out": (N * H * D, D, H * D, 1),
}
ADDRESSES = {"q": 0x10000, "k": 0x20000, "v": 0x30000, "out": 0x40000}
COUNTS, INDICES, SCRATCH, STREAM = 0x50000, 0x60000, 0x70000, 0x88
ORDER, ATTENTION = "tail_order_kernel", "block_sparse_attention_hopper"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    library = tmp_path_factory.mktemp("native") / "attention.so"
    return native.build(torch.bfloat16, N, library), library


@pytest.fixture(scope="module")
def operator(built: tuple[str, Path]) -> str:
    native.load(*built)
    native.declare(built[0])
    return built[0]


# A libcuda.so.1 of which every function notes what it was called with.
DRIVER = r"""
#include <cuda.h>
#include <elf.h>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>
#define C extern "C" CUresult
static void note(const char* name, const void* bytes, size_t count) {
  std::printf("%s ", name);
  for (size_t i = 0; i < count; ++i) std::printf("%02x", static_cast<const unsigned char*>(bytes)[i]);
  std::printf("\n");
  std::fflush(stdout);
}
static struct Kernel { const char* name; std::vector<int> parameter_bytes; } kernels[] = {KERNELS};
C cuCtxGetDevice(CUdevice* device) { *device = 1; return CUDA_SUCCESS; }
C cuDeviceGetAttribute(int* value, CUdevice_attribute what, CUdevice) {
  *value = what == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? 7 : CAPABILITY_MAJOR;
  return CUDA_SUCCESS;
}
C cuFuncSetAttribute(CUfunction function, CUfunction_attribute, int value) {
  note((std::string("shared ") + reinterpret_cast<Kernel*>(function)->name).c_str(), &value, 4);
  return CUDA_SUCCESS;
}
C cuGetErrorString(CUresult, const char** text) { *text = "said the driver"; return CUDA_SUCCESS; }
C cuModuleLoadData(CUmodule* module, const void* image) {
  *module = static_cast<CUmodule>(const_cast<void*>(image));
  note("load", image, 4);
  return CUDA_SUCCESS;
}
C cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  const auto* image = reinterpret_cast<const Elf64_Ehdr*>(module);
  if (memmem(image, image->e_shoff, name, std::strlen(name)) == nullptr) return CUDA_ERROR_NOT_FOUND;
  for (Kernel& kernel : kernels)
    if (std::strcmp(kernel.name, name) == 0) *function = reinterpret_cast<CUfunction>(&kernel);
  return CUDA_SUCCESS;
}
C cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                         const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box,
                         const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle swizzle,
                         CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  char* to = reinterpret_cast<char*>(map);
  std::memset(to, 0, sizeof *map);
  const unsigned head[] = {static_cast<unsigned>(type), rank, static_cast<unsigned>(swizzle), 0};
  std::memcpy(to, head, 16);
  std::memcpy(to + 16, &address, 8);
  std::memcpy(to + 24, dims, 32);
  std::memcpy(to + 56, strides, 24);
  std::memcpy(to + 80, box, 16);
  return reinterpret_cast<unsigned long long>(address) % 16 ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
C cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned,
                 unsigned, unsigned shared, CUstream stream, void** parameters, void**) {
  const auto& kernel = *reinterpret_cast<Kernel*>(function);
  const unsigned long long all[] = {x, y, z, threads, shared, reinterpret_cast<unsigned long long>(stream)};
  note(kernel.name, all, sizeof all);
  for (int bytes : kernel.parameter_bytes) note("parameter", *parameters++, bytes);
  return CUDA_SUCCESS;
}
"""

LAUNCH = """
import ctypes, json, sys
library, driver, q = sys.argv[1], sys.argv[2], int(sys.argv[3])
import torch
if driver:
    ctypes.CDLL(driver)
library = ctypes.CDLL(library)
strides = json.loads(sys.argv[4])
longs = lambda values: (ctypes.c_int64 * 4)(*values)
message = ctypes.create_string_buffer(64)
pointer = ctypes.c_void_p
sizes = longs([2, 3, 300, 128])
library.haste_launch(
    pointer(q), pointer(0x20000), pointer(0x30000), pointer(0x40000), sizes,
    *(longs(strides[name]) for name in ("q", "k", "v", "out")), pointer(0x50000), pointer(0x60000),
    pointer(0x70000), ctypes.c_double(0.25), pointer(0x88), message, ctypes.c_size_t(64))
library.haste_scratch.restype = ctypes.c_int64
print("scratch", library.haste_scratch(sizes).to_bytes(8, "little").hex())
print("message", message.value.hex())
"""


def parameter_sizes(ptx: str) -> list[int]:
    entry = ptx[ptx.index(".entry") : ptx.index(".reqntid")]
    kinds = {".u64": 8, ".u32": 4, ".f32": 4}
    found = re.findall(
        r"\.param (?:\.align \d+ )?(\.\w+)(?: \.ptr \.global \.align \d+)? \w+(?:\[(\d+)\])?", entry
    )
    return [int(count) if count else kinds[kind] for kind, count in found]


@pytest.fixture(scope="module")
def kernels() -> dict[str, CrossCompiled]:
    requests = [native.order_request(), native.attention_request(torch.bfloat16, ragged=True)]
    return dict(zip((ORDER, ATTENTION), compile_all(requests), strict=True))


def driver(folder: Path, kernels: dict[str, CrossCompiled], major: int) -> Path:
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    source, library = folder / "driver.cpp", folder / "libcuda.so.1"
    sizes = {name: ", ".join(map(str, parameter_sizes(kernel.ptx))) for name, kernel in kernels.items()}
    table = ", ".join(f'{{"{name}", {{{parameters}}}}}' for name, parameters in sizes.items())
    source.write_text(DRIVER.replace("KERNELS", table))
    command = ["c++", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-I", str(include), str(source)]
    subprocess.run([*command, f"-DCAPABILITY_MAJOR={major}", "-o", str(library)], check=True)
    return library


def launched(library: Path, driver: Path | str, q: int = ADDRESSES["q"]) -> list[tuple[str, bytes]]:
    """What a launch in a process of its own told the driver, then its message."""
    command = [sys.executable, "-c", LAUNCH, str(library), str(driver), str(q), json.dumps(STRIDES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return [
        (name, bytes.fromhex(value))
        for name, _, value in (x.rpartition(" ") for x in done.stdout.splitlines())
    ]


def numbers(data: bytes, size: int = 8) -> list[int]:
    return [int.from_bytes(data[i : i + size], "little") for i in range(0, len(data), size)]


def test_the_kernels_get_their_parameters(
    built: tuple[str, Path], kernels: dict[str, CrossCompiled], tmp_path: Path
):
    order, attention = kernels.values()
    order_sizes, sizes = parameter_sizes(order.ptx), parameter_sizes(attention.ptx)
    assert len(order_sizes) == 4 + 2 and len(sizes) == 4 * (1 + 4 + 4) + 5 + 6 + 2
    notes = launched(built[1], driver(tmp_path, kernels, 9))
    told = dict(notes)
    assert told["message"] == b""
    assert [value for name, value in notes if name == "load"] == 2 * [b"\x7fELF"]
    for name, kernel in kernels.items():
        assert numbers(told[f"shared {name}"], 4) == [kernel.shared]
    # The order first, both on the caller's stream.
    assert [name for name, _ in notes if name in kernels] == [ORDER, ATTENTION]
    for name, programs in ((ORDER, TAIL // PART), (ATTENTION, 7)):
        threads = int(re.search(r"\.reqntid (\d+)", kernels[name].ptx)[1])  # type: ignore[index]
        assert numbers(told[name]) == [programs, 1, 1, threads, kernels[name].shared, STREAM]

    counter, lse = SCRATCH + 4 * TAIL, SCRATCH + 4 * TAIL + 256
    parameters = [value for name, value in notes if name == "parameter"]
    ordering = [numbers(x, len(x))[0] for x in parameters[: len(order_sizes)]]
    assert ordering == [COUNTS, SCRATCH, counter, B * H * 3, 0, 0]  # no scratch of Triton's
    parameters = parameters[len(order_sizes) :]
    for place, name in enumerate(("q", "k", "v", "out")):
        descriptor, *shape_and_strides = parameters[9 * place : 9 * place + 9]
        strides = STRIDES[name]
        assert [numbers(x, len(x))[0] for x in shape_and_strides] == [B, H, N, D, *strides]
        rows = 64 if name in ("q", "out") else 128
        # Bfloat16, rank 4, 128-byte swizzle; everything innermost axis first, strides in bytes.
        assert numbers(descriptor[:12], 4) == [9, 4, 3]
        assert numbers(descriptor[16:80]) == [ADDRESSES[name], D, N, H, B, *(2 * x for x in strides[2::-1])]
        assert numbers(descriptor[80:96], 4) == [64, rows, 1, 1]  # 64 features are the 128 bytes of a swizzle
    rest = [numbers(x, len(x))[0] for x in parameters[36:]]
    assert rest[:5] == [lse, COUNTS, INDICES, SCRATCH, counter]
    assert rest[5:10] == [H, 3, 3, N, B * H * 3]
    assert parameters[46] == b"\x00\x00\x80\x3e" and rest[11:] == [0, 0]  # 0.25; no scratch of Triton's
    assert SCRATCH + 4 * numbers(told["scratch"])[0] == lse + 4 * B * H * N


def test_what_the_driver_refuses_is_told(
    built: tuple[str, Path], kernels: dict[str, CrossCompiled], tmp_path: Path
):
    (tmp_path / "other").mkdir()
    library = built[1]
    hopper, ampere = driver(tmp_path, kernels, 9), driver(tmp_path / "other", kernels, 8)
    assert b"CUDA: said the driver" in dict(launched(library, hopper, q=0x10008))["message"]
    assert b"made for a Hopper GPU" in dict(launched(library, ampere))["message"]


def test_arguments_that_are_not_passed_are_told():
    request = native.order_request()
    del request.signature["counter"]
    with pytest.raises(ArtifactError, match=r"wanted counts, order, tiles, TAIL, PART"):
        native._request(tail_order_kernel, request.signature, request.constexprs)


def test_the_operator_as_tracers_see_it(operator: str):
    found = getattr(torch.ops.haste_native, operator)
    with FakeTensorMode():
        q = torch.empty(B, H, N, D, dtype=torch.bfloat16)
        lists = torch.empty(B, H, 3, dtype=torch.int32), torch.empty(B, H, 3, 3, dtype=torch.int32)
        out = found(q, q, q, *lists, 0.1)
    assert out.shape == q.shape and out.dtype == q.dtype and out.stride() == STRIDES["out"]


def test_loading_twice_does_no_harm(operator: str, built: tuple[str, Path], tmp_path: Path):
    copy = tmp_path / "moved.so"
    copy.write_bytes(built[1].read_bytes())
    native.load(operator, copy)


def test_another_kernel_has_another_name(operator: str, tmp_path: Path):
    whole_blocks = tmp_path / "whole.so"
    other = native.build(torch.float16, 256, whole_blocks)
    assert other != operator
    native.load(other, whole_blocks)
    assert all(hasattr(torch.ops.haste_native, name) for name in (operator, other))


def test_a_compiler_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(ArtifactError, match=r"wanted a C\+\+20 compiler"):
        native._compile(tmp_path, tmp_path / "attention.so")


_IN_A_PACKAGE = """
import sys, torch, torch._inductor
from torch import nn
from haste_compile.artifacts import native
step, folder, operator, library = sys.argv[1:]

native.load(operator, __import__("pathlib").Path(library))
native.declare(operator)

def stand_in(q, k, v, counts, indices, scale):
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).contiguous().transpose(1, 2)

torch.library.impl(f"haste_native::{operator}", "CPU", stand_in)

class Module(nn.Module):
    def forward(self, q, k, v, counts, indices):
        out = getattr(torch.ops.haste_native, operator)(2 * q, k, v, counts, indices, 0.1)
        return out.transpose(1, 2).flatten(2) + 1

torch.manual_seed(0)
q, k, v = (torch.randn(1, 300, 2, 128).transpose(1, 2) for _ in range(3))
arguments = q, k, v, torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2, 3, 3, dtype=torch.int32)
package = folder + "/module.pt2"
if step == "write":
    torch._inductor.aoti_compile_and_package(torch.export.export(Module(), arguments), package_path=package)
else:
    found = torch._inductor.aoti_load_package(package)(*arguments)
    print(torch.equal(found, Module()(*arguments)))
"""


def test_a_package_calls_the_operator(built: tuple[str, Path], tmp_path: Path):
    """What AOTInductor compiles finds it by name in another process; without a GPU a stand-in computes."""
    for step in ("write", "open"):
        command = [sys.executable, "-c", _IN_A_PACKAGE, step, str(tmp_path), built[0], str(built[1])]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True"]


_TRACED = """
import torch, test_capture
from haste_compile.artifacts import native
torch.library.define("haste_native::attention_0",
                     "(Tensor q, Tensor k, Tensor v, Tensor counts, Tensor indices, float scale) -> Tensor")
native.declare("attention_0")
captured = test_capture.make(block_size=128)
program = captured.program("triton", operator="attention_0").run_decompositions({})
names = [str(node.target) for node in program.graph.nodes]
updated = set(program.graph_signature.user_inputs_to_mutate.values())
print(sum("triton_kernel_wrapper" in name for name in names),
      sum(name == "haste_native.attention_0.default" for name in names),
      {layout.name for layout in captured.state} <= updated)
"""


def test_a_graph_holds_the_operator_in_place_of_triton_s_kernel():
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = f"import sys; sys.path[:0] = [{str(here)!r}, {str(here.parent)!r}]\n" + _TRACED
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["12", "2", "True"]  # six kernels and one operator at each of two sites


def captured(**changes: Any) -> Any:
    site = {"N": 32760, "D": 128, **{name: changes.pop(name) for name in ("N", "D") if name in changes}}
    fields = {
        "config": HasteConfig.from_options({"block_size": changes.pop("block_size", 128)}),
        "device": torch.device("cuda", 0),
        "dtype": torch.bfloat16,
        "specs": (types.SimpleNamespace(**site), types.SimpleNamespace(**site)),
        "state": (),
        "program": lambda form, *, operator=None: (form, operator),
    }
    return types.SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "capability", "expected"),
    [
        ({}, (9, 0), True),
        ({}, (8, 0), False),
        ({}, (12, 0), False),
        ({"block_size": 64}, (9, 0), False),
        ({"D": 64}, (9, 0), False),
        ({"dtype": torch.float16}, (9, 0), True),
        ({"dtype": torch.float32}, (9, 0), False),
    ],
    ids=str,
)
def test_it_is_for_what_live_graphs_run_it_for(
    changes: dict[str, Any], capability: tuple[int, int], expected: bool
):
    assert native.suits(captured(**changes), capability) is expected


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_an_artifact_takes_its_library_along(
    capability: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[Any] = []

    def build(dtype: torch.dtype, tokens: int, library: Path) -> str:
        library.write_bytes(b"library")
        return "attention_1"

    def package(program: Any, path: Path, *, metadata: Any) -> None:
        events.append(program)
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("model/data/model.so", b"NEEDED libstdc++.so.6")

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(native, "build", build)
    monkeypatch.setattr(native, "load", lambda operator, library: events.append((operator, library.name)))
    monkeypatch.setattr(native, "declare", lambda operator: None)
    monkeypatch.setattr(aoti._torch, "aoti_package", package)
    monkeypatch.setattr(aoti._torch, "aoti_load", lambda path, device: events.append(path.name))
    path = tmp_path / "wan.pt2"
    written = aoti.write(captured(), path)
    manifest: Any = types.SimpleNamespace(device="cuda", extra=written.extra, require=lambda *_: None)
    aoti.open_(manifest, path, torch.device("cuda", 0))
    if capability[0] == 9:
        assert [file.name for file in written.files] == ["wan.pt2", "wan.so"]
        assert written.extra == {"capability": [9, 0], "attention": "gluon", "operator": "attention_1"}
        library = ("attention_1", "wan.so")
        assert events == [library, ("triton", "attention_1"), library, "wan.pt2"]
    else:
        assert written.files == (path,) and written.extra == {"capability": [8, 0], "attention": "triton"}
        assert events == [("triton", None), "wan.pt2"]
