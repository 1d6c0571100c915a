"""What several test files share: Triton's interpreter, uninitialised memory full of NaN, a float64 oracle."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

# Triton reads this once, at import: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# For `examples` and `benchmarks`. Last, so that our folder `kernels` hides no package of that name.
sys.path.append(str(Path(__file__).parents[1]))

Oracle = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Every tensor made by ``empty`` and its kin starts full of NaN (integers: of their largest value)."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    """Attention over kept key blocks in float64, one query block at a time, by the definition of softmax."""

    def attend(
        q: Tensor, k: Tensor, v: Tensor, kept: Tensor, *, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """q, k, v: [B, H, N, D]; kept: bool [B, H, Tq, Tk]. Returns out [B, H, N, D], lse [B, H, N]."""
        queries, keys, values = (x.double().cpu().numpy() for x in (q, k, v))
        out, lse = np.full(q.shape, np.nan), np.full(q.shape[:3], np.nan)
        for b, h, i in np.ndindex(*kept.shape[:3]):
            rows = slice(i * block, (i + 1) * block)
            columns = kept[b, h, i].cpu().numpy().repeat(block)[: q.shape[2]]
            scores = queries[b, h, rows] @ keys[b, h, columns].T * scale
            peak = scores.max(1, keepdims=True)
            mass = np.exp(scores - peak)
            total = mass.sum(1, keepdims=True)
            out[b, h, rows] = mass / total @ values[b, h, columns]
            lse[b, h, rows] = (peak + np.log(total))[:, 0]
        return torch.from_numpy(out), torch.from_numpy(lse)

    return attend
