"""AOTInductor packages: C++ without Python, what is refused, and torch's bug with one-element buffers."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from artifact_case import denoise, export, inputs
from torch import Tensor, nn
from torch.utils.cpp_extension import CUDA_HOME

import haste_compile
from haste_compile.artifacts import manifest
from haste_compile.artifacts.aoti import check_runtime, open_
from haste_compile.errors import ArtifactError, ArtifactVersionError, DeviceError, OptionError

ROOT = Path(__file__).parents[2]
BUILD = {"cmake": shutil.which("cmake"), "c++": shutil.which("c++")}
if torch.version.cuda:  # CMake's package of a CUDA wheel wants the CUDA toolkit
    BUILD["toolkit"] = CUDA_HOME if Path(CUDA_HOME or "", "include", "cuda_runtime.h").is_file() else None


@pytest.fixture
def package(artifact: Callable[[str], Path]) -> Path:
    return artifact("aoti")


def test_a_package_with_a_runtime_of_its_own_is_refused(tmp_path: Path):
    source = tmp_path / "model.cpp"
    source.write_text("#include <iostream>\nvoid say() { std::cout << 1; }\n")

    def packed(*flags: str) -> Path:
        library = tmp_path / "model.so"
        subprocess.run(["g++", "-shared", "-fPIC", str(source), "-o", str(library), *flags], check=True)
        with zipfile.ZipFile(tmp_path / "model.pt2", "w") as package:
            package.write(library, "model/data/model.so")
        return tmp_path / "model.pt2"

    check_runtime(packed())
    own = packed("-static-libstdc++")
    with pytest.raises(ArtifactError, match="a C\\+\\+ runtime of its own.*CXX"):
        check_runtime(own)
    assert not own.exists()


@pytest.mark.skipif(None in BUILD.values(), reason="needs cmake, a C++ compiler, CUDA wheels their toolkit")
def test_the_cpp_runner_draws_python_s_video(package: Path, tmp_path: Path):
    """``examples/cpp_runner``, built against the installed wheel: equal bits, a process without Python."""
    torch_dir = Path(torch.utils.cmake_prefix_path) / "Torch"
    source, build = ROOT / "examples" / "cpp_runner", tmp_path / "build"
    for command in (
        ["cmake", "-S", str(source), "-B", str(build), f"-DTorch_DIR={torch_dir}"],
        ["cmake", "--build", str(build)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    runner = build / "denoise"
    libraries = subprocess.run(["ldd", str(runner)], capture_output=True, text=True, check=True).stdout
    assert "libtorch" in libraries and "libpython" not in libraries

    torch.save(inputs(), tmp_path / "inputs.pt")
    files = [str(path) for path in (package, tmp_path / "inputs.pt", tmp_path / "latents.pt")]
    subprocess.run([str(runner), *files], check=True, timeout=300)
    latents = torch.load(tmp_path / "latents.pt")
    assert torch.equal(latents, denoise(haste_compile.load(package, trust=True), inputs()))

    assert subprocess.run([str(runner)], capture_output=True, timeout=60).returncode == 2
    broken = subprocess.run(
        [str(runner), files[0], "nowhere", files[2]], capture_output=True, text=True, timeout=60
    )
    assert broken.returncode == 1 and "cannot read nowhere" in broken.stderr


def test_the_package_tells_a_cpp_program_its_state(package: Path):
    metadata = torch._inductor.aoti_load_package(str(package)).get_metadata()
    found = manifest.Manifest.read(package)
    assert metadata["haste_device"] == "cpu" and metadata["haste_dense_steps"] == "1"
    lines = metadata["haste_state"].splitlines()
    assert lines[0] == "haste_0_mask int32 4 1 2 5 1"
    assert [line.split()[0] for line in lines] == [layout.name for layout in found.state]


def test_the_library_demands_no_executable_stack(package: Path):
    """C libraries from glibc 2.41 on refuse one that does."""
    with zipfile.ZipFile(package) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".so"))
        library = archive.read(name)
    (headers,) = struct.unpack_from("<Q", library, 32)
    size, count = struct.unpack_from("<HH", library, 54)
    kinds = dict(struct.unpack_from("<II", library, headers + i * size) for i in range(count))
    writable, readable, gnu_stack = 2, 4, 0x6474E551
    assert kinds[gnu_stack] == readable | writable


def test_machine_code_is_for_one_kind_of_device(package: Path):
    found = manifest.Manifest.read(package)
    with pytest.raises(DeviceError, match="found device cuda; wanted cpu"):
        open_(found, package, torch.device("cuda"))


def test_kernels_are_for_one_kind_of_gpu(package: Path, monkeypatch: pytest.MonkeyPatch):
    values = json.loads(manifest.manifest_path(package).read_text())
    made_for_hopper = manifest.Manifest._from_json(
        {**values, "device": "cuda", "extra": {"capability": [9, 0]}}
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ArtifactVersionError, match="capability 9.0; wanted 8.0"):
        open_(made_for_hopper, package, torch.device("cuda"))


def test_another_name_is_refused(tmp_path: Path):
    with pytest.raises(OptionError, match=r"wanted a name that ends in .pt2"):
        export("aoti", tmp_path / "tiny.so")


class Counting(nn.Module):
    """Counts its calls in a buffer of one element and in one of two."""

    single: Tensor
    pair: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("single", torch.zeros(1))
        self.register_buffer("pair", torch.zeros(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.single.add_(1)
        self.pair.add_(1)
        return x * self.single, x * self.pair


def test_buffers_of_two_elements_are_state_where_one_element_is_a_constant(tmp_path: Path):
    """Why no state tensor of haste has a single element: AOTInductor folds those, and their writes vanish.

    Should the first assertion fail, torch has mended it, and the rule can go.
    """
    program = torch.export.export(Counting(), (torch.ones(2),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "counting.pt2"))
    counting = torch._inductor.aoti_load_package(package)
    calls = [counting(torch.ones(2)) for _ in range(3)]
    assert [single[0].item() for single, _ in calls] == [1.0, 1.0, 1.0]
    assert [pair[0].item() for _, pair in calls] == [1.0, 2.0, 3.0]
