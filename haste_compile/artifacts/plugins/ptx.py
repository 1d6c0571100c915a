"""PTX of the plugins' kernels, with exactly the arguments that TensorRT passes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from haste_compile.artifacts.plugins import kernels
from haste_compile.artifacts.plugins.definitions import BY_NAME, Capability, Launch, Plugin, TensorSpec
from haste_compile.errors import DependencyError
from haste_compile.kernels.cross_compile import CrossCompiled, Request, compile_all, kernel_name

_PARAMETER = re.compile(r"\.param\s+(\.\w+)[^,\n]*?\s(\w+_param_\d+)")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A plugin's kernel for one architecture and one launch.

    Attributes:
        entry: name of the kernel in the PTX.
        ptx: assembly whose parameters are the inputs, the scalars and the outputs, in this order.
        parameters: their PTX types, ".u64" for a pointer and ".u32" for a scalar.
        threads: threads a block.
        shared: bytes of shared memory a block.
        launch: what it was compiled for.
    """

    entry: str
    ptx: str
    parameters: tuple[str, ...]
    threads: int
    shared: int
    launch: Launch


@dataclasses.dataclass(frozen=True)
class Job:
    """A plugin to compile for tensors of these shapes, all integers.

    Attributes:
        capability: (major, minor) of the GPU, which need not be there.
    """

    plugin: Plugin
    tensors: Mapping[str, TensorSpec]
    attributes: Mapping[str, Any]
    capability: Capability

    @property
    def launch(self) -> Launch:
        return self.plugin.launch(**self.tensors, **self.attributes, capability=self.capability)

    @property
    def outputs(self) -> Sequence[TensorSpec]:
        return self.plugin.describe(**self.tensors, **self.attributes)

    @property
    def request(self) -> Request:
        """What Triton is asked for: pointers to inputs, int32 scalars, pointers to outputs."""
        launch = self.launch
        specs = [*self.tensors.items(), *zip(self.plugin.outputs, self.outputs, strict=True)]
        version = 10 * self.capability[0] + self.capability[1]
        return Request(
            kernel=kernel_name(getattr(kernels, self.plugin.name)),
            signature={name: f"*{spec.dtype}:16" for name, spec in specs}
            | dict.fromkeys(launch.scalars, "i32"),
            constexprs=launch.constexprs,
            target=f"sm_{version}{'a' if version >= 90 else ''}",
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


_cache: dict[str, Compiled] = {}  # every site of a model asks for the same kernels


def compile_plugins(jobs: Sequence[Job]) -> list[Compiled]:
    """Compile the kernels of several plugins at once; each is compiled once in a process.

    Raises:
        DependencyError: the compiler is missing, or its kernels take arguments that TensorRT does not pass.
    """
    requests = [job.request for job in jobs]
    new = [i for i, request in enumerate(requests) if repr(request) not in _cache]
    if new:
        for i, compiled in zip(new, compile_all([requests[i] for i in new]), strict=True):
            _cache[repr(requests[i])] = from_triton(jobs[i].plugin, jobs[i].launch, compiled)
    return [_cache[repr(request)] for request in requests]


def jobs_of(
    op: Callable[..., Any], tensors: Sequence[TensorSpec], options: Mapping[str, Any], capability: Capability
) -> list[Job]:
    """What there is to compile for one of the ops of ``plugins.chain``."""
    jobs: list[Job] = []

    def call(name: str, inputs: tuple[Any, ...], attributes: Mapping[str, Any]) -> tuple[Any, ...]:
        plugin = BY_NAME[name]
        jobs.append(Job(plugin, dict(zip(plugin.inputs, inputs, strict=True)), attributes, capability))
        return tuple(jobs[-1].outputs)

    op(call, *tensors, **options)
    return jobs


def from_triton(plugin: Plugin, launch: Launch, compiled: CrossCompiled) -> Compiled:
    """Drop the parameters that only Triton's own launcher passes.

    Triton (3.6 and 3.7) gives every kernel two further pointers, to scratch memory for descriptors made on
    the device and for its profiler. TensorRT passes neither; the kernels here use neither, which is checked.
    """
    expected = len(plugin.inputs) + len(launch.scalars) + len(plugin.outputs)
    found = _PARAMETER.findall(compiled.ptx.split(")", 1)[0])
    ptx = compiled.ptx
    for _, name in found[expected:]:
        ptx, dropped = re.subn(rf",\s*\.param[^,\n]*\s{name}\b", "", ptx, count=1)
        if dropped != 1 or re.search(rf"\b{name}\b", ptx):
            raise DependencyError(
                found=f"kernel {plugin.name} that reads {name}, one more than its {expected} arguments",
                wanted="a kernel that needs what TensorRT passes and no more",
                where=f"triton {compiled.triton}",
                fix="Use triton 3.6 or 3.7.",
            )
    entry = re.search(r"\.entry (\w+)", ptx)
    return Compiled(
        entry=entry.group(1) if entry else plugin.name,
        ptx=ptx,
        parameters=tuple(kind for kind, _ in found[:expected]),
        threads=32 * launch.num_warps,
        shared=compiled.shared,
        launch=launch,
    )
