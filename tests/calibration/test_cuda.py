"""Calibration on a GPU: bfloat16 weights, the Triton kernels, the same ranking as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_wan
import torch
from scipy.stats import spearmanr
from tiny_calibration import OPTIONS, PROMPTS, REQUEST, SMALL

import haste_compile
from haste_compile.generation import generate
from haste_compile.pipeline import optimize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def calibrate(device: str, dtype: torch.dtype, **changes: Any) -> Any:
    pipe = tiny_wan.build_pipeline()
    pipe.transformer.to(dtype)
    pipe.to(device)
    settings = {**SMALL, "probes": 32, **changes}
    profile = haste_compile.calibrate(pipe, PROMPTS, request=REQUEST, options=OPTIONS, **settings)
    return pipe, profile


@pytest.mark.parametrize("method", ["gradient", "exact"])
def test_errors_rank_as_on_the_cpu(method: str) -> None:
    _, on_host = calibrate("cpu", torch.float32, method=method)
    _, on_device = calibrate("cuda", torch.bfloat16, method=method)
    wanted, found = (profile.experts["transformer"] for profile in (on_host, on_device))
    assert np.isfinite(found.errors).all()
    np.testing.assert_allclose(found.sparsities, wanted.sparsities, atol=0.05)
    assert spearmanr(found.errors.ravel(), wanted.errors.ravel()).statistic >= 0.8


def test_the_profile_at_work(tmp_path: Path) -> None:
    pipe, profile = calibrate("cuda", torch.bfloat16, out=tmp_path, delta="choose")
    with optimize(pipe, profile=str(tmp_path)) as handle:
        generate(pipe, REQUEST, lambda _step: None, decode=False)
        density = handle.statistics()["transformer"].density
    dense_steps = profile.options["dense_steps"] / REQUEST.steps
    expected = dense_steps + (1 - dense_steps) * profile.experts["transformer"].density.mean()
    assert density == pytest.approx(expected, abs=0.1)


def test_equal_calls_give_equal_errors() -> None:
    """Deterministic kernels are asked for: a resumed calibration must repeat the bits."""
    first, again = (calibrate("cuda", torch.bfloat16)[1].experts["transformer"] for _ in range(2))
    np.testing.assert_array_equal(first.errors, again.errors)
