"""The gradient form against the paper's: the same draws, errors, cost and joint error, in one run.

    python -m benchmarks.calibration_forms           # nano-wan; long on a CPU
    python -m benchmarks.calibration_forms --frames 17 --steps 8 --videos 1 --intervals 2   # smaller

Both forms measure every head and candidate at states of the same dense videos. Reported are

* Spearman's rank correlation of the two E over all heads and candidates;
* the joint error: all heads sparse at once, as each form's allocation says, at states neither form has seen,
  as a ratio gradient / exact with a bootstrap interval over states;
* the time of either form, dense videos apart, since both need them.

The exact form measures each head at one video only (HASTE); the gradient form sees every head at each. With
one video, the default, both see the same states.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.calibration_bench import environment, load
from benchmarks.calibration_rows import bootstrap_interval
from benchmarks.calibration_states import joint_error
from haste_compile.calibration import exact, gradient
from haste_compile.calibration.assemble import assemble
from haste_compile.calibration.intercept import Interception
from haste_compile.calibration.plan import Plan, make_plan
from haste_compile.calibration.profile import CalibrationProfile
from haste_compile.calibration.run import deterministic, make_settings
from haste_compile.calibration.settings import Settings
from haste_compile.calibration.states import record_video
from haste_compile.config import HasteConfig
from haste_compile.errors import HasteError


def compare(
    pipe: Any, prompts: Sequence[str], request: Any, options: dict[str, Any], settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything of the report but the environment."""
    config = HasteConfig.from_options({**options, "inner": "eager"})
    plans = {
        method: make_plan(pipe, prompts, request, config, make_settings(method=method, **settings))
        for method in ("gradient", "exact")
    }
    others = {**settings, "seed": 1_000_003, "videos": max(2, settings["videos"])}
    fresh = make_plan(pipe, prompts, request, config, make_settings(**others))
    (name,) = plans["gradient"].experts
    with deterministic(), Interception(pipe.transformer, config, name) as interception:
        videos = [
            _record(pipe, interception, plans["gradient"], i) for i in range(len(plans["gradient"].videos))
        ]
        profiles, seconds, blocks = {}, {}, {}
        for method, measure in (("gradient", gradient.measure), ("exact", exact.measure)):
            plan = plans[method]
            units = plan.units()
            measure(interception, plan, units[0], videos[units[0].video])  # compiles
            interception.forget()
            _synchronize()
            blocks[method], started = interception.blocks_run, time.perf_counter()
            measured = {unit: measure(interception, plan, unit, videos[unit.video]) for unit in units}
            _synchronize()
            seconds[method] = time.perf_counter() - started
            blocks[method] = interception.blocks_run - blocks[method]
            interception.forget()
            sites = {name: _sites(interception, plan, name)}
            profiles[method] = assemble(pipe, "model", plan, {name: pipe.transformer}, sites, measured)
        unseen = [_record(pipe, interception, fresh, i) for i in range(len(fresh.videos))]
        joint = {
            method: [
                joint_error(interception, fresh, unit, unseen[unit.video], profiles[method].experts[name])
                for unit in fresh.units()
            ]
            for method in profiles
        }
    return _report(profiles, name, seconds, blocks, joint)


def _report(
    profiles: dict[str, CalibrationProfile],
    name: str,
    seconds: dict[str, float],
    blocks: dict[str, int],
    joint: dict[str, list[float]],
) -> dict[str, Any]:
    from scipy.stats import spearmanr

    a, b = (profiles[method].experts[name] for method in ("gradient", "exact"))
    ratios = np.array(joint["gradient"]) / np.array(joint["exact"])
    return {
        "heads": int(a.top_p.size),
        "candidates": a.candidates.tolist(),
        "states": a.states,
        "spearman": float(spearmanr(a.errors.ravel(), b.errors.ravel()).statistic),
        "same_choice": float((a.choice == b.choice).mean()),
        "joint_error": {method: float(np.mean(values)) for method, values in joint.items()},
        "joint_ratio": float(ratios.mean()),
        "joint_ratio_interval": bootstrap_interval(ratios),
        "seconds": seconds,
        "cost_ratio": seconds["exact"] / seconds["gradient"],
        "blocks_run": blocks,
    }


def _record(pipe: Any, interception: Interception, plan: Plan, index: int) -> dict[str, Tensor]:
    return record_video(pipe, {interception.name: interception}, plan, index, lambda _step: None)


def _sites(interception: Interception, plan: Plan, name: str) -> tuple[tuple[str, ...], tuple[int, ...]]:
    rows = [interception.sites[block] for block in plan.experts[name].layers]
    found = [row for row in rows if row is not None]
    return tuple(row.name for row in found), found[0].shape


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmarks.calibration_forms",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="folder or hub id; default: nano-wan")
    parser.add_argument("--pool", type=Path, help="a prompt on each line; default: nano-wan's")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the device's")
    parser.add_argument(
        "--candidates", type=float, nargs="+", default=[0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99]
    )
    parser.add_argument("--budget", default="shared:0.9")
    parser.add_argument("--videos", type=int, default=1)
    parser.add_argument("--intervals", type=int, default=4)
    parser.add_argument("--probes", type=int, default=Settings.probes)
    parser.add_argument("--branches", choices=("both", "conditional"), default="both")
    for size in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{size}", type=int, help="default: what suits the model")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    pipe, prompts, request, options = load(args)
    settings = {
        "candidates": args.candidates,
        "budget": args.budget,
        "videos": args.videos,
        "intervals": args.intervals,
        "probes": args.probes,
        "branches": args.branches,
    }
    found = compare(pipe, prompts, request, options, settings)
    report = {
        "setting": {**settings, "steps": request.steps, "frames": request.frames, "height": request.height},
        **environment(pipe),
        **found,
    }
    low, high = found["joint_ratio_interval"]
    print(
        f"Spearman {found['spearman']:.3f} over {found['heads']} heads × {len(found['candidates'])}; "
        f"joint error gradient / exact {found['joint_ratio']:.3f} [{low:.3f}, {high:.3f}]; "
        f"{found['seconds']['exact']:.1f} s exact, {found['seconds']['gradient']:.1f} s gradient: "
        f"{found['cost_ratio']:.1f}× as cheap"
    )
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
