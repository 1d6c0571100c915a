from __future__ import annotations

import numpy as np
import pytest
import torch
from predictor import DEVICE, gpu, tokens_first

from haste_compile.kernels.token_means import reference

pytest.importorskip("triton")
from haste_compile.kernels.token_means import kernel  # noqa: E402


def test_reference_is_the_mean_over_tokens():
    x = tokens_first(2, 3, 77, 64)
    expected = np.zeros((2, 3, 64))
    for token in range(77):
        expected += x[:, :, token].double().cpu().numpy()
    np.testing.assert_allclose(reference.token_means(x).cpu(), expected / 77, rtol=0, atol=1e-6)


def test_low_precision_input_is_accumulated_in_float32():
    x = torch.full((1, 1, 5000, 64), 1.0, dtype=torch.bfloat16)  # bf16 cannot count beyond 256
    means = reference.token_means(x)
    assert means.dtype == torch.float32
    assert torch.equal(means, torch.ones(1, 1, 64))


@pytest.mark.parametrize("tokens", [1, 63, 512, 1100])
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float32, 64), (torch.float16, 128)])
def test_kernel_agrees_with_the_reference(tokens: int, dtype: torch.dtype, dim: int):
    q = tokens_first(2, 3, tokens, dim, dtype, seed=1)
    k = tokens_first(2, 3, tokens, dim, dtype, seed=2).contiguous()  # strides unlike those of q
    means = kernel.token_means(q, k)
    assert means.shape == (2, 2, 3, dim) and means.dtype == torch.float32
    for mean, x in zip(means, (q, k), strict=True):
        torch.testing.assert_close(mean.double(), reference.token_means(x.double()), rtol=0, atol=1e-6)


def test_kernel_gives_the_same_bits_twice():
    q, k = tokens_first(1, 2, 1500, 64, seed=1), tokens_first(1, 2, 1500, 64, seed=2)
    assert torch.equal(kernel.token_means(q, k), kernel.token_means(q, k))


@pytest.mark.gpu
@gpu
def test_kernel_in_bf16_at_full_length():
    q = tokens_first(1, 12, 32_760, 128, torch.bfloat16, seed=1)
    k = tokens_first(1, 12, 32_760, 128, torch.bfloat16, seed=2)
    expected = torch.stack([x.double().mean(2) for x in (q, k)])
    torch.testing.assert_close(kernel.token_means(q, k).double(), expected, rtol=0, atol=1e-6)
    assert kernel.token_means(q, k).device.type == DEVICE
