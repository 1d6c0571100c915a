"""What calibration and mask reuse bring, on prompts and seeds that calibration has not seen.

    python -m benchmarks.calibration_study --prompts 20 --seeds 2 --workers 8 --json study.json   # on GPUs
    python -m benchmarks.calibration_study --small --json study.json                              # on a CPU

Calibrates nano-wan in the gradient form, in the exact form, with the quadratic allocator, with errors
weighted by what they do to the latents and with a plain squared error, and once more for SVG2; then generates
every evaluation video dense and under each of the settings that the papers compare. Rows without reuse are
brought to the density of the shared threshold, within 0.005 on tuning videos from the calibration pool, so
that their quality can be compared; SVG2's threshold, too. Every difference is paired by prompt and seed.

Workers are processes that share the work, ``--devices`` in turn; ``--batch`` videos go through the pipeline
together. Neither changes what is computed for one video but by rounding. Rows are timed at the end, one
video alone, beside dense. The file is written anew after every row; what failed, or was not begun when
``--minutes`` were over, is named in it under "failed".

``--small`` shortens videos and steps, and takes two prompts: a check of the script and of signs, no evidence.
``python -m benchmarks.calibration_report`` writes tables and plots into docs/calibration.md.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.calibration_bench import load_task
from benchmarks.calibration_rows import Record, Rows
from benchmarks.calibration_workers import Workers
from examples.nano_wan.evaluate import hold_out_prompts
from haste_compile.calibration.objective import PLAIN
from haste_compile.calibration.profile import CalibrationProfile, ExpertProfile
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
    "probes": 4,
    "tuning": 1,
}
FULL: dict[str, Any] = {
    "prompts": 20,
    "seeds": 2,
    "candidates": [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.99],
    "videos": 4,
    "intervals": 4,
    "branches": "both",
    "probes": 8,
    "tuning": 8,
}
#: The rows in their order.
ROWS = (
    "XAttention, shared τ",
    "+ TMR",
    "+ EBC",
    "+ EBC + TMR",
    "freeze after warm-up",
    "interval",
    "EBC, shuffled over heads",
    "EBC, exact form",
    "EBC, quadratic allocation",
    "EBC, weighted by step",
    "EBC, plain squared error",
    "SVG2, shared τ",
    "SVG2 + TMR",
    "SVG2 + EBC",
    "SVG2 + EBC + TMR",
    "SVG2 + EBC + TMR, 0.8 × density",
    "SVG2 + EBC + TMR, 0.6 × density",
)
#: Time for the times, beyond the minutes that rows may take.
_TIMING_SECONDS = 300.0
#: Processes that divide the exact form, at most: half of the workers.
_RANKS = 4


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    deadline = time.monotonic() + 60 * args.minutes
    record = Record(args.json, list(ROWS))
    with tempfile.TemporaryDirectory() as folder, Workers(args, Path(folder), _devices(args), deadline) as w:
        Study(args, w, record, Path(folder)).run()
    if failed := record.content["failed"]:
        raise SystemExit("not measured: " + ", ".join(failed))


class Study:
    """Everything of one study, on workers; parts that depend on each other wait in a chain of their own."""

    def __init__(self, args: argparse.Namespace, workers: Workers, record: Record, folder: Path) -> None:
        self.args, self.workers, self.record, self.folder = args, workers, record, folder
        self.pool, self.request, self.options = load_task(args)
        requests = evaluation_requests(self.request, args.prompts, args.seeds)
        self.rows = Rows(workers, requests, args.batch, record)
        self.settings = {
            name: getattr(args, name) for name in ("candidates", "videos", "intervals", "branches", "probes")
        } | {"budget": f"shared:{args.shared}"}
        self.tuning = [
            dataclasses.replace(self.request, prompt=self.pool[i % len(self.pool)], seed=args.tuning_seed + i)
            for i in range(args.tuning)
        ]
        self._chains: list[Future[Any]] = []

    def run(self) -> None:
        """Measure everything and note it in the record."""
        self.record.add(**self._facts())
        profiles = self._calibrate()
        self.rows.dense()
        print("row                              density refresh  PSNR mean/worst  SSIM   latents", flush=True)
        self._tables(profiles)
        if not self.args.no_svg2:
            self._second_host(profiles["svg2"])
        self._beside("overlap", lambda: self.workers.call("overlap", self.rows.requests[0], self.args.shared))
        self._beside(
            "joint", lambda: self.workers.call("joint", self.settings, profiles["gradient"].result())
        )
        if "exact" in profiles:
            self._beside(
                "forms", lambda: compare_forms(profiles["gradient"].result(), profiles["exact"].result())
            )
        concurrent.futures.wait(self._chains)  # a part that failed has been noted
        if self.args.no_times:
            return
        timed = list(self.rows.figures)
        self.workers.deadline += _TIMING_SECONDS
        self._attempt("times", functools.partial(self.rows.time, timed, self.workers.deadline))

    def _facts(self) -> dict[str, Any]:
        sizes = {
            name: getattr(self.request, name) for name in ("steps", "frames", "height", "width", "guidance")
        }
        args = {
            name: getattr(self.args, name)
            for name in ("shared", "small", "prompts", "seeds", "tuning", "batch")
        }
        return {
            "setting": {**self.settings, **sizes, **args, "workers": self.workers.count},
            "options": self.options,
            **self.workers.call("facts"),
            **dict.fromkeys(("overlap", "joint", "forms")),
        }

    def _calibrate(self) -> dict[str, Future[CalibrationProfile]]:
        """Begin every calibration."""

        def begin(options: dict[str, Any] | None = None, **changes: Any) -> Future[CalibrationProfile]:
            return self.workers.submit("calibrate", options or {}, {**self.settings, **changes})

        found = {}
        if not self.args.no_exact:
            ranks = max(1, min(_RANKS, self.workers.count // 2))
            port = _free_port()
            parts = [
                self.workers.submit(
                    "calibrate",
                    {},
                    {**self.settings, "method": "exact"},
                    out=self.folder / "exact",
                    rank=rank,
                    ranks=ranks,
                    port=port,
                )
                for rank in range(ranks)
            ]
            found["exact"] = parts[0]
        found["gradient"] = begin(keep_products=True)
        if not self.args.no_plain:
            found["plain"] = begin(weights=PLAIN)
        if not self.args.no_svg2:
            found["svg2"] = begin({"predictor": "svg2"})
        return found

    def _tables(self, profiles: dict[str, Future[CalibrationProfile]]) -> None:
        """The rows of the first host."""
        never = {"top_p": self.args.shared, "reuse": "never"}
        self.wanted = self.workers.submit("density", self.tuning, never)
        self._row("XAttention, shared τ", lambda: never)
        reused = self._row("+ TMR", lambda: {**never, "reuse": "tmr"})
        warm = self.options.get("dense_steps", 0) + 1
        self._row("freeze after warm-up", lambda: {**never, "reuse": f"after:{warm}"})

        gradient = self._matched(lambda: profiles["gradient"].result())
        self._row("+ EBC", _under(gradient, "never"))
        self._row("+ EBC + TMR", _under(gradient, "tmr"))
        # Dealt to other heads, the same thresholds have another density; that is part of the comparison.
        dealt = self._chain(lambda: shuffled(gradient.result(), seed=0))
        self._row("EBC, shuffled over heads", _under(dealt, "never"))
        for name, key in (("EBC, exact form", "exact"), ("EBC, plain squared error", "plain")):
            if key in profiles:
                self._row(name, _under(self._matched(profiles[key].result), "never"))
        quadratic = self._matched(
            lambda: profiles["gradient"].result().with_budget(self.settings["budget"], "quadratic")
        )
        self._row("EBC, quadratic allocation", _under(quadratic, "never"))
        weighted = self._matched(
            lambda: weighted_by_step(
                profiles["gradient"].result(), self.workers.call("step_weights", self.request)
            )
        )
        self._row("EBC, weighted by step", _under(weighted, "never"))

        def every() -> dict[str, Any]:
            rate, share = reused.result().refresh_rate, 1 - (warm - 1) / self.request.steps
            steps = min(range(2, self.request.steps + 1), key=lambda k: abs(share / k - rate))
            return {**never, "reuse": f"interval:{steps}"}

        self._row("interval of {reuse} steps", every)

    def _second_host(self, profile: Future[CalibrationProfile]) -> None:
        """The rows of SVG2, at the first host's density, and sparser ones to compare at equal time."""
        svg2 = {"predictor": "svg2"}
        shared = self._chain(
            lambda: self.workers.call("threshold_at_density", svg2, self.tuning, self.wanted.result())
        )
        self._row("SVG2, shared τ", lambda: {**svg2, "top_p": shared.result(), "reuse": "never"})
        self._row("SVG2 + TMR", lambda: {**svg2, "top_p": shared.result(), "reuse": "tmr"})
        matched = self._matched(profile.result)
        self._row("SVG2 + EBC", _under(matched, "never"))
        self._row("SVG2 + EBC + TMR", _under(matched, "tmr"))
        for share in (0.8, 0.6):
            sparser = self._matched(profile.result, share)
            self._row(f"SVG2 + EBC + TMR, {share:g} × density", _under(sparser, "tmr"))

    def _matched(
        self, make: Callable[[], CalibrationProfile], share: float = 1.0
    ) -> Future[CalibrationProfile]:
        """A profile brought to the shared threshold's density, or a share of it, on the tuning videos."""
        return self._chain(
            lambda: self.workers.call("at_density", make(), self.tuning, share * self.wanted.result())
        )

    def _row(self, name: str, options: Callable[[], dict[str, Any]]) -> Future[Any]:
        def run() -> Any:
            given = options()
            return self.rows.run(name.format(reuse=str(given["reuse"]).rpartition(":")[2]), given)

        return self._chain(functools.partial(self._attempt, name, run))

    def _beside(self, name: str, measure: Callable[[], Any]) -> None:
        self._chain(functools.partial(self._attempt, name, lambda: self.record.add(**{name: measure()})))

    def _chain(self, function: Callable[[], Any]) -> Future[Any]:
        chain = self.workers.chain(function)
        self._chains.append(chain)
        return chain

    def _attempt(self, name: str, measure: Callable[[], Any]) -> Any:
        """Do one part of the study; the others are worth having without it."""
        try:
            return measure()
        except Exception as error:
            self.record.failed(name, error)
            return None


