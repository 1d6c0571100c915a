"""Choose δ and top_p for a model by measurement: how far heads drift, and what each setting costs and saves.

    python -m benchmarks.drift_threshold                             # nano-wan: the demo's prompt, two seeds
    python -m benchmarks.drift_threshold --model FOLDER --height 480 --width 832 --frames 81 -o block_size=128
    python -m benchmarks.drift_threshold --deltas 2 4 8 --top-p 0.85 0.9 --json thresholds.json

δ is an L1 norm of means over tokens (HASTE §3), so it depends on a model's head dim and scale: the paper's 30
belongs to Wan's heads of 128 features. This script

1. generates every video dense;
2. for each top_p generates it with every mask rebuilt. The anchors of consecutive steps then give the drift d
   of one step exactly; its percentiles tell the range in which δ means something;
3. for each (top_p, δ) generates it with temporal mask reuse.

Each row gives, over all prompts and seeds: density (mean), refresh rate (mean), PSNR against dense (mean and
worst) and the seconds of the denoising loop (median, over those of dense). Nothing goes through Inductor, on
either side: the times serve to rank settings, and no setting waits for a compiler. ``haste demo`` times
compiled runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from haste_compile.config import parse_options
from haste_compile.errors import HasteError
from haste_compile.evaluation.metrics import psnr_db
from haste_compile.generation import Generation, Request, default_options, default_request, generate
from haste_compile.kernels.layout import Counter
from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline, pick_device
from haste_compile.pipeline import Handle, optimize
from haste_compile.state import states_of

PERCENTILES = (5, 25, 50, 75, 95)


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting over all videos. ``delta`` is None for ``reuse="never"``."""

    top_p: float
    delta: float | None
    density: float
    refresh_rate: float
    psnr_mean: float
    psnr_worst: float
    time_over_dense: float

    def __str__(self) -> str:
        delta = "never" if self.delta is None else f"{self.delta:g}"
        return (
            f"{self.top_p:6.3f} {delta:>8} {self.density:8.3f} {self.refresh_rate:8.3f} "
            f"{self.psnr_mean:8.2f} {self.psnr_worst:8.2f} {self.time_over_dense:8.2f}"
        )


HEADER = f"{'top_p':>6} {'δ':>8} {'density':>8} {'refresh':>8} {'PSNR':>8} {'worst':>8} {'time':>8}"


def drifts(earlier: Tensor, later: Tensor) -> Tensor:
    """d of HASTE §3 between anchors [..., 2, D] of one head: ‖ΔQ̄‖₁ + ‖ΔK̄‖₁, shape [...]."""
    return (later - earlier).abs().sum((-2, -1))


class DriftRecorder:
    """Collects d of every site, branch, sample and head from one step to the next.

    Needs ``reuse="never"``: anchors are then the means of the latest call.
    """

    def __init__(self, handle: Handle) -> None:
        self._handle = handle
        self._before: list[tuple[Tensor, Tensor]] = []
        self.values: list[Tensor] = []

    def step_ended(self, _step: int) -> None:
        now = [self._read(state, i) for state in self._states() for i in range(len(state.specs))]
        for (old_anchors, old_epoch), (anchors, epoch) in zip(self._before, now, strict=False):
            same_video = (old_epoch == epoch) & (epoch > 0)
            self.values.append(drifts(old_anchors, anchors)[same_video])
        self._before = now

    def _states(self) -> list[Any]:
        return [state for module in self._handle.transformers.values() for state in states_of(module)]

    @staticmethod
    def _read(state: Any, site: int) -> tuple[Tensor, Tensor]:
        """Anchors [S, B, H, 2, D] and the epochs [S, B, H] they belong to, copied to the host."""
        epochs = state.tensor(site, "counters")[..., Counter.EPOCH]
        return state.tensor(site, "anchors").cpu().clone(), epochs.cpu().clone()


