from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from predictor import DEVICE, gpu, tokens_first
from torch import Tensor

from haste_compile.kernels.block_scores import reference

pytest.importorskip("triton")
from haste_compile.kernels.block_scores import kernel  # noqa: E402

# The interpreter's NumPy remarks on the logarithm of key blocks past the last token, which are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2")


def by_loops(q: Tensor, k: Tensor, block: int, stride: int) -> np.ndarray:
    """Scores of one head, [N, D] each, in float64, token by token."""
    queries, keys = q.double().cpu().numpy(), k.double().cpu().numpy()
    tokens, dim = queries.shape
    groups, blocks = math.ceil(tokens / stride), math.ceil(tokens / block)
    pairs = np.zeros((groups, groups))
    for i in range(groups):
        for j in range(groups):
            for r in range(stride):
                query, key = i * stride + stride - 1 - r, j * stride + r
                if query < tokens and key < tokens:
                    pairs[i, j] += queries[query] @ keys[key]
    pairs /= math.sqrt(dim) * stride
    mass = np.exp(pairs - pairs.max(1, keepdims=True))
    mass /= mass.sum(1, keepdims=True)
    scores = np.zeros((blocks, blocks))
    for i in range(groups):
        for j in range(groups):
            scores[i * stride // block, j * stride // block] += mass[i, j]
    return scores


@pytest.mark.parametrize("tokens", [1, 64, 130, 200])
@pytest.mark.parametrize(("block", "stride"), [(64, 4), (64, 16), (64, 32), (128, 8)])
def test_reference_samples_the_antidiagonals(tokens: int, block: int, stride: int):
    q, k = (tokens_first(1, 2, tokens, 64, seed=seed, scale=4) for seed in (1, 2))
    scores = reference.block_scores(q, k, block=block, stride=stride)
    assert scores.dtype == torch.float32
    for head in range(2):
        expected = by_loops(q[0, head], k[0, head], block, stride)
        np.testing.assert_allclose(scores[0, head].cpu(), expected, rtol=1e-4, atol=1e-6)


def test_a_row_sums_to_its_real_query_groups():
    q, k = (tokens_first(1, 1, 201, 64, seed=seed) for seed in (1, 2))
    rows = reference.block_scores(q, k, block=64, stride=16).sum(-1).flatten()
    # 201 tokens: three full blocks of 4 groups, then 9 tokens in 1 group.
    torch.testing.assert_close(rows.cpu(), torch.tensor([4.0, 4.0, 4.0, 1.0]))


@pytest.mark.parametrize(
    ("tokens", "block", "stride", "dim", "dtype"),
    [
        (1, 64, 16, 64, torch.float32),
        (333, 64, 16, 64, torch.float32),
        (1000, 128, 16, 128, torch.float16),
        (840, 128, 4, 64, torch.float16),
        (700, 64, 32, 64, torch.float16),
        (1100, 64, 8, 128, torch.float32),
    ],
)
def test_kernel_agrees_with_float64(tokens: int, block: int, stride: int, dim: int, dtype: torch.dtype):
    q = tokens_first(2, 2, tokens, dim, dtype, seed=1, scale=3)
    k = tokens_first(2, 2, tokens, dim, dtype, seed=2, scale=3).contiguous()  # strides unlike those of q
    scores = by_kernel(q, k, flags(2, 2), block=block, stride=stride)
    expected = reference.block_scores(q.double(), k.double(), block=block, stride=stride)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=1e-6)


def test_heads_that_reuse_are_left_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "empty", lambda *size, **kind: torch.full(size, float("nan"), **kind))
    q, k = (tokens_first(2, 2, 200, 64, seed=seed) for seed in (1, 2))
    chosen = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=DEVICE)
    scores = by_kernel(q, k, chosen, block=64, stride=16)
    expected = reference.block_scores(q, k, block=64, stride=16)
    torch.testing.assert_close(scores[chosen == 1], expected[chosen == 1], rtol=2e-5, atol=1e-6)
    assert scores[chosen == 0].isnan().all()


def test_heads_that_do_not_fit_in_scratch_take_turns(monkeypatch: pytest.MonkeyPatch):
    q, k = (tokens_first(1, 5, 200, 64, seed=seed) for seed in (1, 2))
    at_once = by_kernel(q, k, flags(1, 5), block=64, stride=16)
    monkeypatch.setattr(kernel, "SCRATCH_BYTES", 2 * 4 * 13 * 4)  # two heads of 13 groups × 4 blocks
    assert torch.equal(by_kernel(q, k, flags(1, 5), block=64, stride=16), at_once)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("tokens", "block", "stride"), [(9_000, 128, 16), (5_003, 64, 32), (3_001, 128, 4)])
@pytest.mark.parametrize("dim", [64, 128])
def test_kernel_in_bf16(tokens: int, block: int, stride: int, dim: int):
    q, k = (tokens_first(1, 2, tokens, dim, torch.bfloat16, seed=seed, scale=3) for seed in (1, 2))
    scores = by_kernel(q, k, flags(1, 2), block=block, stride=stride)
    expected = reference.block_scores(q.double(), k.double(), block=block, stride=stride)
    # The products are exact in float32; what is left is summation order and exp2.
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-6)


def by_kernel(q: Tensor, k: Tensor, flags: Tensor, *, block: int, stride: int) -> Tensor:
    """Scores [B, H, T, T] by definition from the log-sum-exps of the kernel."""
    batch, heads, tokens, _ = q.shape
    groups, blocks = math.ceil(tokens / stride), math.ceil(tokens / block)
    lse = torch.cat(
        [
            lse[:present].clone()
            for lse, _, present in kernel.group_lses(q, k, flags, block=block, stride=stride)
        ]
    )
    shares = torch.softmax(lse.view(batch, heads, groups, blocks) * math.log(2), -1)
    short = blocks * (block // stride) - groups
    shares = torch.nn.functional.pad(shares, (0, 0, 0, short))
    return shares.view(batch, heads, blocks, block // stride, blocks).sum(3)


def flags(batch: int, heads: int) -> Tensor:
    return torch.ones(batch, heads, dtype=torch.int32, device=DEVICE)
