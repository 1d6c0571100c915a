"""The backend alone: ``torch.compile(..., backend="haste")`` on a Wan transformer, without importing it.

    python examples/compile_transformer.py

Times a few denoising steps of the transformer with random text, dense and sparse, both compiled. Random text
shows that it works and what it costs, not how good the video is.
"""

from __future__ import annotations

import argparse
import json
import time

import torch
from diffusers import WanTransformer3DModel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--options", type=json.loads, default={}, help='JSON, such as {"top_p": 0.9}')
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    transformer = WanTransformer3DModel.from_pretrained(arguments.model, subfolder="transformer", dtype=dtype)
    transformer.to(device).eval()

    dense = torch.compile(transformer, dynamic=False)
    sparse = torch.compile(transformer, backend="haste", options=arguments.options, dynamic=False)
    for name, model in (("dense", dense), ("haste", sparse)):
        seconds = denoise(model, transformer.config, arguments, device, dtype)
        print(f"{name}: first step {seconds[0]:.2f} s, later steps {min(seconds[1:]):.3f} s")


@torch.no_grad()
def denoise(model, config, arguments, device, dtype) -> list[float]:
    """Euler steps of flow matching from noise; returns the seconds of each step."""
    generator = torch.Generator().manual_seed(0)
    shape = ((arguments.frames - 1) // 4 + 1, arguments.height // 8, arguments.width // 8)
    latents = torch.randn(1, config.in_channels, *shape, generator=generator).to(device, dtype)
    text = torch.randn(1, 512, config.text_dim, generator=generator).to(device, dtype)
    sigmas = torch.linspace(1.0, 0.0, arguments.steps + 1)
    seconds = []
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        started = time.perf_counter()
        timestep = torch.full((1,), 1000.0 * float(now), device=device)
        velocity = model(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
        latents = latents + float(after - now) * velocity.to(dtype)
        latents.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
