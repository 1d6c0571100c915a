"""Every format: it draws the live backend's video, keeps branches and videos apart, and needs no past."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_wan
import torch
from artifact_case import OPTIONS, SIZE, denoise, export, inputs, live, relative_error
from torch import Tensor

import haste_compile
from haste_compile.artifacts import FORMATS, Runner
from haste_compile.state import statistics

#: Format -> the relative error of its latents to the live backend's after a whole video.
TOLERANCES = {"torchscript": 0.0, "aoti": 1e-5, "onnx": 1e-5}


@pytest.fixture(params=TOLERANCES)
def path(request: pytest.FixtureRequest, artifact: Callable[[str], Path]) -> Path:
    return artifact(request.param)


@pytest.fixture
def runner(path: Path) -> Runner:
    return haste_compile.load(path, trust=True)


@pytest.fixture(scope="module")
def expected() -> Iterator[tuple[Tensor, float, float]]:
    """The live backend's video, its density and its refresh rate."""
    model = live()
    video = denoise(model, inputs())
    figures = statistics(model)
    assert 0.3 < figures.refresh_rate < 0.95 and 0.2 < figures.density < 0.95  # else nothing is proved
    yield video, figures.density, figures.refresh_rate
    torch._dynamo.reset()


def test_every_format_is_tested_somewhere():
    on_gpus_only = {"tensorrt"}  # tests/artifacts/test_tensorrt.py
    assert set(TOLERANCES) | on_gpus_only == set(FORMATS)


def test_it_draws_the_live_backend_s_video(runner: Runner, expected: tuple[Tensor, float, float]):
    video, density, refresh_rate = expected
    assert relative_error(denoise(runner, inputs()), video) <= TOLERANCES[runner.manifest.format]
    figures = runner.statistics()
    assert (figures.density, figures.refresh_rate) == (density, refresh_rate)
    assert figures.sites == ("blocks.0.attn1", "blocks.1.attn1")


def test_a_video_is_the_same_after_another(runner: Runner):
    first = denoise(runner, inputs())
    other = denoise(runner, inputs(prompt=2, seed=5, steps=3))
    assert torch.equal(denoise(runner, inputs()), first)
    assert not torch.equal(first, other)


def test_branches_never_share_a_mask(path: Path, runner: Runner):
    together = denoise(runner, inputs())
    mask = runner.state.tensor(1, "mask")
    used = [slot for slot in range(4) if mask[slot].any()]
    assert len(used) == 2 and not torch.equal(mask[used[0]], mask[used[1]])
    one, other = haste_compile.load(path, trust=True), haste_compile.load(path, trust=True)
    assert torch.equal(denoise(one, inputs(), unconditional=other), together)


def test_two_runners_of_one_artifact_have_state_of_their_own(path: Path, runner: Runner):
    alone = denoise(runner, inputs())
    first, second = haste_compile.load(path, trust=True), haste_compile.load(path, trust=True)
    denoise(first, inputs(prompt=2, seed=5))
    assert torch.equal(denoise(second, inputs()), alone)


_FRESH = """
import sys, torch, haste_compile
from artifact_case import denoise, inputs
torch.save(denoise(haste_compile.load(sys.argv[1], trust=True), inputs()), sys.argv[2])
"""


def test_a_fresh_process_draws_the_same_video(path: Path, runner: Runner, tmp_path: Path):
    code = f"import sys; sys.path.append({str(Path(__file__).parents[1])!r})\n" + _FRESH
    result = tmp_path / "latents.pt"
    subprocess.run([sys.executable, "-c", code, str(path), str(result)], check=True, timeout=300)
    assert torch.equal(torch.load(result), denoise(runner, inputs()))


def test_torchscript_without_the_ops_says_which_one_is_missing(artifact: Callable[[str], Path]):
    code = "import sys, torch; torch.jit.load(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(artifact("torchscript"))],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "Unknown builtin op: haste::refresh_mask_" in done.stderr


def test_it_stands_in_for_the_transformer_of_a_pipeline(tmp_path: Path):
    pipe = tiny_wan.build_pipeline()
    request = {
        "prompt": "a red circle",
        "num_inference_steps": 3,
        "output_type": "latent",
        "max_sequence_length": 16,
        **SIZE,
    }
    torch._dynamo.reset()
    with haste_compile.optimize(pipe, inner="eager", **OPTIONS):
        expected = pipe(**request, generator=torch.Generator().manual_seed(0)).frames
    manifest = export("torchscript", tmp_path / "pipe.ts", pipe)
    pipe.transformer = haste_compile.load(tmp_path / "pipe.ts", sha256=manifest.digest)
    assert pipe.to("cpu").transformer.dtype == torch.float32
    for _ in range(2):  # a second video starts afresh
        latents = pipe(**request, generator=torch.Generator().manual_seed(0)).frames
        assert torch.equal(latents, expected)