def _under(profile: Future[CalibrationProfile], reuse: str) -> Callable[[], dict[str, Any]]:
    return lambda: {"profile": profile.result(), "reuse": reuse}


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


def weighted_by_step(profile: CalibrationProfile, weights: np.ndarray) -> CalibrationProfile:
    """The gradient form's profile with every state's errors weighted, under the same budget.

    Args:
        profile: calibrated with ``keep_products``, one expert.
        weights: of the conditional and the unconditional call at every step, [2, steps].
    """
    (name,) = profile.experts
    expert = profile.experts[name]
    assert expert.products is not None
    drawn = [video["steps"][name] for video in profile.draws["videos"]]
    settings = profile.calibration["settings"]
    both = settings["branches"] == "both" and profile.request["guidance"] > 1
    # The order of Plan.units().
    states = np.array(
        [
            weights[call, steps[i]]
            for call in range(1 + both)
            for i in range(max(map(len, drawn)))
            for steps in drawn
            if i < len(steps)
        ]
    )
    scale = np.sqrt(states / states.mean()).repeat(settings["probes"])
    products = (expert.products * scale[:, None, None, None]).astype(np.float32)
    errors = np.square(products, dtype=np.float64).mean(0)
    changed = dataclasses.replace(expert, products=products, errors=errors)
    return profile.with_experts({name: changed}).with_budget(settings["budget"])


