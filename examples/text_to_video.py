"""Text to video with Wan 2.1 and ``haste_compile.optimize``: two lines more than without.

    python examples/text_to_video.py --prompt "A cat walks on the grass, realistic" --out cat.mp4

Any WanPipeline folder does; sizes and steps default to what Wan2.1-T2V-1.3B was made for.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from diffusers import WanPipeline

import haste_compile
from haste_compile.evaluation.video import write_mp4


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--prompt", default="A cat walks on the grass, realistic")
    parser.add_argument("--out", type=Path, default=Path("video.mp4"))
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default={}, help='JSON, such as {"top_p": 0.9}')
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"default": torch.bfloat16 if device == "cuda" else torch.float32, "vae": torch.float32}
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=dtype).to(device)

    with haste_compile.optimize(pipe, **arguments.options) as handle:
        video = pipe(
            arguments.prompt,
            height=arguments.height,
            width=arguments.width,
            num_frames=arguments.frames,
            num_inference_steps=arguments.steps,
            generator=torch.Generator().manual_seed(arguments.seed),
        ).frames[0]
        print(handle.summary())
    write_mp4(arguments.out, video, fps=16)


if __name__ == "__main__":
    main()
