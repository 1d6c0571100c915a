"""Is an AOTInductor artifact as fast as the live backend? Wan 2.1 1.3B's geometry, random weights, on a GPU.

    python -m benchmarks.artifact_speed --layers 8       # first: compiles in minutes
    python -m benchmarks.artifact_speed                  # all 30 layers
    python -m benchmarks.artifact_speed --json speed.json

Queries and keys are scaled so that heads choose; the weights are random, so this says nothing of quality.
Both sides run the same calls, one after the other, in one process: forwards with falling timesteps over
slowly changing latents, so that masks are built and reused. Times count only if the artifact's outputs agreed
with the live ones. Medians in milliseconds; spread is half the range over the median of the live side.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import haste_compile
from haste_compile.errors import HasteError
from haste_compile.explanation import TEXT_TOKENS, VAE_SCALES
from haste_compile.loading import import_optional, pick_device

#: Largest relative error between the two sides' outputs in bfloat16 that lets them be timed.
TOLERANCE = 2e-2
WARM_UP, TIMED = 3, 7


def build(layers: int, device: torch.device) -> Any:
    """Wan 2.1 1.3B with random weights, in bfloat16; fewer ``layers`` compile faster."""
    wan = import_optional("diffusers", extra="demo").WanTransformer3DModel
    torch.manual_seed(0)
    with device:
        model = wan(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=layers)
    for name, parameter in model.named_parameters():
        if "attn1.norm_q" in name or "attn1.norm_k" in name:
            parameter.data.mul_(2.0)
    return model.to(torch.bfloat16).eval()


def calls(model: Any, size: tuple[int, int, int], device: torch.device) -> list[dict[str, Any]]:
    """One video's calls of one branch, each with slightly other latents and a lower timestep."""
    frames, height, width = size
    latent = ((frames - 1) // VAE_SCALES[0] + 1, height // VAE_SCALES[1], width // VAE_SCALES[1])
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    text, latents = (
        normal(1, TEXT_TOKENS, model.config.text_dim),
        normal(1, model.config.in_channels, *latent),
    )
    made = []
    for step in range(WARM_UP + TIMED):
        latents = latents + 0.05 * normal(*latents.shape)
        timestep = torch.full((1,), 1000.0 - 20 * step, device=device)
        made.append(
            {
                "hidden_states": latents,
                "timestep": timestep,
                "encoder_hidden_states": text,
                "return_dict": False,
            }
        )
    return made


def timed(forward: Callable[[], tuple[Tensor]]) -> tuple[float, Tensor]:
    """Milliseconds of one forward by the host's clock, and its sample."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    (output,) = forward()
    torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - started), output


def summary(times: dict[str, list[float]]) -> dict[str, float]:
    live, artifact = (statistics.median(times[side]) for side in ("live", "artifact"))
    spread = (max(times["live"]) - min(times["live"])) / 2 / live
    return {"live_ms": live, "artifact_ms": artifact, "ratio": artifact / live, "spread": spread}


@torch.no_grad()
def measure(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    options = {"top_p": args.top_p, "delta": args.delta}
    size = {"height": args.height, "width": args.width, "num_frames": args.frames}
    model = build(args.layers, device)
    sequence = calls(model, (args.frames, args.height, args.width), device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan.pt2"
        started = time.perf_counter()
        manifest = haste_compile.export(model, path, format="aoti", **size, **options)
        export_s = time.perf_counter() - started
        started = time.perf_counter()
        runner = haste_compile.load(path, trust=True)
        load_s = time.perf_counter() - started
        live = torch.compile(model, backend="haste", dynamic=False, options=options)
        sides: dict[str, Any] = {"live": live, "artifact": runner}
        times: dict[str, list[float]] = {side: [] for side in sides}
        worst = 0.0
        for number, call in enumerate(sequence):
            outputs = {}
            order = list(sides) if number % 2 else list(reversed(sides))
            for side in order:
                spent, outputs[side] = timed(functools.partial(sides[side], **call))
                if number >= WARM_UP:
                    times[side].append(spent)
            error = (outputs["artifact"] - outputs["live"]).float().norm() / outputs["live"].float().norm()
            worst = max(worst, float(error))
        if worst > TOLERANCE:
            raise SystemExit(f"outputs differ by {worst:.1e}, more than {TOLERANCE:.0e}: nothing was timed")
        found = runner.statistics()
        return {
            "gpu": torch.cuda.get_device_name(device),
            "torch": torch.__version__,
            "layers": args.layers,
            "attention": manifest.extra.get("attention"),
            **size,
            **summary(times),
            "relative_error": worst,
            "density": found.density,
            "refresh_rate": found.refresh_rate,
            "bytes": sum(int(file["bytes"]) for file in manifest.files.values()),
            "export_s": export_s,
            "load_s": load_s,
        }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=30)
    for name, value in (("height", 480), ("width", 832), ("frames", 81)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--delta", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        record = measure(args, pick_device("cuda"))
    except HasteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(json.dumps(record, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