def compare_forms(gradient: CalibrationProfile, exact: CalibrationProfile) -> dict[str, Any]:
    """Rank correlation of the two forms' E over all heads and candidates, and the E for a plot."""
    from scipy.stats import spearmanr

    a, b = (profile.experts["transformer"].errors.ravel() for profile in (gradient, exact))
    return {
        "spearman": float(spearmanr(a, b).statistic),
        "gradient": [float(f"{x:.3g}") for x in a],
        "exact": [float(f"{x:.3g}") for x in b],
    }


def _devices(args: argparse.Namespace) -> list[str] | None:
    """A device for every worker process; None for a single worker, which is this process."""
    if args.workers == 1:
        return None
    if args.device == "cpu" or not torch.cuda.is_available():
        return ["cpu"] * args.workers
    devices = args.devices or [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return [devices[i % len(devices)] for i in range(args.workers)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    parser.add_argument("--workers", type=int, default=1, help="processes; 1: this one alone")
    parser.add_argument("--devices", nargs="+", help="of the processes, in turn; default: all GPUs")
    parser.add_argument("--batch", type=int, help="videos generated together; default: 8 on a GPU, else 1")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="nothing is begun after so long; default: no limit",
    )
    parser.add_argument("--prompts", type=int, help="evaluation prompts")
    parser.add_argument("--seeds", type=int, help="seeds of each prompt")
    parser.add_argument("--shared", type=float, default=0.9, help="the shared threshold; default: 0.9")
    parser.add_argument("--candidates", type=float, nargs="+")
    parser.add_argument("--videos", type=int)
    parser.add_argument("--intervals", type=int)
    parser.add_argument("--branches", choices=("both", "conditional"))
    parser.add_argument("--probes", type=int)
    parser.add_argument("--tuning", type=int, help="videos that density is met on")
    parser.add_argument("--tuning-seed", type=int, default=31, help="seed of the first of them")
    parser.add_argument("--no-exact", action="store_true", help="leave the exact form out")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain squared error out")
    parser.add_argument("--no-svg2", action="store_true", help="leave the second host out")
    parser.add_argument("--no-times", action="store_true", help="for a machine that does other things too")
    for size in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{size}", type=int, help="default: what suits the model")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(arguments)
    for name, value in (SMALL if args.small else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch is None:
        args.batch = 1 if args.device == "cpu" or not torch.cuda.is_available() else 8
    return args


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
