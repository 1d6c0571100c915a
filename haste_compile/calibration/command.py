"""``haste calibrate``: what the command does with its arguments."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from haste_compile.calibration.cost import Cost, Seconds, estimate, time_transformer
from haste_compile.calibration.plan import Plan
from haste_compile.calibration.profile import CalibrationProfile
from haste_compile.calibration.run import Progress, calibrate, make_settings, plan_for
from haste_compile.errors import OptionError
from haste_compile.generation import NANO_OPTIONS, Request
from haste_compile.loading import NANO_PROFILE, NANO_WAN, default_dtype, find_transformers, load_pipeline

#: Prompts of the embedded model, none of them among those that its hold-out test draws.
NANO_PROMPTS = NANO_PROFILE / "prompts.txt"
#: Settings with which the embedded model's own profile was made.
NANO_SETTINGS: dict[str, Any] = {
    "candidates": (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99),
    "budget": "shared:0.9",
    "held_out": 2,
}


def run(
    model: str | Path,
    prompts: Path | None,
    request: Request,
    *,
    options: dict[str, Any],
    settings: dict[str, Any],
    out: Path,
    device: torch.device,
    budget_minutes: float | None,
    dry_run: bool,
    progress: Progress,
) -> tuple[Cost, CalibrationProfile | None]:
    """Load, tell the cost, and calibrate unless it is a dry run.

    Args:
        settings: fields of ``Settings`` that the user gave.

    Raises:
        OptionError: no prompts; and all of ``calibrate``.
    """
    lines = read_prompts(model, prompts)
    embedded = Path(model) == NANO_WAN
    if embedded:
        options = {**{k: v for k, v in NANO_OPTIONS.items() if k != "top_p"}, **options}
        settings = {**NANO_SETTINGS, **settings}
    progress("loading", 0, 1)
    pipe = load_pipeline(model, device=local_device(device), dtype=default_dtype(device))
    name = "nano-wan" if embedded else None
    plan = plan_for(pipe, lines, request=request, options=options, settings=make_settings(**settings))
    cost = tell_cost(pipe, plan, progress)
    if dry_run:
        return cost, None
    profile = calibrate(
        pipe,
        lines,
        request=request,
        options=options,
        out=out,
        model=name,
        budget_minutes=budget_minutes,
        progress=progress,
        **settings,
    )
    return cost, profile


def read_prompts(model: str | Path, path: Path | None) -> list[str]:
    """One prompt a line, empty lines and those that begin with # left out.

    Raises:
        OptionError: no file, or none that holds a prompt.
    """
    if path is None and Path(model) == NANO_WAN:
        path = NANO_PROMPTS
    if path is None or not path.is_file():
        raise OptionError(
            found="no file" if path is None else f"no file {path}",
            wanted="a text file with a prompt on each line",
            where="option --prompts",
            fix="Give some ten prompts of the kind that the model will be used with.",
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def local_device(device: torch.device) -> torch.device:
    """Under torchrun each rank's own GPU."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def tell_cost(pipe: Any, plan: Plan, progress: Progress) -> Cost:
    """Time a few calls of every transformer and estimate the plan's cost."""
    seconds: dict[str, Seconds] = {}
    scales = (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    transformers = find_transformers(pipe)
    for done, (name, transformer) in enumerate(transformers.items()):
        progress("timing a few calls", done, len(transformers))
        seconds[name] = time_transformer(transformer, plan.request, plan.config, vae_scales=scales)
    return estimate(plan, seconds)
