"""What is installed here, whether it is supported, and what will run where."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from typing import Any

import torch

import haste_compile

#: Package -> (least version, first unsupported version, what it is needed for), as in pyproject.toml.
SUPPORTED: dict[str, tuple[str, str | None, str]] = {
    "python": ("3.11", "3.14", "everything"),
    "torch": ("2.11", "2.14", "everything"),
    "numpy": ("1.26", None, "everything"),
    "triton": ("3.6", "3.8", "CUDA devices"),
    "diffusers": ("0.42", None, "pipelines and the demo"),
    "transformers": ("5.0", None, "pipelines and the demo"),
    "av": ("14", None, "video files"),
    "torchmetrics": ("1.4", None, "the demo's comparison"),
}
#: What the project works without, on the CPU.
_OPTIONAL = ("triton", "diffusers", "transformers", "av", "torchmetrics")

#: Least compute capability: bfloat16 tensor cores.
_LEAST_CAPABILITY = (8, 0)


@dataclasses.dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        found: what is there.
        verdict: "ok", "missing" (something optional is not there) or "wrong".
        note: what follows from it.
    """

    name: str
    found: str
    verdict: str
    note: str


def examine() -> list[Check]:
    """Every check, in the order a reader wants them."""
    installed = versions()
    checks = [_check_version(name, installed.get(name)) for name in SUPPORTED]
    checks += [_check_entry_point(), _check_compiler()]
    threads = torch.get_num_threads()
    checks.append(
        Check(
            "CPU",
            f"{platform.machine()}, {os.cpu_count()} cores, {threads} threads",
            "ok",
            "float32, bfloat16, float16; kept blocks are gathered and go through SDPA",
        )
    )
    return checks + _check_gpus("triton" in installed)


def versions() -> dict[str, str]:
    """Versions of what takes part in a run, for those that are installed."""
    found = {"haste_compile": haste_compile.__version__, "python": platform.python_version()}
    for name in SUPPORTED:
        if name != "python" and importlib.util.find_spec(name) is not None:
            found[name] = importlib.metadata.version(name)
    return found


def device_name(device: torch.device) -> str:
    """A device as its owner knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"


def _check_version(name: str, found: str | None) -> Check:
    least, beyond, purpose = SUPPORTED[name]
    wanted = f"{least} or later" if beyond is None else f"from {least}, before {beyond}"
    if found is None:
        verdict = "missing" if name in _OPTIONAL else "wrong"
        return Check(name, "not installed", verdict, f"needed for {purpose}")
    inside = _parts(least) <= _parts(found) and (beyond is None or _parts(found) < _parts(beyond))
    return Check(name, found, "ok" if inside else "wrong", f"supported {wanted}; needed for {purpose}")


def _check_entry_point() -> Check:
    points = importlib.metadata.entry_points(group="torch_dynamo_backends", name="haste")
    if points:
        return Check(
            "backend", "registered", "ok", 'torch.compile(..., backend="haste") works without an import'
        )
    return Check("backend", "no entry point", "missing", "install the package with pip")


def _check_compiler() -> Check:
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        return Check(
            "C++ compiler", f"no {name}", "missing", "on the CPU only inner=aot_eager or eager will work"
        )
    return Check("C++ compiler", path, "ok", "Inductor compiles with it on the CPU")


def _check_gpus(has_triton: bool) -> list[Check]:
    if not torch.cuda.is_available():
        cuda = torch.version.cuda
        build = f"torch is built for CUDA {cuda}" if cuda else "torch is a CPU build"
        return [Check("GPU", "none", "missing", f"{build}; everything runs on the CPU")]
    checks = []
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        memory = torch.cuda.get_device_properties(index).total_memory / 2**30
        found = f"{torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}, {memory:.0f} GiB"
        if capability < _LEAST_CAPABILITY:
            verdict, note = "wrong", "the kernels need compute capability 8.0 or later"
        elif not has_triton:
            verdict, note = "wrong", "the kernels need triton: pip install 'haste-compile[gpu]'"
        else:
            verdict, note = (
                "ok",
                "bfloat16, float16; Triton kernels" + (" with TMA" if capability[0] == 9 else ""),
            )
        checks.append(Check(f"GPU {index}", found, verdict, note))
    return checks


def _parts(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """Plain data for ``json.dumps``."""
    return {
        "ok": all(check.verdict != "wrong" for check in checks),
        "checks": [dataclasses.asdict(check) for check in checks],
    }
