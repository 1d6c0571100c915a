"""Training clips: coloured shapes that move over drifting, low-saturation textures, with their captions.

Everything random is drawn from explicit generators. Scenes (what is in a clip) are tensors of small integers,
so that a hundred thousand of them cost nothing; pixels are drawn in batches on whichever device is asked for.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("left", "right", "up", "down")
MAX_OBJECTS = 3

RGB = torch.tensor(
    [
        [0.90, 0.12, 0.12],
        [0.10, 0.70, 0.20],
        [0.12, 0.25, 0.92],
        [0.95, 0.85, 0.10],
        [0.70, 0.15, 0.85],
        [0.08, 0.80, 0.85],
    ]
)
UNIT = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])  # (x, y), y grows downwards

# Sizes relative to an object's radius: a square of the circle's area, and an equilateral triangle, point up,
# small enough (0.77 of the circle's area) that its apex needs no more room than MARGIN.
SQUARE_HALF_SIDE = math.sqrt(math.pi) / 2
TRIANGLE_INRADIUS = 0.68
MARGIN = 1.4

# Objects that never occur in a training clip, alone or with others: (colour, shape, direction).
RESERVED_OBJECTS = (
    ("red", "triangle", "up"),
    ("green", "circle", "left"),
    ("blue", "square", "right"),
    ("yellow", "circle", "down"),
    ("purple", "square", "up"),
    ("cyan", "triangle", "left"),
)


@dataclass(frozen=True)
class Canvas:
    """Frames and square pixel size of a clip, with the radii (pixels) its objects may have."""

    frames: int
    size: int
    radius: tuple[float, float]


FULL = Canvas(frames=33, size=256, radius=(24.0, 34.0))
SMALL = Canvas(frames=17, size=128, radius=(20.0, 27.0))
SPEED = (2.4, 3.8)  # pixels per frame, the same on every canvas


@dataclass(frozen=True)
class Scenes:
    """What ``n`` clips show. ``count`` is int64 [n]; the others are int64 [n, 3], valid below ``count``."""

    count: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    direction: torch.Tensor

    def __len__(self) -> int:
        return self.count.numel()

    def __getitem__(self, index: torch.Tensor | slice) -> "Scenes":
        return Scenes(self.count[index], self.colour[index], self.shape[index], self.direction[index])

    def objects(self, clip: int) -> list[tuple[str, str, str]]:
        """The (colour, shape, direction) words of one clip, in drawing order."""
        rows = zip(
            self.colour[clip].tolist(), self.shape[clip].tolist(), self.direction[clip].tolist(), strict=True
        )
        words = [(COLOURS[c], SHAPES[s], DIRECTIONS[d]) for c, s, d in rows]
        return words[: int(self.count[clip])]


def concatenate(parts: Sequence[Scenes]) -> Scenes:
    return Scenes(
        *(torch.cat([getattr(p, f) for p in parts]) for f in ("count", "colour", "shape", "direction"))
    )


def object_codes(scenes: Scenes) -> torch.Tensor:
    """One number per object, 0..71, and -1 where there is no object: int64 [n, 3]."""
    codes = (scenes.colour * len(SHAPES) + scenes.shape) * len(DIRECTIONS) + scenes.direction
    return codes.masked_fill(torch.arange(MAX_OBJECTS) >= scenes.count[:, None], -1)


def held_out(scenes: Scenes) -> torch.Tensor:
    """True for scenes that training must not see: bool [n].

    A scene is held out if it contains a reserved object, or if its set of objects (whatever their order)
    falls into the tenth of all sets that a fixed hash picks.
    """
    codes = object_codes(scenes)
    table = torch.tensor([hash_code(c) for c in range(72)] + [0])  # index -1 adds nothing
    reserved = torch.tensor(
        [
            (COLOURS.index(c) * len(SHAPES) + SHAPES.index(s)) * len(DIRECTIONS) + DIRECTIONS.index(d)
            for c, s, d in RESERVED_OBJECTS
        ]
    )
    return torch.isin(codes, reserved).any(1) | (table[codes].sum(1) % 10 == 0)


def hash_code(code: int) -> int:
    return (code * 2654435761 + 12345) % 1000003


def sample_scenes(
    n: int, weights: Sequence[float], generator: torch.Generator, *, unseen: bool = False
) -> Scenes:
    """Draw ``n`` scenes; ``weights`` are the odds of one, two and three objects.

    Colours differ within a scene. Training scenes (``unseen=False``) are never held out, unseen ones always.
    """
    odds = torch.tensor(weights, dtype=torch.float32)
    parts: list[Scenes] = []
    missing = n
    while missing > 0:
        batch = 16 * missing + 16 if unseen else 2 * missing + 16
        draw = Scenes(
            count=1 + torch.multinomial(odds, batch, replacement=True, generator=generator),
            colour=torch.rand(batch, len(COLOURS), generator=generator).argsort(1)[:, :MAX_OBJECTS],
            shape=torch.randint(len(SHAPES), (batch, MAX_OBJECTS), generator=generator),
            direction=torch.randint(len(DIRECTIONS), (batch, MAX_OBJECTS), generator=generator),
        )
        fit = draw[held_out(draw) == unseen][slice(0, missing)]
        parts.append(fit)
        missing -= len(fit)
    return concatenate(parts)


# --- captions

VERBS = (
    ("moves", "moving"),
    ("goes", "going"),
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("travels", "travelling"),
)
COLOUR_SYNONYMS = {
    "purple": ("magenta", "violet"),
    "cyan": ("turquoise",),
    "yellow": ("golden",),
    "red": ("crimson",),
}
SHAPE_SYNONYMS = {"circle": ("disc", "ball", "disk"), "square": ("box",)}
WHERE = {
    "left": ("left", "to the left", "leftwards", "leftward"),
    "right": ("right", "to the right", "rightwards", "rightward"),
    "up": ("up", "upwards", "upward", "to the top"),
    "down": ("down", "downwards", "downward", "to the bottom"),
}
# Words that no training caption has, so that everyday prompts do not turn into a row of unknowns.
EXTRA_WORDS = (
    "is",
    "are",
    "an",
    "it",
    "in",
    "on",
    "of",
    "with",
    "background",
    "textured",
    "video",
    "clip",
    "shape",
)


def plain_caption(objects: Sequence[tuple[str, str, str]]) -> str:
    """The canonical wording: "a red circle moves left, a blue square moves up"."""
    return ", ".join(f"a {colour} {shape} moves {direction}" for colour, shape, direction in objects)


def caption(objects: Sequence[tuple[str, str, str]], rng: random.Random) -> str:
    """One of many wordings of the same scene, the canonical one half of the time; objects are shuffled."""
    objects = rng.sample(list(objects), len(objects))
    if rng.random() < 0.5:
        return plain_caption(objects)
    phrases = []
    for colour, shape, direction in objects:
        colour = rng.choice((colour, colour, *COLOUR_SYNONYMS.get(colour, ())))
        shape = rng.choice((shape, shape, *SHAPE_SYNONYMS.get(shape, ())))
        verb = rng.choice(rng.choice(VERBS))
        article = rng.choice(("a", "a", "the", "one"))
        phrases.append(f"{article} {colour} {shape} {verb} {rng.choice(WHERE[direction])}")
    return rng.choice((", ", " and ", ", and ")).join(phrases)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted, with the extra words."""
    words = {",", ".", "and", "a", "the", "one", *COLOURS, *SHAPES, *EXTRA_WORDS}
    words.update(form for pair in VERBS for form in pair)
    for table in (COLOUR_SYNONYMS, SHAPE_SYNONYMS, WHERE):
        words.update(word for phrases in table.values() for phrase in phrases for word in phrase.split())
    return sorted(words)


