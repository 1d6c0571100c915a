"""What calibration tests share: the smallest calibration that has everything, on the tiny pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import tiny_wan

import haste_compile
from haste_compile.generation import Request

PROMPTS = ("a red circle moves left", "a blue square moves up", "a green triangle moves down")
REQUEST = Request(
    prompt="", steps=5, guidance=3.0, height=tiny_wan.HEIGHT, width=tiny_wan.WIDTH, frames=tiny_wan.FRAMES
)
OPTIONS: dict[str, Any] = {"block_size": 64, "min_tokens": 64, "stride": 8, "dense_steps": 1}
#: The cheapest calibration that has everything: three candidates, two steps of one video.
SMALL: dict[str, Any] = {
    "candidates": (0.3, 0.6, 0.9),
    "budget": "shared:0.6",
    "videos": 1,
    "intervals": 2,
    "probes": 4,
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """A pipeline, its profile and the folder it was saved in."""

    pipe: Any
    profile: haste_compile.CalibrationProfile
    folder: Path
