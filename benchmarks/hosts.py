"""Compare the mask predictors at equal density: what each costs in quality on the same videos.

    python -m benchmarks.hosts                                 # nano-wan: the demo's prompt, two seeds
    python -m benchmarks.hosts --top-p 0.8 0.9 0.95 --deltas 4 --json hosts.json
    python -m benchmarks.hosts -o svg2:profile=svg2.json -o xattention:profile=xattention.json

Every video is generated dense, and then by each host for each top_p: with every mask rebuilt (``never``),
and with temporal mask reuse for each δ. An option goes to both hosts, or with ``HOST:`` before its name to
one, so that each can be given a profile of its own. Rows are those of ``benchmarks.drift_threshold``: density
and refresh rate, PSNR against dense, mean and worst, and seconds over dense.

One top_p means another density to each host. So PSNR is also given at densities that the curves of all hosts
reach, on straight lines between a curve's measured points. PSNR against the dense video mostly tells whether
sampling stayed in the same basin: read differences of a few dB over few videos as undecided.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.drift_threshold import HEADER, Row, measure
from haste_compile import doctor
from haste_compile.config import parse_options
from haste_compile.errors import HasteError, OptionError
from haste_compile.generation import default_options, default_request, generate
from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline, pick_device
from haste_compile.predictors import PREDICTORS


def at_equal_density(curves: dict[str, Sequence[Row]], points: int = 3) -> list[dict[str, float]]:
    """PSNR of every curve at ``points`` densities that all of them reach; none where they do not overlap.

    Args:
        curves: host -> its rows, in any order.

    Returns:
        One entry a density: "density", and mean PSNR by host.
    """
    measured = {host: sorted((row.density, row.psnr_mean) for row in rows) for host, rows in curves.items()}
    low = max(curve[0][0] for curve in measured.values())
    high = min(curve[-1][0] for curve in measured.values())
    if low > high:
        return []
    return [
        {"density": float(density)}
        | {
            host: float(np.interp(density, *np.transpose(curve)))  # type: ignore[call-overload]
            for host, curve in measured.items()
        }
        for density in np.linspace(low, high, points)
    ]


def host_options(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Options of each host from NAME=VALUE and HOST:NAME=VALUE.

    Raises:
        OptionError: no such host, or not an option.
    """
    given: dict[str, list[str]] = {host: [] for host in PREDICTORS}
    for pair in pairs:
        host, colon, rest = pair.partition(":")
        if not colon or "=" in host:
            for options in given.values():
                options.append(pair)
        elif host in given:
            given[host].append(rest)
        else:
            raise OptionError(
                found=repr(host),
                wanted="one of " + ", ".join(map(repr, given)),
                where="--option HOST:NAME=VALUE",
                fix="Correct the host.",
            )
    return {host: parse_options(options) for host, options in given.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device=device, dtype=default_dtype(device))
    base = default_request(args.model)
    given = {name: getattr(args, name) for name in ("steps", "height", "width", "frames")}
    base = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    requests = [
        dataclasses.replace(base, prompt=prompt, seed=seed)
        for prompt in args.prompt or [base.prompt]
        for seed in args.seeds
    ]
    options = {host: default_options(args.model) | own for host, own in host_options(args.option).items()}
    references = [generate(pipe, request, lambda _step: None) for request in requests]
    seconds = statistics.median(run.seconds for run in references)
    _say(
        f"{len(requests)} videos, dense {seconds:.1f} s (median, {torch.get_num_threads()} threads, {device})"
    )

    rows: dict[str, dict[str, list[Row]]] = {}  # rule -> host -> one row for each top_p
    for host, own in options.items():
        _say(f"{host}: {own}\n{HEADER}")
        for top_p in args.top_p:
            for rule in ({"reuse": "never"}, *({"delta": delta} for delta in args.deltas)):
                found = measure(
                    pipe, requests, references, {**own, "predictor": host, "top_p": top_p, **rule}
                )
                name = "never" if found.delta is None else f"delta {found.delta:g}"
                rows.setdefault(name, {}).setdefault(host, []).append(found)
                _say(str(found))
    equal = {rule: at_equal_density(curves) for rule, curves in rows.items()}
    for rule, points in equal.items():
        _say(f"PSNR at equal density, {rule}:" + ("" if points else " the curves do not overlap"))
        for point in points:
            _say("  " + ", ".join(f"{name} {value:.3f}" for name, value in point.items()))
    if args.json:
        report = {
            "model": "nano-wan" if args.model == NANO_WAN else str(args.model),
            "requests": [{"prompt": r.prompt, "seed": r.seed} for r in requests],
            "steps": base.steps,
            "size": {"frames": base.frames, "height": base.height, "width": base.width},
            "options": {
                host: {name: value for name, value in own.items() if name not in ("top_p", "delta")}
                for host, own in options.items()
            },
            "device": doctor.device_name(device),
            "threads": torch.get_num_threads(),
            "versions": doctor.versions(),
            "rows": {
                rule: {host: [dataclasses.asdict(row) for row in found] for host, found in curves.items()}
                for rule, curves in rows.items()
            },
            "at_equal_density": equal,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=NANO_WAN, help="folder or hub id; default: nano-wan")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--prompt", action="append", help="repeatable; default: the demo's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--deltas", type=float, nargs="*", default=[4.0], help="of temporal mask reuse")
    parser.add_argument("-o", "--option", action="append", default=[], metavar="[HOST:]NAME=VALUE")
    for name in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int, help="default: what suits the model")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)  # a row takes a minute: it must not wait in a buffer


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
