"""How long a calibration of a full-size Wan takes, from times of the model with random weights.

    python -m benchmarks.calibration_cost --model 1.3b --json cost-1.3b.json
    python -m benchmarks.calibration_cost --model 14b --height 480 --width 832 --json cost-14b.json
    python -m benchmarks.calibration_cost --model 14b --blocks 4 --json cost-14b-720p.json

The transformer is made at random on the device, in bfloat16. Weights change no time but that of sparse
attention: random ones give nearly uniform attention, whose masks skip little, so that part is an upper bound.
One forward, one run of every block under autograd, one probe's way back and one sparse attention at every
site are timed, each after a first call; the plans of the default settings in both forms then say how often
each happens. The result is an *estimate*: the parts were run, the calibration was not. Memory is what the
parts needed at most; 14B at 720p wants more than 80 GB. ``--blocks`` times a model of so many blocks and
takes the others to cost the same; embeddings and head, little beside them, are scaled along.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibration_bench import environment
from haste_compile.calibration.cost import Seconds, estimate, time_transformer
from haste_compile.calibration.plan import make_plan
from haste_compile.calibration.run import make_settings
from haste_compile.config import HasteConfig
from haste_compile.errors import HasteError
from haste_compile.generation import Request
from haste_compile.loading import default_dtype, pick_device

#: Layers, heads, feed-forward width; and the video that the model is usually asked for: height, width.
MODELS: dict[str, tuple[int, int, int, int, int]] = {
    "1.3b": (30, 12, 8960, 480, 832),
    "14b": (40, 40, 13824, 720, 1280),
    "tiny": (2, 2, 256, 128, 128),
}
HEAD_DIM, TEXT_DIM, LATENT_CHANNELS = 128, 4096, 16
_PROMPTS = tuple(f"prompt {i}" for i in range(12))


def random_pipeline(name: str, device: torch.device, blocks: int | None = None) -> Any:
    """What a plan and the timing need of a pipeline: a transformer of that size, and Wan's scheduler."""
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    layers, heads, width, _, _ = MODELS[name]
    dtype = default_dtype(device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            transformer = WanTransformer3DModel(
                num_layers=blocks or layers,
                num_attention_heads=heads,
                attention_head_dim=HEAD_DIM,
                ffn_dim=width,
                in_channels=LATENT_CHANNELS,
                out_channels=LATENT_CHANNELS,
                text_dim=TEXT_DIM,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
            )
    finally:
        torch.set_default_dtype(before)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
    )
    config = types.SimpleNamespace(boundary_ratio=None)
    return types.SimpleNamespace(transformer=transformer.eval(), scheduler=scheduler, config=config)


def measure(
    name: str, request: Request, options: dict[str, Any], device: torch.device, blocks: int | None = None
) -> dict[str, Any]:
    """Times of the parts, and the estimates of both forms."""
    layers = MODELS[name][0]
    pipe = random_pipeline(name, device, blocks)
    config = HasteConfig.from_options(options)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timed = dataclasses.asdict(time_transformer(pipe.transformer, request, config))
    seconds = Seconds(**{part: value * layers / (blocks or layers) for part, value in timed.items()})
    whole = random_pipeline(name, torch.device("meta"))
    plans = {
        method: make_plan(whole, _PROMPTS, request, config, make_settings(method=method, held_out=2))
        for method in ("gradient", "exact")
    }
    costs = {method: estimate(plan, {"transformer": seconds}).to_dict() for method, plan in plans.items()}
    return {
        "model": name,
        "weights": "random",
        "blocks": {"model": layers, "timed": blocks or layers},
        **{size: getattr(request, size) for size in ("height", "width", "frames", "steps", "guidance")},
        **environment(pipe),
        "seconds": dataclasses.asdict(seconds),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "estimates": costs,
        "ratio": costs["exact"]["measuring"] / costs["gradient"]["measuring"],
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.calibration_cost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=6.0)
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--blocks", type=int, help="blocks that are timed; default: all of the model's")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    *_, height, width = MODELS[args.model]
    request = Request(
        prompt="",
        height=args.height or height,
        width=args.width or width,
        frames=args.frames,
        steps=args.steps,
        guidance=args.guidance,
    )
    options = {"block_size": args.block_size, "min_tokens": 0}
    found = measure(args.model, request, options, pick_device(args.device), args.blocks)
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in found["seconds"].items())
    print(f"{args.model}, {request.frames}×{request.height}×{request.width}, {found['device']}: {parts}")
    for method, cost in found["estimates"].items():
        whole, measuring = cost["seconds"] / 60, cost["measuring"] / 60
        print(f"  {method}: {whole:.1f} min in all, {measuring:.1f} min of it measuring")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
