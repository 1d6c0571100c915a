"""A simple, rule-based reader of clips: which colours are there, in what shape, moving which way.

It knows nothing about the model: hue thresholds find each colour, the overlap with three ideal outlines of
the same area names the shape, and the path of the centroid names the direction.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from examples.nano_wan.render import COLOURS, DIRECTIONS, RGB, SHAPES, signed_distance

MIN_CHROMA = 0.28  # of 1; backgrounds stay below 0.15, objects lie above 0.5
MAX_HUE_ERROR = 24.0  # degrees; the nearest two colours are 47 degrees apart
MIN_AREA = 450.0  # pixels; the smallest object rendered covers about 930
MIN_PRESENCE = 0.6  # share of frames in which an object must be seen
MIN_TRAVEL = 10.0  # pixels between the first and the last third of the clip
MIN_STRAIGHTNESS = 1.5  # travel along the main axis against travel across it
MIN_OVERLAP = 0.6  # IoU with the best ideal outline


@dataclass(frozen=True)
class Finding:
    """One coloured object; ``shape`` or ``direction`` is None where the clip does not say clearly."""

    colour: str
    shape: str | None
    direction: str | None


def hue_and_chroma(video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Hue in degrees and chroma in 0..1: [frames, height, width], of RGB [frames, 3, height, width]."""
    r, g, b = video.unbind(1)
    top, bottom = video.amax(1), video.amin(1)
    chroma = top - bottom
    safe = chroma.clamp_min(1e-6)
    hue = torch.where(top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    return hue * 60 % 360, chroma


def shape_of(masks: torch.Tensor) -> str | None:
    """The shape whose outline, of equal centroid and area, overlaps the masks [m, height, width] best."""
    area = masks.sum((1, 2))
    height, width = masks.shape[1:]
    y = torch.arange(height, device=masks.device).float()[:, None] + 0.5
    x = torch.arange(width, device=masks.device).float() + 0.5
    dx = x - ((masks * x).sum((1, 2)) / area)[:, None, None]
    dy = y - ((masks * y).sum((1, 2)) / area)[:, None, None]
    overlaps = []
    for index, shape in enumerate(SHAPES):
        unit_area = {"circle": math.pi, "square": math.pi, "triangle": 3 * math.sqrt(3) * 0.68**2}[shape]
        radius = (area / unit_area).sqrt()[:, None, None]
        ideal = signed_distance(torch.tensor(index, device=masks.device), dx, dy, radius) < 0
        both, either = (ideal & (masks > 0)).sum((1, 2)), (ideal | (masks > 0)).sum((1, 2))
        overlaps.append((both / either).median())
    best = int(torch.stack(overlaps).argmax())
    return SHAPES[best] if float(overlaps[best]) >= MIN_OVERLAP else None


def direction_of(path: torch.Tensor) -> str | None:
    """Direction of a centroid path [m, 2] of (x, y) pixels, or None if it is short or crooked."""
    third = max(1, len(path) // 3)
    dx, dy = (path[-third:].mean(0) - path[:third].mean(0)).tolist()
    along, across = max(abs(dx), abs(dy)), min(abs(dx), abs(dy))
    if along < MIN_TRAVEL or along < MIN_STRAIGHTNESS * across:
        return None
    if abs(dx) > abs(dy):
        return DIRECTIONS[0] if dx < 0 else DIRECTIONS[1]
    return DIRECTIONS[2] if dy < 0 else DIRECTIONS[3]


def detect(video: torch.Tensor) -> list[Finding]:
    """Objects seen in one clip [3, frames, height, width] in -1..1, at most one for each colour."""
    clip = (video.float().transpose(0, 1) + 1) / 2
    hue, chroma = hue_and_chroma(clip)
    wanted, _ = hue_and_chroma(RGB.to(clip.device)[:, :, None, None])
    error = (hue[:, None] - wanted.reshape(1, -1, 1, 1) + 180) % 360 - 180
    masks = ((error.abs() < MAX_HUE_ERROR) & (chroma > MIN_CHROMA)[:, None]).float()
    masks = (F.avg_pool2d(masks, 5, 1, 2) > 0.5).float()  # a majority vote drops specks and fringes
    height, width = masks.shape[-2:]
    x = torch.arange(width, device=masks.device).float() + 0.5
    y = torch.arange(height, device=masks.device).float() + 0.5
    area = masks.sum((2, 3))  # [frames, colours]
    centre = (
        torch.stack([(masks.sum(2) * x).sum(-1), (masks.sum(3) * y).sum(-1)], -1)
        / area.clamp_min(1)[..., None]
    )
    findings = []
    for index, colour in enumerate(COLOURS):
        seen = area[:, index] >= MIN_AREA
        if float(seen.float().mean()) < MIN_PRESENCE:
            continue
        shape = shape_of(masks[seen, index])
        findings.append(Finding(colour, shape, direction_of(centre[seen, index])))
    return findings


@dataclass(frozen=True)
class Verdict:
    """How a clip compares with what was asked for: a bool for each object, and any other colour seen."""

    objects: tuple[bool, ...]
    extra: bool

    @property
    def clip(self) -> bool:
        """True if every object asked for was found with its colour, shape and direction."""
        return all(self.objects)


def judge(video: torch.Tensor, asked: Sequence[tuple[str, str, str]]) -> Verdict:
    """Compare a clip [3, frames, height, width] in -1..1 with (colour, shape, direction) objects."""
    findings = detect(video)
    seen = {(f.colour, f.shape, f.direction) for f in findings}
    colours = {colour for colour, _, _ in asked}
    return Verdict(tuple(item in seen for item in asked), any(f.colour not in colours for f in findings))
