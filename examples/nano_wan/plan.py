"""What nano-wan is trained on, for how long and how fast: all figures of the training in one place."""

from dataclasses import dataclass

from examples.nano_wan.model import FLOW_SHIFT
from examples.nano_wan.render import FULL, SMALL, Canvas

SEED = 20260
LOG_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """One transformer stage: what it trains on, for how long (seconds over all calls), and how fast."""

    name: str
    canvas: Canvas
    seconds: float
    batch: int
    objects: tuple[float, float, float]  # odds of one, two, three objects
    pool: int  # clips rendered and encoded at its start, fewer if pool_seconds run out
    pool_seconds: float
    learning_rate: float
    final_rate: float  # as a share of learning_rate
    shift: float = FLOW_SHIFT  # of the noise levels; a high one dwells where layout and movement are decided


@dataclass(frozen=True)
class Plan:
    vae_seconds: float
    long_vae_seconds: float  # at the end, on clips of full length
    phrase_steps: int  # of the text encoder alone, before all else
    vae_batch: int
    vae_learning_rate: float
    stages: tuple[Stage, ...]
    encode_batch: int  # full clips at once
    reserve: float  # seconds kept for saving and evaluation
    vae_clips: int
    compile: bool


PLAN = Plan(
    vae_seconds=140,
    long_vae_seconds=84,
    phrase_steps=1500,
    vae_batch=32,
    vae_learning_rate=4e-3,
    stages=(
        Stage("small", SMALL, 240, 256, (0.3, 0.4, 0.3), 60_000, 40, 2.5e-3, 0.3, shift=5.0),
        Stage("full", FULL, 700, 48, (0.2, 0.5, 0.3), 8_000, 33, 1.5e-3, 0.0, shift=6.0),
        Stage("finish", FULL, 170, 48, (0.2, 0.5, 0.3), 8_000, 33, 7e-4, 0.0, shift=6.0),
    ),
    encode_batch=16,
    reserve=115,
    vae_clips=16,
    compile=True,
)

SMOKE = Plan(
    vae_seconds=20,
    long_vae_seconds=10,
    phrase_steps=4,
    vae_batch=2,
    vae_learning_rate=1.5e-3,
    stages=(
        Stage("small", Canvas(9, 64, (10.0, 14.0)), 24, 4, (0.5, 0.5, 0.0), 16, 8, 1e-3, 0.3),
        Stage("full", Canvas(9, 64, (10.0, 14.0)), 24, 2, (0.3, 0.5, 0.2), 8, 5, 1e-3, 0.0),
    ),
    encode_batch=2,
    reserve=15,
    vae_clips=1,
    compile=False,
)
