"""AOTInductor packages on a GPU: the Triton kernels compiled in, the state updated where it lies."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_wan
import torch
from artifact_case import OPTIONS, denoise, export, inputs, relative_error
from torch import Tensor

import haste_compile
from haste_compile.errors import ArtifactFileError
from haste_compile.state import statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

#: Two compilations of a bfloat16 model round differently; a wrong mask or a stale one gives 0.1 and more.
TOLERANCE = 3e-2


#: What Hopper's kernel takes: a head dim of 128 and blocks of 128.
FOR_HOPPER = {"num_attention_heads": 2, "attention_head_dim": 128}


def build(**changes: Any) -> Any:
    return tiny_wan.build_transformer(**changes).to("cuda", torch.bfloat16)


def video(**changes: Any) -> dict[str, Any]:
    def moved(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.cuda() if name == "sigmas" else value.to("cuda", torch.bfloat16)

    return {name: moved(name, value) for name, value in inputs(**changes).items()}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aoti_cuda") / "tiny.pt2"
    assert export("aoti", path, build()).extra["attention"] == "triton"
    return path


@pytest.fixture(scope="module")
def hopper_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    path = tmp_path_factory.mktemp("aoti_hopper") / "tiny.pt2"
    manifest = export("aoti", path, build(**FOR_HOPPER), block_size=128)
    assert manifest.extra["attention"] == "gluon" and list(manifest.files) == ["tiny.pt2", "tiny.so"]
    return path


def test_it_draws_the_live_backend_s_video(package: Path):
    torch._dynamo.reset()
    live = torch.compile(build(), backend="haste", dynamic=False, options=OPTIONS)
    expected = denoise(live, video())
    runner = haste_compile.load(package, trust=True)
    assert relative_error(denoise(runner, video()), expected) < TOLERANCE
    figures = runner.statistics()
    assert figures.density == pytest.approx(statistics(live).density, abs=0.05)
    assert 0.3 < figures.refresh_rate < 0.95


def test_state_keeps_its_address_and_no_call_waits(package: Path):
    runner = haste_compile.load(package, trust=True)
    before = {name: buffer.data_ptr() for name, buffer in runner.state.named_buffers()}
    denoise(runner, video())
    assert {name: buffer.data_ptr() for name, buffer in runner.state.named_buffers()} == before
    call = tiny_wan.transformer_inputs()
    call = {name: x.to("cuda") if isinstance(x, Tensor) else x for name, x in call.items()}
    for name in ("hidden_states", "encoder_hidden_states"):
        call[name] = call[name].to(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runner(**call)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_video_is_the_same_after_another(package: Path):
    runner = haste_compile.load(package, trust=True)
    first = denoise(runner, video())
    denoise(runner, video(prompt=2, seed=5, steps=3))
    assert torch.equal(denoise(runner, video()), first)


def test_hopper_s_kernel_draws_the_live_backend_s_video(hopper_package: Path):
    torch._dynamo.reset()
    options = {**OPTIONS, "block_size": 128}
    live = torch.compile(build(**FOR_HOPPER), backend="haste", dynamic=False, options=options)
    expected = denoise(live, video())
    runner = haste_compile.load(hopper_package, trust=True)
    assert relative_error(denoise(runner, video()), expected) < TOLERANCE
    assert runner.statistics().density == pytest.approx(statistics(live).density, abs=0.05)


def test_hopper_s_kernel_needs_its_library(hopper_package: Path, tmp_path: Path):
    for name in ("tiny.pt2", "tiny.pt2.json"):
        shutil.copy(hopper_package.with_name(name), tmp_path)
    with pytest.raises(ArtifactFileError, match="found nothing there"):
        haste_compile.load(tmp_path / "tiny.pt2", trust=True)


@pytest.mark.parametrize("kind", ["package", "hopper_package"])
def test_a_fresh_process_without_triton_draws_the_same_video(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
):
    """The kernels are in the artifact: nothing is compiled, so Triton need not be importable."""
    package: Path = request.getfixturevalue(kind)
    code = f"""
import sys
sys.modules["triton"] = None
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import torch, haste_compile
from artifact_case import denoise
from test_aoti_cuda import video
runner = haste_compile.load({str(package)!r}, trust=True)
torch.save(denoise(runner, video()).cpu(), {str(tmp_path / "latents.pt")!r})
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
    here = denoise(haste_compile.load(package, trust=True), video()).cpu()
    assert torch.equal(torch.load(tmp_path / "latents.pt"), here)