# --- pixels


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _trajectories(
    scenes: Scenes, canvas: Canvas, generator: torch.Generator, tries: int = 12
) -> tuple[torch.Tensor, torch.Tensor]:
    """Radii [n, 3] and centres [n, 3, frames, 2] in pixels; of several tries the one that overlaps least."""
    n, device = len(scenes), generator.device
    unit = UNIT.to(device)[scenes.direction.to(device)]  # [n, 3, 2]
    radius = _uniform(*canvas.radius, (n, MAX_OBJECTS), generator)
    room = canvas.size - 2 * MARGIN * radius
    travel = torch.minimum(_uniform(*SPEED, (n, MAX_OBJECTS), generator) * (canvas.frames - 1), room)
    # The middle of the path lies so far from the border that both ends stay inside.
    half = 0.5 * travel[..., None] * unit.abs()
    slack = (room[..., None] * 0.5 - half).clamp_min(0)
    middle = canvas.size / 2 + slack[:, None] * _uniform(-1, 1, (n, tries, MAX_OBJECTS, 2), generator)
    phase = torch.linspace(-0.5, 0.5, 5, device=device)
    probe = middle[..., None, :] + (travel[..., None] * unit)[:, None, :, None] * phase[:, None]
    present = (torch.arange(MAX_OBJECTS) < scenes.count[:, None]).to(device)
    clash = torch.zeros(n, tries, device=device)
    for i in range(MAX_OBJECTS):
        for j in range(i):
            gap = (probe[:, :, i] - probe[:, :, j]).norm(dim=-1) - 1.2 * (radius[:, i] + radius[:, j])[
                :, None, None
            ]
            clash += (-gap).clamp_min(0).sum(-1) * (present[:, i] & present[:, j])[:, None]
    best = middle[torch.arange(n, device=device), clash.argmin(1)]  # [n, 3, 2]
    phase = torch.linspace(-0.5, 0.5, canvas.frames, device=device)
    return radius, best[:, :, None] + (travel[..., None] * unit)[:, :, None] * phase[:, None]


