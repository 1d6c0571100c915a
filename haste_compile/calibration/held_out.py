"""How close the calibrated pipeline comes to dense on prompts that calibration has not seen."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_compile import _torch
from haste_compile.calibration.plan import Plan
from haste_compile.generation import generate
from haste_compile.pipeline import optimize

#: Stands for equal videos, whose PSNR is infinite.
EQUAL_DB = 200.0


def compare(
    pipe: Any, plan: Plan, index: int, profile: Path, on_step: Callable[[int], None]
) -> dict[str, Tensor]:
    """Generate one held-out video dense and under a profile, uncompiled.

    Returns:
        ``figures`` fp64 [4]: PSNR in dB, SSIM, density, refresh rate.
    """
    from haste_compile.evaluation import metrics

    request = plan.video_request(plan.held_out[index])
    dense = generate(pipe, request, on_step).video
    with _torch.many_graphs(), optimize(pipe, profile=str(profile), inner="eager") as handle:
        handle.reset()
        sparse = generate(pipe, request, lambda step: on_step(step + request.steps)).video
        found = list(handle.statistics().values())
    psnr = metrics.psnr_db(sparse, dense)
    figures = (
        psnr if math.isfinite(psnr) else EQUAL_DB,
        metrics.ssim(sparse, dense),
        statistics.fmean(f.density for f in found),
        statistics.fmean(f.refresh_rate for f in found),
    )
    return {"figures": torch.tensor(figures, dtype=torch.float64)}


def summarise(plan: Plan, results: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The profile's ``held_out`` field."""
    figures = np.stack([result["figures"].numpy() for result in results])
    psnr, ssim, density, refresh = figures.T
    return {
        "psnr_db": _spread(psnr),
        "ssim": _spread(ssim),
        "density": float(density.mean()),
        "refresh_rate": float(refresh.mean()),
        "videos": [
            {"prompt": video.prompt, "seed": video.seed, "psnr_db": float(row[0]), "ssim": float(row[1])}
            for video, row in zip(plan.held_out, figures, strict=True)
        ],
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": deviation, "worst": float(values.min())}
