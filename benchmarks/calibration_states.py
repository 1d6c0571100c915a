"""What the papers assume, measured: drift against mask overlap, predicted against joint error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_compile.calibration import masks, objective
from haste_compile.calibration.intercept import Interception, attend_dense
from haste_compile.calibration.plan import Plan, Unit, make_plan
from haste_compile.calibration.profile import CalibrationProfile, ExpertProfile
from haste_compile.calibration.run import make_settings
from haste_compile.calibration.states import record_video, state_inputs
from haste_compile.config import HasteConfig
from haste_compile.generation import Request, generate
from haste_compile.kernels.block_mask import unpack_bits
from haste_compile.predictors import get_predictor


def joint_error(
    interception: Interception, plan: Plan, unit: Unit, kept: dict[str, Tensor], expert: ExpertProfile
) -> float:
    """E of the model's output with every head sparse at its threshold, at one state."""
    device = next(interception.transformer.parameters()).device
    inputs = state_inputs(kept, unit, device)
    dense = interception.run(inputs)
    layers = plan.experts[unit.expert].layers
    top_p = torch.tensor(expert.top_p, dtype=torch.float32, device=device)

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if block not in layers:
            return attend_dense(block, q, k, v, scale)
        predictor = get_predictor(plan.config.predictor)
        return predictor.attend_once(q, k, v, top_p[layers.index(block)], plan.config)[0]

    sparse = interception.run(inputs, attend)
    return objective.weighted_error(sparse.float() - dense.float(), dense, plan.settings.weights)


def joint_errors(
    pipe: Any,
    prompts: Sequence[str],
    request: Request,
    options: dict[str, Any],
    settings: dict[str, Any],
    profile: CalibrationProfile,
) -> dict[str, Any]:
    """Predicted against measured error of all heads sparse at once, at the measured states and at others."""
    config = HasteConfig.from_options({**options, "inner": "eager"})
    seen = make_plan(pipe, prompts, request, config, make_settings(**settings))
    unseen = make_plan(pipe, prompts, request, config, make_settings(**{**settings, "seed": 1_000_003}))
    expert = profile.experts["transformer"]
    measured: dict[str, list[float]] = {}
    with Interception(pipe.transformer, config) as interception:
        for name, plan in (("seen", seen), ("unseen", unseen)):
            kept = record_video(pipe, {"transformer": interception}, plan, 0, lambda _step: None)
            states = [unit for unit in plan.units() if unit.video == 0]
            measured[name] = [joint_error(interception, plan, unit, kept, expert) for unit in states]
    return {
        "additive": float(expert.error.sum()),
        "quadratic": expert.joint_error,
        "measured_seen": float(np.mean(measured["seen"])),
        "measured_unseen": float(np.mean(measured["unseen"])),
        "states": len(measured["seen"]),
    }


def drift_and_overlap(pipe: Any, request: Request, options: dict[str, Any], top_p: float) -> dict[str, Any]:
    """Spearman's correlation of drift and mask overlap from one step to the next, in a dense video.

    One pair for every step, guidance branch, layer and head: drift of the token means as temporal mask reuse
    measures it, and intersection over union of the masks that XAttention builds. Over all pairs, the same
    with drift relative to the earlier means, and within one head of one branch (median over those).
    """
    config = HasteConfig.from_options({**options, "inner": "eager"})
    calls = 0
    last: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
    found: dict[tuple[int, int], list[Tensor]] = {}  # of a branch and layer, [3, H] for every step
    branches = 2 if request.guidance > 1 else 1

    def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        nonlocal calls
        if block == 0:
            calls += 1
        heads = torch.full((q.shape[1],), top_p, device=q.device)
        bits = masks.build(q, k, heads, config)["mask"][0].cpu()
        kept = unpack_bits(bits, -(-q.shape[2] // config.block_size))[0]
        means = torch.stack((masks.token_means(q), masks.token_means(k)), dim=2)[0].cpu()
        key = (calls % branches, block)
        if key in last:
            before_means, before = last[key]
            drift = (means - before_means).abs().sum((-1, -2))
            both, either = (kept & before).sum((-1, -2)), (kept | before).sum((-1, -2))
            relative = drift / before_means.abs().sum((-1, -2))
            found.setdefault(key, []).append(torch.stack((drift, relative, both / either)))
        last[key] = means, kept
        return attend_dense(block, q, k, v, scale)

    with Interception(pipe.transformer, config) as interception:
        interception.default = attend
        with interception.calling():
            generate(pipe, request, lambda _step: None, decode=False)
    series = torch.stack([torch.stack(steps) for steps in found.values()]).double().numpy()
    drift, relative, overlap = np.moveaxis(series, 2, 0)  # [branches · layers, steps, H] each
    within = [
        _spearman(drift[i, :, h], overlap[i, :, h]) for i in range(len(drift)) for h in range(drift.shape[2])
    ]
    return {
        "pairs": drift.size,
        "spearman": _spearman(drift, overlap),
        "spearman_relative": _spearman(relative, overlap),
        "spearman_within_heads": float(np.median(within)),
        "overlap_median": float(np.median(overlap)),
        "drift_median": float(np.median(drift)),
    }


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of the two does not vary."""
    from scipy.stats import spearmanr

    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0
    return float(spearmanr(a.ravel(), b.ravel()).statistic)
