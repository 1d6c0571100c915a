from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from predictor import DEVICE, control, gpu
from torch import Tensor
from variable_blocks import Problem

from haste_compile.kernels.variable_block_attention import cpu
from haste_compile.kernels.variable_block_attention.launch import Launch, choose_launch

pytest.importorskip("triton")
from haste_compile.kernels.variable_block_attention import kernel, work_lists  # noqa: E402

pytestmark = pytest.mark.usefixtures("nan_memory")

#: B, H, N, D, query clusters, key clusters: one token, more clusters than tokens, both head dims.
SHAPES = [
    (1, 2, 1, 64, 1, 2),
    (2, 1, 20, 64, 5, 33),
    (1, 2, 150, 64, 3, 9),
    (2, 1, 130, 128, 4, 40),
]
#: bf16 on a GPU only: the interpreter's bf16 product is wrong.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16, torch.float32]


NAMES = ["reference", "kernel", *([] if DEVICE == "cuda" else ["cpu"])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_is_at_most_twice_that_of_sdpa(name: str, shape: tuple[int, ...], dtype: torch.dtype):
    problem = Problem(shape, dtype)
    out, lse = problem.attend(name)
    exact, exact_lse = problem.exact()
    assert out.dtype == dtype and out.stride() == torch.empty_like(problem.q).stride()
    assert lse.dtype == torch.float32
    assert (out - exact).abs().max().item() <= problem.allowed(exact)
    coarse = DEVICE == "cuda" or (name == "cpu" and dtype != torch.float32)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4 if coarse else 4e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_map_is_dense_attention(name: str):
    problem = Problem(SHAPES[2], DTYPES[-1])
    problem.map[:] = True
    out, _ = problem.attend(name)
    exact, _ = problem.exact()
    assert (out - exact).abs().max().item() <= problem.allowed(exact)
    if name == "cpu":
        assert torch.equal(out, F.scaled_dot_product_attention(problem.q, problem.k, problem.v, scale=0.1))


@pytest.mark.parametrize("name", NAMES)
def test_dropped_keys_do_not_leak(name: str):
    problem = Problem(SHAPES[2], DTYPES[-1])
    problem.map[..., 1], problem.map[..., 0] = False, True
    clean = problem.attend(name)
    dropped = (problem.labels[1] == 1).to(DEVICE)
    assert dropped.any()
    problem.k[dropped], problem.v[dropped] = float("nan"), float("inf")
    for found, wanted in zip(problem.attend(name), clean, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("launch", [Launch(16, 32, 4, 1), Launch(64, 16, 4, 1)], ids=str)
def test_tiles_of_another_size_give_the_same(launch: Launch):
    problem = Problem(SHAPES[2], DTYPES[-1])
    out, lse = problem.attend("kernel", launch=launch)
    wanted, wanted_lse = problem.attend("reference")
    torch.testing.assert_close(out, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)


def test_heads_take_turns_in_a_small_workspace(monkeypatch: pytest.MonkeyPatch):
    problem = Problem((1, 5, 60, 64, 2, 5), DTYPES[-1])
    at_once = problem.attend("kernel")
    assert work_lists.heads_a_turn(12, 75_600, 300) == 2  # a head's lists take 91 MB
    assert work_lists.heads_a_turn(12, 75_600, 300, 1 << 30) == 6  # eleven fit, but one would be left
    monkeypatch.setattr(work_lists, "WORKSPACE_BYTES", 3 * 4 * 2 * 60)
    assert work_lists.heads_a_turn(5, 60, 2) == 3
    for found, wanted in zip(problem.attend("kernel"), at_once, strict=True):
        assert torch.equal(found, wanted)


def test_a_dense_step_needs_no_clusters():
    problem = Problem(SHAPES[1], DTYPES[-1])
    state = [torch.full_like(x, 2**20)[None] for x in (problem.order, problem.offsets, problem.mask)]
    ctl = control(dense=True).to(DEVICE)
    out, _ = kernel.attend(problem.q, problem.k, problem.v, *state, ctl, scale=0.1)
    wanted = F.scaled_dot_product_attention(problem.q, problem.k, problem.v, scale=0.1)
    tolerance = 8 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, wanted, rtol=0, atol=tolerance)


def test_the_cpu_computes_kept_pairs_and_no_others(monkeypatch: pytest.MonkeyPatch):
    problem = Problem(SHAPES[2], torch.float32)
    problem.map[0, 1, 2] = True  # a row that keeps everything takes the other path
    inputs = (problem.q, problem.k, problem.v, problem.order, problem.offsets, problem.mask)
    computed = 0

    def counting(
        q: Tensor, k: Tensor, v: Tensor, scale: float, flash: Any = cpu.flash
    ) -> tuple[Tensor, Tensor]:
        nonlocal computed
        computed += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return flash(q, k, v, scale)

    monkeypatch.setattr(cpu, "flash", counting)
    cpu.attend(*(x.cpu() for x in inputs), scale=0.1)
    assert computed == problem.kept.sum()


def test_launch_follows_the_capability_and_the_size_of_clusters():
    def choose(major: int, cluster: float, dim: int = 128) -> Launch:
        return choose_launch((major, 0), dim=dim, itemsize=2, cluster=cluster)

    assert choose(9, 252) == Launch(128, 128, num_warps=8, num_stages=2)  # 720p
    assert choose(9, 109) == Launch(64, 64, num_warps=4, num_stages=2)  # 480p
    assert choose(8, 252).rows == 64


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("shape", [(2, 3, 5003, 128, 40, 150), (1, 2, 32760, 128, 300, 1000)], ids=str)
def test_the_compiled_kernel_at_the_sizes_of_videos(shape: tuple[int, ...]):
    problem = Problem(shape, torch.bfloat16, density=0.25)
    out, _ = problem.attend("kernel")
    for row in (0, shape[2] // 2, shape[2] - 1):  # one query of each head: all of them would not fit
        of_query = problem.map.gather(2, problem.labels[0][:, :, row, None, None].expand(-1, -1, 1, shape[5]))
        kept = of_query[:, :, 0].gather(2, problem.labels[1]).to(DEVICE)[:, :, None]
        q, k, v = (x.double() for x in (problem.q[:, :, row : row + 1], problem.k, problem.v))
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=kept, scale=0.1)
        torch.testing.assert_close(out[:, :, row : row + 1].double(), wanted, rtol=2e-2, atol=2e-3)
