"""Does every format draw the live backend's video? One video, live and from each artifact in a fresh process.

    python -m benchmarks.artifact_parity                                   # nano-wan: the demo's video
    python -m benchmarks.artifact_parity --formats torchscript --steps 4   # fewer steps, the same ratios
    python -m benchmarks.artifact_parity --json parity.json

The live side runs the rewritten graph uncompiled: it is what every compiler has to reproduce. A format is
exported, then loaded and run in a process of its own that has compiled nothing. Each row gives the relative
error of the final latents, ‖artifact − live‖ / ‖live‖, over all seeds the largest; whether a second run of
the same video in the same process was equal bit for bit; bytes on disk; and the seconds that exporting and
loading took. Density and refresh rate must be the live ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import haste_compile
from haste_compile.artifacts import FORMATS
from haste_compile.config import parse_options
from haste_compile.errors import HasteError
from haste_compile.generation import Request, complete_options, default_request
from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline, pick_device, shown_path

#: The largest relative error of the latents that counts as the same video.
TOLERANCES = {"torchscript": 1e-4, "aoti": 1e-4, "onnx": 1e-3, "tensorrt": 1e-3}
#: Left out on the CPU unless asked for.
ON_GPUS_ONLY = {"tensorrt"}
#: Main file of each format; the others take any name.
SUFFIXES = {"aoti": ".pt2", "onnx": ".onnx"}


def draw(pipe: Any, request: Request) -> Tensor:
    """The final latents of one video, on the CPU."""
    latents = pipe(
        request.prompt,
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),
        output_type="latent",
    ).frames
    return latents.cpu()


def figures(statistics: Any) -> dict[str, float]:
    return {"density": statistics.density, "refresh_rate": statistics.refresh_rate}


def run_artifact(path: Path, model: str, device: str, request: Request, out: Path) -> None:
    """What the fresh process does: load, draw the video twice, write latents and figures."""
    target = pick_device(device)
    pipe = load_pipeline(model, device=target, dtype=default_dtype(target))
    started = time.perf_counter()
    runner = haste_compile.load(path, trust=True, device=device)
    seconds = time.perf_counter() - started
    pipe.transformer = runner
    first = draw(pipe, request)
    found = figures(runner.statistics())
    again = draw(pipe, request)
    torch.save({"latents": first, "repeats": torch.equal(first, again), "load_s": seconds, **found}, out)


def compare(args: argparse.Namespace, request: Request, options: dict[str, Any]) -> list[dict[str, Any]]:
    device = pick_device(args.device)
    pipe = load_pipeline(args.model, device=device, dtype=default_dtype(device))
    requests = [dataclasses.replace(request, seed=seed) for seed in args.seeds]
    references, expected = [], {}
    for one in requests:
        with haste_compile.optimize(pipe, **{**options, "inner": "eager"}) as handle:
            references.append(draw(pipe, one))
            expected[one.seed] = figures(handle.statistics()["transformer"])
        torch._dynamo.reset()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for format in args.formats:
            path = Path(folder) / f"model{SUFFIXES.get(format, '.' + format)}"
            started = time.perf_counter()
            manifest = haste_compile.export(
                pipe, path, format=format, height=request.height, width=request.width,
                num_frames=request.frames, **options,
            )  # fmt: skip
            export_s = time.perf_counter() - started
            results = [_in_a_fresh_process(path, args, one) for one in requests]
            errors = [
                float((found["latents"] - reference).norm() / reference.norm())
                for found, reference in zip(results, references, strict=True)
            ]
            rows.append(
                {
                    "format": format,
                    "relative_error": max(errors),
                    "tolerance": TOLERANCES[format],
                    "repeats": all(found["repeats"] for found in results),
                    "same_masks": all(
                        all(abs(found[name] - value) < 1e-3 for name, value in expected[one.seed].items())
                        for one, found in zip(requests, results, strict=True)
                    ),
                    "bytes": sum(int(file["bytes"]) for file in manifest.files.values()),
                    "export_s": export_s,
                    "load_s": max(found["load_s"] for found in results),
                    "steps": request.steps,
                    **expected[requests[0].seed],
                    "artifact_density": results[0]["density"],
                }
            )
            print(line(rows[-1]), flush=True)
    return rows


def _in_a_fresh_process(path: Path, args: argparse.Namespace, request: Request) -> dict[str, Any]:
    out = path.with_name("result.pt")
    job = {"path": str(path), "model": str(args.model), "device": args.device, "out": str(out)}
    job["request"] = dataclasses.asdict(dataclasses.replace(request, image=None))
    subprocess.run(
        [sys.executable, "-m", "benchmarks.artifact_parity", "--job", json.dumps(job)],
        check=True,
        cwd=Path(__file__).parents[1],
    )
    return torch.load(out)


HEADER = f"{'format':<12} {'error':>9} {'repeats':>8} {'masks':>6} {'MB':>7} {'export s':>9} {'load s':>7}"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['format']:<12} {row['relative_error']:9.1e} {row['repeats']!s:>8} {row['same_masks']!s:>6} "
        f"{row['bytes'] / 1e6:7.1f} {row['export_s']:9.1f} {row['load_s']:7.2f}"
    )


def good(row: dict[str, Any]) -> bool:
    return row["relative_error"] <= row["tolerance"] and row["repeats"] and row["same_masks"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(NANO_WAN))
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt")
    for name in ("steps", "height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("-o", "--option", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.job is not None:
        job = json.loads(args.job)
        run_artifact(
            Path(job["path"]), job["model"], job["device"], Request(**job["request"]), Path(job["out"])
        )
        return 0
    given = {
        n: getattr(args, n) for n in ("prompt", "steps", "height", "width", "frames") if getattr(args, n)
    }
    args.formats = args.formats or [x for x in FORMATS if args.device != "cpu" or x not in ON_GPUS_ONLY]
    try:
        request = dataclasses.replace(default_request(args.model), **given)
        options = complete_options(args.model, parse_options(args.option))
        print(
            f"torch {torch.__version__}, {args.device}, {request.steps} steps, seeds {args.seeds}\n{HEADER}"
        )
        rows = compare(args, request, options)
    except HasteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        shown = {name: shown_path(value) if name == "profile" else value for name, value in options.items()}
        record = {"torch": torch.__version__, "device": args.device, "seeds": args.seeds, "rows": rows}
        args.json.write_text(json.dumps({**record, "options": shown}, indent=1) + "\n")
    return 0 if all(map(good, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
