"""What the tests of artifacts share: a tiny transformer, the options it is exported with, and a sampler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_wan
import torch
from torch import Tensor

import haste_compile
from haste_compile.artifacts import Manifest

SIZE = {"height": tiny_wan.HEIGHT, "width": tiny_wan.WIDTH, "num_frames": tiny_wan.FRAMES}
#: Reuse is on and neither always nor never taken: the tiny model's drift lies around this value.
OPTIONS: dict[str, Any] = {
    "block_size": 64,
    "stride": 8,
    "min_tokens": 64,
    "top_p": 0.7,
    "delta": 10.0,
    "dense_steps": 1,
}
TEXT_TOKENS = 16


def export(format: str, path: Path, model: Any = None, **changes: Any) -> Manifest:
    """Export the tiny transformer, or ``model``; ``changes`` override size and options."""
    model = tiny_wan.build_transformer() if model is None else model
    return haste_compile.export(
        model, path, format=format, **{**SIZE, "text_tokens": TEXT_TOKENS, **OPTIONS, **changes}
    )


def live(**changes: Any) -> Any:
    """The tiny transformer under the backend, uncompiled behind the passes: what artifacts have to equal."""
    torch._dynamo.reset()
    options = {**OPTIONS, "inner": "eager", **changes}
    return torch.compile(tiny_wan.build_transformer(), backend="haste", dynamic=False, options=options)


def inputs(prompt: int = 1, *, seed: int = 0, steps: int = 5) -> dict[str, Any]:
    """What a video is made of, by the names that ``examples/cpp_runner`` reads."""

    def embed(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        # Large, so that text moves the second block's queries and keys, and the branches' masks differ.
        return 4 * torch.randn(1, TEXT_TOKENS, tiny_wan.TEXT_DIM, generator=generator)

    return {
        "latents": torch.randn(1, 4, 5, 16, 16, generator=torch.Generator().manual_seed(seed)),
        "prompt": embed(prompt),
        "negative": embed(0),
        "sigmas": torch.linspace(1, 0, steps + 1),
        "guidance": 4.0,
    }


@torch.no_grad()
def denoise(
    model: Callable[..., Any], video: dict[str, Any], *, unconditional: Callable[..., Any] | None = None
) -> Tensor:
    """The loop of ``examples/cpp_runner``, operation by operation: Euler steps with guidance."""
    latents, sigmas = video["latents"], video["sigmas"]
    for i in range(len(sigmas) - 1):
        call = {
            "hidden_states": latents,
            "timestep": (1000 * sigmas[i]).expand(1).contiguous(),
            "return_dict": False,
        }
        velocity = model(encoder_hidden_states=video["prompt"], **call)[0]
        empty = (unconditional or model)(encoder_hidden_states=video["negative"], **call)[0]
        velocity = empty + video["guidance"] * (velocity - empty)
        latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
    return latents


def relative_error(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((a.double() - b.double()).norm() / b.double().norm())
