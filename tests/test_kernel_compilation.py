"""Kernels are compiled in other processes while the graph compiles, and the first launch finds them.

Without a GPU in a process with a stand-in for Triton's driver: all is real but the launches.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_PREAMBLE = """
import dataclasses, json, sys, types
import torch
from triton import knobs
sys.path.append(sys.argv[1])
heard = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: heard.append((src.name, cache_hit))
"""

_STAND_IN = """
import gpu_stand_in, graph_capture
from haste_compile import _torch
from haste_compile.kernel_compilation import compiling_kernels
from haste_compile.kernels.launching import ON_CUDA

cuda = torch.device("cuda", 0)

def real(outline):
    return torch.zeros(outline.shape, dtype=outline.dtype).as_strided(outline.shape, outline.strides)

model = graph_capture.toy({}).half()
config = dataclasses.replace(graph_capture.SMALL, predictor=sys.argv[2])
rewritten = graph_capture.rewrite(graph_capture.capture(model, graph_capture.tokens().half()), config)
sites = [types.SimpleNamespace(device=cuda, inserted=site.inserted) for site in rewritten.rewritten]
calls = [_torch.OutlinedCall.of(n) for site in sites for n in site.inserted if n.target in ON_CUDA]
with compiling_kernels(types.SimpleNamespace(rewritten=sites, config=config)):
    pass
ahead = list(heard)
for call in calls:
    args, kwargs = torch.utils._pytree.tree_map_only(_torch.Outline, real, (call.args, dict(call.kwargs)))
    ON_CUDA[call.target](*args, **kwargs)
print(json.dumps({"ahead": ahead, "heard": heard, "launches": gpu_stand_in.launches}))
"""

_HOPPER = """
import gpu_stand_in
from haste_compile import _torch
from haste_compile.kernels import ahead, ops
from haste_compile.kernels.launching import ON_CUDA, noted_launches

def outline(*shape, dtype=torch.int32):
    x = torch.empty(shape, dtype=dtype, device="meta")
    return _torch.Outline(tuple(x.shape), x.stride(), 0, dtype, torch.device("cuda", 0))

q = outline(1, 2, 300, 128, dtype=torch.bfloat16)
attention = _torch.OutlinedCall(
    torch.ops.haste.block_sparse_attention.default,
    (q, q, q, outline(2, 1, 2, 3, 1), outline(8)), (("block", 128), ("scale", 0.1)),
)
with noted_launches() as launches:
    attention.run(ON_CUDA[attention.target])
put_off = [ahead.put_off(launch) for launch in launches]
assert not any(compilation.on_disk for compilation in put_off)
pool = _torch.compile_pool()
for done in [pool.submit(ahead.compile_order, compilation.order) for compilation in put_off]:
    done.result()
for compilation in put_off:
    compilation.load()
assert [ahead.put_off(launch) for launch in launches] == [None] * len(launches)
for launch in launches:
    launch.kernel.device_caches.clear()  # as in a process that begins
assert all(ahead.put_off(launch).on_disk for launch in launches)
print(json.dumps({"ahead": heard, "launches": gpu_stand_in.launches}))
"""

_BROKEN = """
from haste_compile import _torch

class Broken:
    def submit(self, *_):
        raise RuntimeError("no other process")

_torch.compile_pool = Broken
"""

#: PyTorch has a ptxas of its own. Inductor's processes begin with it; ours never changes over to it, or does
#: after Triton has asked for the version.
_OTHER_PTXAS = """
import os
from triton.backends.nvidia.compiler import get_ptxas_version
from haste_compile import _torch
if sys.argv[4] == "after":
    get_ptxas_version(90)
os.environ["TRITON_PTXAS_PATH"] = sys.argv[3]
versions = lambda: {_torch.compile_pool().submit(get_ptxas_version, 90).result() for _ in range(8)}
assert all("another build" in version for version in versions())
if sys.argv[4] == "never":
    del os.environ["TRITON_PTXAS_PATH"]
"""

_OTHER_PTXAS_STAYS = """
assert all("another build" in version for version in versions()), "Inductor has its own again"
"""

_ON_A_GPU = """
import haste_compile, tiny_wan
transformer = tiny_wan.build_transformer(num_attention_heads=2, attention_head_dim=128)
transformer = transformer.to("cuda", torch.bfloat16)
inputs = {
    name: value.to("cuda", torch.bfloat16) if isinstance(value, torch.Tensor) else value
    for name, value in tiny_wan.transformer_inputs().items()
}
if sys.argv[4] == "earlier":  # Inductor changes over to PyTorch's ptxas
    torch.compile(lambda x: x.relu() + 1)(torch.ones(64, 64, device="cuda"))
options = {"compile": sys.argv[3], "predictor": sys.argv[2], "min_tokens": 64}
with torch.no_grad(), haste_compile.optimize(transformer, **options):
    transformer(**inputs)
torch.cuda.synchronize()
print(json.dumps({"ahead": heard}))
"""


def run(code: str, folder: Path, *arguments: str) -> dict:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PREAMBLE + code, str(Path(__file__).parent), *arguments],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("predictor", "changes_over"), [("svg2", "never"), ("xattention", "never"), ("xattention", "after")]
)
def test_a_launch_finds_what_was_compiled_ahead(predictor: str, changes_over: str, tmp_path: Path) -> None:
    from triton import knobs

    ptxas, ours = tmp_path / "ptxas", knobs.nvidia.ptxas.path
    ptxas.write_text(f'#!/bin/sh\n[ "$1" != --version ] || echo another build\nexec {ours} "$@"\n')
    ptxas.chmod(0o755)
    code = _OTHER_PTXAS + _STAND_IN + _OTHER_PTXAS_STAYS
    found = run(code, tmp_path, predictor, str(ptxas), changes_over)
    names = [name for name, _ in found["ahead"]]
    assert len(names) >= 5 and len(set(names)) == len(names)
    assert all(on_disk for _, on_disk in found["ahead"]), "other processes compiled them"
    assert set(found["launches"]) == set(names) and found["heard"] == found["ahead"], (
        "launches compile nothing"
    )


def test_hoppers_kernel_is_compiled_ahead_and_found_on_disk_later(tmp_path: Path) -> None:
    found = run(_HOPPER, tmp_path)
    assert ["block_sparse_attention_hopper", True] in found["ahead"]
    assert all(on_disk for _, on_disk in found["ahead"]) and found["launches"] == []


def test_what_no_other_process_compiles_is_compiled_by_its_launch(tmp_path: Path) -> None:
    found = run(_BROKEN + _STAND_IN, tmp_path, "xattention")
    assert found["ahead"] == []
    assert sorted(name for name, _ in found["heard"]) == sorted(found["launches"])
    assert not any(on_disk for _, on_disk in found["heard"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("predictor", "compile", "others"),
    [
        ("xattention", "whole", "none"),
        ("xattention", "blocks", "earlier"),
        ("svg2", "whole", "earlier"),
        ("svg2", "blocks", "none"),
    ],
)
def test_a_model_s_first_call_compiles_no_kernel_of_ours_in_its_own_process(
    predictor: str, compile: str, others: str, tmp_path: Path
) -> None:
    heard = run(_ON_A_GPU, tmp_path, predictor, compile, others)["ahead"]
    ours = [(name, on_disk) for name, on_disk in heard if not name.startswith("triton_")]
    assert len(ours) >= 7 and all(on_disk for _, on_disk in ours), ours
