"""AOTInductor: machine code in one ``.pt2`` file that runs from Python and from C++ without Python.

On the CPU the "plain" form becomes C++: attention is dense under a mask, so that a step takes the time of a
dense model and not less. On CUDA the "triton" form carries the live kernels along and skips what they skip;
where attention is Hopper's Gluon kernel, in a shared library beside the package, ``wan.so`` of ``wan.pt2``.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from haste_compile import _torch
from haste_compile.artifacts import native
from haste_compile.artifacts.base import Call, Written
from haste_compile.artifacts.capture import Captured
from haste_compile.artifacts.manifest import Manifest
from haste_compile.errors import ArtifactError, ArtifactVersionError, DeviceError, OptionError
from haste_compile.loading import import_optional

SUFFIX, LIBRARY_SUFFIX = ".pt2", ".so"
#: What a library that shares the process' C++ runtime names among those it needs.
_RUNTIMES = (b"libstdc++.so", b"libc++.so")
#: Bytes of a library within which those names lie: before its code, and far before its weights.
_HEAD = 1 << 20


def write(captured: Captured, path: Path) -> Written:
    """Compile the graph, weights and all.

    Raises:
        OptionError: the path does not end in ``.pt2``, which AOTInductor insists on.
        DependencyError: triton is missing, on CUDA.
        ArtifactError: the C++ compiler is missing or fails, on Hopper, or makes what would crash when loaded.
    """
    if path.suffix != SUFFIX:
        raise OptionError(
            found=repr(path.name), wanted=f"a name that ends in {SUFFIX}", where="path", fix="Rename it."
        )
    if captured.device.type == "cpu":
        _compile(captured.program("plain"), path, captured)
        return Written((path,))
    import_optional("triton", extra="gpu")
    capability = torch.cuda.get_device_capability(captured.device)
    extra: dict[str, Any] = {"capability": list(capability), "attention": "triton"}
    files: tuple[Path, ...] = (path,)
    operator = None
    if native.suits(captured, capability):
        library = path.with_suffix(LIBRARY_SUFFIX)
        operator = native.build(captured.dtype, captured.specs[0].N, library)
        native.load(operator, library)
        native.declare(operator)
        extra.update(attention="gluon", operator=operator)
        files = (path, library)
    _compile(captured.program("triton", operator=operator), path, captured)
    return Written(files, extra=extra)


def _compile(program: torch.export.ExportedProgram, path: Path, captured: Captured) -> None:
    _torch.aoti_package(program, path, metadata=_metadata(captured))
    check_runtime(path)


def check_runtime(path: Path) -> None:
    """Refuse a package with a C++ runtime of its own, which some compilers link in: it crashes when loaded.

    AOTInductor's code parses the name of its device by ``std::regex``. Half of the locale that this looks at
    is then the process' own, and the other half the package's.

    Raises:
        ArtifactError: the package, which is removed, is of that kind.
    """
    with zipfile.ZipFile(path) as package:
        heads = []
        for name in package.namelist():
            if name.endswith(".so"):
                with package.open(name) as library:
                    heads.append(library.read(_HEAD))
    if any(runtime in head for head in heads for runtime in _RUNTIMES):
        return
    path.unlink()
    raise ArtifactError(
        found="a package that holds a C++ runtime of its own",
        wanted="one that uses the libstdc++.so of the process",
        where=f"the C++ compiler, CXX={os.environ.get('CXX', 'g++')}",
        fix="Set CXX to a compiler that does not link libstdc++ statically, such as CXX=/usr/bin/g++.",
    )


def open_(manifest: Manifest, path: Path, device: torch.device) -> Call:
    """Load the machine code; on CUDA the state is updated in place, on the CPU it is returned.

    Raises:
        ArtifactVersionError: made with another torch, or for another kind of GPU.
        DeviceError: made for CUDA and opened on the CPU, or the other way round.
    """
    manifest.require("torch", torch.__version__)
    if device.type != manifest.device:
        raise DeviceError(
            found=f"device {device}",
            wanted=manifest.device,
            where=f"the aoti artifact {path}",
            fix="Machine code is for one kind of device: export it on that one.",
        )
    made_for = manifest.extra.get("capability")
    if made_for is not None and tuple(made_for) != torch.cuda.get_device_capability(device):
        raise ArtifactVersionError(
            found=f"kernels for compute capability {'.'.join(map(str, made_for))}",
            wanted="{}.{}".format(*torch.cuda.get_device_capability(device)),
            where=f"the aoti artifact {path}",
            fix="Export it on a GPU of this kind.",
        )
    if "operator" in manifest.extra:
        native.load(manifest.extra["operator"], path.with_suffix(LIBRARY_SUFFIX))
    package = _torch.aoti_load(path, device)

    def call(inputs: Sequence[Tensor], state: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        sample, *updated = _as_tuple(package(*inputs, *state))
        return sample, updated or state

    return call


def _metadata(captured: Captured) -> dict[str, str]:
    """What a C++ program needs of the manifest, put into the package, where it can be read without JSON."""
    rule, k = captured.config.reuse_rule
    lines = (" ".join([x.name, x.dtype, *map(str, x.shape)]) for x in captured.state)
    return {
        "haste_device": captured.device.type,
        "haste_dense_steps": str(captured.config.dense_steps),
        "haste_rebuild_steps": str(k if rule == "after" else 0),
        "haste_state": "\n".join(lines),
    }


def _as_tuple(outputs: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
