"""Is an AOTInductor artifact as fast as the live backend? Wan 2.1 1.3B's geometry, on one NVIDIA GPU.

    python -m benchmarks.artifact_speed --layers 8       # first: compiles in minutes
    python -m benchmarks.artifact_speed                  # all 30 layers
    python -m benchmarks.artifact_speed --json speed.json

STRUCTURED RANDOM WEIGHTS: SPEED ONLY, made as for wan_forward.py, whose density and refresh rate are the
defaults here too.

Both sides run the same denoising steps in one process. A first pass compiles and compares: every output of
the artifact must agree with the live one, or nothing is timed. In the second pass all steps but the first,
which rebuilds every mask, are timed, the first of each pair alternating.

Milliseconds are medians; a spread is half the range over the median, and holds what varies from step to step.
``paired_ratio`` does not: it is the median over steps of artifact / live, between its quartiles.

Exit code: 0, 1 when the outputs differ, 2 when the machine cannot run the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import haste_compile
from benchmarks.attention_problems import WrongResultError
from benchmarks.interleaving import Timer, cuda_milliseconds
from benchmarks.wan_forward import GRIDS, MODELS, WEIGHTS, Geometry, Run, counts, rates, time_steps
from haste_compile.config import HasteConfig
from haste_compile.errors import HasteError
from haste_compile.explanation import VAE_SCALES
from haste_compile.loading import pick_device

#: Largest relative error between the two sides' outputs in bfloat16 that lets them be timed.
TOLERANCE = 2e-2
SIDES = ("live", "artifact")


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).float().norm() / wanted.float().norm())


def summary(live: list[float], artifact: list[float]) -> dict[str, Any]:
    """Medians, spreads and ratios of two sides' milliseconds, step by step."""
    pairs = [b / a for a, b in zip(live, artifact, strict=True)]
    row: dict[str, Any] = {"timed_calls": len(pairs)}
    for side, times in zip(SIDES, (live, artifact), strict=True):
        median = statistics.median(times)
        row |= {f"{side}_ms": median, f"{side}_spread": (max(times) - min(times)) / 2 / median}
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    ratio = row["artifact_ms"] / row["live_ms"]
    return row | {"ratio": ratio, "paired_ratio": middle, "paired_quartiles": [low, high]}


def measure(run: Run, *, timer: Timer, format: str = "aoti") -> dict[str, Any]:
    """Export the run's transformer, compare the artifact with the live backend, and time both.

    Raises:
        WrongResultError: their outputs differ.
    """
    frames, height, width = run.geometry.grid
    size = {
        "num_frames": VAE_SCALES[0] * (frames - 1) + 1,
        "height": 2 * VAE_SCALES[1] * height,
        "width": 2 * VAE_SCALES[1] * width,
    }
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "wan.pt2", time.perf_counter()
        manifest = haste_compile.export(
            run.transformer, path, format=format, text_tokens=run.geometry.text_tokens, **size, **run.options
        )
        exported = time.perf_counter()
        runner = haste_compile.load(path, trust=True)
        loaded = time.perf_counter()
        live = torch.compile(run.transformer, backend="haste", dynamic=False, options=run.options)
        sides: tuple[Any, Any] = (live, runner)
        errors = []
        for step in range(run.steps):
            wanted, found = (run.forward(side, step) for side in sides)
            errors.append(relative_error(found, wanted))
            if not errors[-1] <= TOLERANCE:  # also NaN
                raise WrongResultError(
                    found=f"outputs that differ by {errors[-1]:.1e}",
                    wanted=f"at most {TOLERANCE:.0e}",
                    where=f"step {step}, artifact against live backend",
                    fix="Run tests/artifacts/test_aoti_cuda.py.",
                )
        states = (run.states(HasteConfig.from_options(run.options)), [runner.state])
        for side in sides:
            run.forward(side, 0)  # a new video
        before = [counts(state) for state in states]
        times = time_steps(run, sides, timer)
        shares = [rates(state, then) for state, then in zip(states, before, strict=True)]
    return {
        "weights": WEIGHTS,
        "torch": torch.__version__,
        "layers": run.geometry.layers,
        "attention": manifest.extra.get("attention"),
        **size,
        "options": run.options,
        **summary(*times),
        "relative_error": max(errors),
        "density": dict(zip(SIDES, (density for density, _ in shares), strict=True)),
        "refresh_rate": dict(zip(SIDES, (rate for _, rate in shares), strict=True)),
        "bytes": sum(int(file["bytes"]) for file in manifest.files.values()),
        "export_s": exported - started,
        "load_s": loaded - exported,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--size", choices=list(GRIDS), default="480p")
    parser.add_argument("--density", type=float, default=0.25, help="mean density to aim at")
    parser.add_argument("--refresh", type=float, default=0.2, help="share of masks rebuilt a step to aim at")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps; all but one are timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    geometry = dataclasses.replace(Geometry(*MODELS["1.3B"], GRIDS[args.size]), layers=args.layers)
    try:
        pick_device("cuda")
        run = Run(
            geometry, "cuda", torch.bfloat16, {}, density=args.density, refresh=args.refresh, steps=args.steps
        )
        record = {"gpu": torch.cuda.get_device_name(), **measure(run, timer=cuda_milliseconds)}
    except WrongResultError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    except HasteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