def signed_distance(
    shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor
) -> torch.Tensor:
    """Pixels from the outline, negative inside. ``shape`` indexes SHAPES; all arguments broadcast."""
    circle = torch.sqrt(x * x + y * y) - radius
    square = torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE * radius
    triangle = torch.maximum(y, 0.5 * (math.sqrt(3) * x.abs() - y)) - TRIANGLE_INRADIUS * radius
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def _background(n: int, canvas: Canvas, generator: torch.Generator, waves: int = 3) -> torch.Tensor:
    """Greyish sums of slow sine waves: [n, 3, frames, size, size] in 0..1."""
    device = generator.device
    axis = torch.arange(canvas.size, device=device, dtype=torch.float32)
    time = torch.arange(canvas.frames, device=device, dtype=torch.float32)
    video = _uniform(0.35, 0.7, (n, 1, 1, 1, 1), generator) + _uniform(
        -0.05, 0.05, (n, 3, 1, 1, 1), generator
    )
    video = video.expand(n, 3, canvas.frames, canvas.size, canvas.size).clone()
    for _ in range(waves):
        k = 2 * math.pi / _uniform(40, 160, (n, 1, 1, 1), generator)
        angle = _uniform(0, 2 * math.pi, (n, 1, 1, 1), generator)
        start = _uniform(0, 2 * math.pi, (n, 1, 1, 1), generator)
        drift = _uniform(-0.12, 0.12, (n, 1, 1, 1), generator)
        along = k * (angle.cos() * axis + angle.sin() * axis[:, None])
        wave = torch.sin(along + start + drift * time[:, None, None])
        # Much the same in all three channels, so that no texture is ever as saturated as an object.
        strength = _uniform(0.02, 0.06, (n, 1), generator) * _uniform(0.8, 1.2, (n, 3), generator)
        video.addcmul_(strength[:, :, None, None, None], wave[:, None])
    return video


def render(scenes: Scenes, canvas: Canvas, generator: torch.Generator) -> torch.Tensor:
    """Draw clips on the generator's device: float32 [n, 3, frames, size, size] in -1..1.

    Outlines are anti-aliased over one pixel, objects are softly shaded, later objects hide earlier ones.
    """
    n, device = len(scenes), generator.device
    video = _background(n, canvas, generator)
    radius, centres = _trajectories(scenes, canvas, generator)
    axis = torch.arange(canvas.size, device=device, dtype=torch.float32) + 0.5
    for i in range(MAX_OBJECTS):
        r = radius[:, i, None, None, None]
        x = axis - centres[:, i, :, 0, None, None]  # [n, frames, 1, size]
        y = axis[:, None] - centres[:, i, :, 1, None, None]
        shape = scenes.shape[:, i].to(device)[:, None, None, None]
        alpha = (0.5 - signed_distance(shape, x, y, r)).clamp(0, 1)
        alpha = alpha * (scenes.count > i).to(device)[:, None, None, None]
        tilt = _uniform(0, 2 * math.pi, (n, 1, 1, 1), generator)
        shade = 1 + 0.1 * (x * tilt.cos() + y * tilt.sin()) / r
        colour = RGB.to(device)[scenes.colour[:, i].to(device)]
        paint = colour[:, :, None, None, None] * shade[:, None]
        video = torch.lerp(video, paint, alpha[:, None])
    return video.clamp_(0, 1).mul_(2).sub_(1)