def measure(
    pipe: Any,
    requests: Sequence[Request],
    references: Sequence[Generation],
    options: dict[str, Any],
    *,
    watch: Callable[[Handle], Callable[[int], None]] = lambda _handle: lambda _step: None,
) -> Row:
    """Generate every video under ``options`` and compare it with its dense reference."""
    density, refresh, psnr, times = [], [], [], []
    for request, reference in zip(requests, references, strict=True):
        torch.compiler.reset()  # Dynamo allows one function only so many graphs
        with optimize(pipe, inner="eager", **options) as handle:
            handle.reset()
            run = generate(pipe, request, watch(handle))
            figures = list(handle.statistics().values())
            handle.reset()
        density.append(statistics.fmean(f.density for f in figures))
        refresh.append(statistics.fmean(f.refresh_rate for f in figures))
        psnr.append(psnr_db(run.video, reference.video))
        times.append(run.seconds / reference.seconds)
    never = options.get("reuse") == "never"
    return Row(
        top_p=options["top_p"],
        delta=None if never else options["delta"],
        density=statistics.fmean(density),
        refresh_rate=statistics.fmean(refresh),
        psnr_mean=statistics.fmean(psnr),
        psnr_worst=min(psnr),
        time_over_dense=statistics.median(times),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device=device, dtype=default_dtype(device))
    base = default_request(args.model)
    given = {name: getattr(args, name) for name in ("steps", "guidance", "height", "width", "frames")}
    base = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    requests = [
        dataclasses.replace(base, prompt=prompt, seed=seed)
        for prompt in args.prompt or [base.prompt]
        for seed in args.seeds
    ]
    options = default_options(args.model)
    options.update(parse_options(args.option))
    _say(f"{len(requests)} videos of {base.frames}×{base.height}×{base.width}, {base.steps} steps, {options}")

    references = [generate(pipe, request, lambda _step: None) for request in requests]
    dense_seconds = statistics.median(run.seconds for run in references)
    _say(f"dense: {dense_seconds:.1f} s a video (median, {torch.get_num_threads()} threads, {device})")
    rows: list[Row] = []
    percentiles: dict[str, dict[str, float]] = {}
    for top_p in args.top_p:
        recorders: list[DriftRecorder] = []

        def watch(handle: Handle, into: list[DriftRecorder] = recorders) -> Callable[[int], None]:
            into.append(DriftRecorder(handle))
            return into[-1].step_ended

        options["top_p"] = top_p
        never = measure(pipe, requests, references, {**options, "reuse": "never"}, watch=watch)
        seen = torch.cat([value for recorder in recorders for value in recorder.values]).numpy()
        percentiles[f"{top_p:g}"] = found = {f"p{p}": float(np.percentile(seen, p)) for p in PERCENTILES}
        _say(f"d from step to step, top_p {top_p:g}: " + ", ".join(f"{k} {v:.3g}" for k, v in found.items()))
        _say(HEADER)
        rows.append(never)
        _say(str(never))
        for delta in args.deltas or [round(found[p], 2) for p in ("p50", "p75", "p95")]:
            rows.append(measure(pipe, requests, references, {**options, "delta": delta}))
            _say(str(rows[-1]))
    if args.json:
        report = {
            "model": str(args.model),
            "requests": [{"prompt": r.prompt, "seed": r.seed} for r in requests],
            "steps": base.steps,
            "guidance": base.guidance,
            "options": {k: v for k, v in options.items() if k != "top_p"},
            "dense_seconds": dense_seconds,
            "drift_percentiles": percentiles,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.drift_threshold",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=NANO_WAN, help="folder or hub id; default: nano-wan")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--prompt", action="append", help="repeatable; default: the demo's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.9])
    parser.add_argument("--deltas", type=float, nargs="+", help="default: the drift's p50, p75 and p95")
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="repeatable"
    )
    for name in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int, help="default: what suits the model")
    parser.add_argument("--guidance", type=float, help="default: what suits the model")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)  # a row takes a minute: it must not wait in a buffer


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
