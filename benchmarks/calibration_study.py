"""What calibration and mask reuse bring, on prompts and seeds that calibration has not seen.

    python -m benchmarks.calibration_study --prompts 20 --seeds 2 --json study.json        # on a GPU
    python -m benchmarks.calibration_study --small --json study.json                       # on a CPU

Calibrates nano-wan in the gradient form, in the exact form, with the quadratic allocator and with a plain
squared error, then generates every evaluation video under each of the settings that the papers compare, and
dense. Rows of calibrated thresholds without reuse are brought to the density of the shared threshold, within
0.005 on a tuning video from the calibration pool, so that their quality can be compared. Every difference is
paired by prompt and seed; intervals are bootstrap intervals of the mean over videos.

``--small`` shortens videos and steps, and takes two prompts: a check of the script and of signs, no evidence.
``python -m benchmarks.calibration_report`` writes tables and plots into docs/calibration.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.calibration_rows import Figures, Rows, bootstrap_interval, environment, load
from benchmarks.calibration_states import drift_and_overlap, joint_errors
from examples.nano_wan.evaluate import hold_out_prompts
from haste_compile.calibration.objective import PLAIN
from haste_compile.calibration.profile import CalibrationProfile, ExpertProfile
from haste_compile.calibration.run import calibrate
from haste_compile.errors import HasteError
from haste_compile.generation import Request

#: Shorter videos and fewer steps, prompts, candidates and states.
SMALL: dict[str, Any] = {
    "frames": 17,
    "steps": 6,
    "prompts": 2,
    "seeds": 1,
    "candidates": [0.6, 0.8, 0.9, 0.95],
    "videos": 1,
    "intervals": 2,
    "branches": "conditional",
}
FULL: dict[str, Any] = {
    "prompts": 20,
    "seeds": 2,
    "candidates": [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99],
    "videos": 2,
    "intervals": 4,
    "branches": "both",
}


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    pipe, pool, request, options = load(args)
    shared = args.shared
    settings = {
        "candidates": args.candidates,
        "budget": f"shared:{shared}",
        "videos": args.videos,
        "intervals": args.intervals,
        "branches": args.branches,
        "probes": args.probes,
    }
    requests = evaluation_requests(request, args.prompts, args.seeds)
    with tempfile.TemporaryDirectory() as folder:
        rows = Rows(pipe, requests, options, Path(folder))
        profiles = _calibrate_all(pipe, pool, request, options, settings, args)
        rows.dense()
        _say("row                          density refresh  PSNR mean/worst  SSIM   latents  time/dense")
        base = rows.run("XAttention, shared τ", {**options, "top_p": shared, "reuse": "never"})
        tmr = rows.run("+ TMR", {**options, "top_p": shared, "reuse": "tmr"})
        tuning = dataclasses.replace(request, prompt=pool[0], seed=args.tuning_seed)
        rows.tune(tuning, {**options, "top_p": shared, "reuse": "never"})
        matched = {name: rows.at_equal_density(profile) for name, profile in profiles.items()}
        matched["shuffled"] = shuffled(matched["gradient"], seed=0)
        rows.run("+ EBC", {"profile": matched["gradient"], "reuse": "never"})
        rows.run("+ EBC + TMR", {"profile": matched["gradient"], "reuse": "tmr"})
        warm = options.get("dense_steps", 0) + 1
        rows.run("freeze after warm-up", {**options, "top_p": shared, "reuse": f"after:{warm}"})
        every = max(2, round(1 / max(tmr.refresh_rate, 1e-3)))
        rows.run(f"interval of {every} steps", {**options, "top_p": shared, "reuse": f"interval:{every}"})
        rows.run("EBC, shuffled over heads", {"profile": matched["shuffled"], "reuse": "never"})
        for name in ("exact", "quadratic", "plain"):
            if name in matched:
                rows.run(f"EBC, {LABELS[name]}", {"profile": matched[name], "reuse": "never"})
        report = {
            "setting": {**settings, "shared": shared, "small": args.small, "steps": request.steps}
            | {"frames": request.frames, "height": request.height, "width": request.width}
            | {"guidance": request.guidance, "prompts": args.prompts, "seeds": args.seeds},
            "options": options,
            **environment(pipe),
            "rows": [figures.to_dict() for figures in rows.figures],
            "differences": _differences(rows, base),
            "overlap": drift_and_overlap(pipe, requests[0], options, shared),
            "joint": joint_errors(pipe, pool, request, options, settings, profiles["gradient"]),
            "forms": _forms(profiles),
        }
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


LABELS = {"exact": "exact form", "quadratic": "quadratic allocation", "plain": "plain squared error"}


def evaluation_requests(base: Request, prompts: int, seeds: int) -> list[Request]:
    """Requests from nano-wan's hold-out prompts, two objects first, with seeds of their own."""
    texts = [p.text for p in sorted(hold_out_prompts(), key=lambda p: abs(len(p.objects) - 2))]
    return [
        dataclasses.replace(base, prompt=text, seed=7000 + seed)
        for text in texts[:prompts]
        for seed in range(seeds)
    ]


def shuffled(profile: CalibrationProfile, seed: int) -> CalibrationProfile:
    """The same thresholds dealt to other heads."""
    generator = np.random.default_rng(seed)

    def shuffle(expert: ExpertProfile) -> ExpertProfile:
        flat = generator.permutation(expert.choice.ravel())
        return expert.chosen(flat.reshape(expert.choice.shape))

    return profile.with_experts({name: shuffle(expert) for name, expert in profile.experts.items()})


def _calibrate_all(
    pipe: Any,
    pool: Sequence[str],
    request: Request,
    options: dict[str, Any],
    settings: dict[str, Any],
    args: argparse.Namespace,
) -> dict[str, CalibrationProfile]:
    def run(name: str, **changes: Any) -> CalibrationProfile:
        _say(f"calibrating: {name}")
        return calibrate(
            pipe, pool, request=request, options=options, model="nano-wan", **{**settings, **changes}
        )

    found = {"gradient": run("gradient form", keep_products=True)}
    found["quadratic"] = found["gradient"].with_budget(settings["budget"], "quadratic")
    if not args.no_plain:
        found["plain"] = run("gradient form, plain squared error", weights=PLAIN)
    if not args.no_exact:
        found["exact"] = run("exact form", method="exact")
    return found


def _differences(rows: Rows, base: Figures) -> dict[str, Any]:
    """PSNR of every row over the shared threshold's, with and without reuse, paired by video."""
    by_name = {figures.name: figures for figures in rows.figures}
    pairs = [(name, base.name) for name in by_name if name != base.name]
    pairs.append(("+ EBC + TMR", "+ TMR"))
    pairs.append(("+ TMR", "freeze after warm-up"))
    pairs += [("+ TMR", name) for name in by_name if name.startswith("interval")]
    return {
        f"{a} − {b}": {
            "psnr_db": float(np.mean(difference := by_name[a].psnr - by_name[b].psnr)),
            "interval": bootstrap_interval(difference),
            "density": by_name[a].density - by_name[b].density,
        }
        for a, b in pairs
    }


def _forms(profiles: dict[str, CalibrationProfile]) -> dict[str, Any] | None:
    """Rank correlation of the two forms' E over all heads and candidates, and the E for a plot."""
    from scipy.stats import spearmanr

    if "exact" not in profiles:
        return None
    a, b = (profiles[name].experts["transformer"].errors.ravel() for name in ("gradient", "exact"))
    return {
        "spearman": float(spearmanr(a, b).statistic),
        "gradient": [float(f"{x:.3g}") for x in a],
        "exact": [float(f"{x:.3g}") for x in b],
    }


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.calibration_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="the setting for a CPU")
    parser.add_argument("--model", type=Path, help="folder or hub id; default: nano-wan")
    parser.add_argument("--pool", type=Path, help="prompts to calibrate with; default: nano-wan's")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the device's")
    parser.add_argument("--prompts", type=int, help="evaluation prompts")
    parser.add_argument("--seeds", type=int, help="seeds of each prompt")
    parser.add_argument("--shared", type=float, default=0.9, help="the shared threshold; default: 0.9")
    parser.add_argument("--candidates", type=float, nargs="+")
    parser.add_argument("--videos", type=int)
    parser.add_argument("--intervals", type=int)
    parser.add_argument("--branches", choices=("both", "conditional"))
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument(
        "--tuning-seed", type=int, default=31, help="seed of the video that density is met on"
    )
    parser.add_argument("--no-exact", action="store_true", help="leave the exact form out")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain squared error out")
    for size in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{size}", type=int, help="default: what suits the model")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    for name, value in (SMALL if args.small else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def _say(line: str) -> None:
    print(line, flush=True)  # a row takes minutes: it must not wait in a buffer


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
