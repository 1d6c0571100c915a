"""Everything that is drawn, and the list of work: fixed before anything is computed, from the seed alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any

from haste_compile.calibration.settings import Settings
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError
from haste_compile.generation import Request
from haste_compile.loading import find_transformers, repeated_blocks


@dataclasses.dataclass(frozen=True)
class Video:
    """A dense video: its prompt's place in the list given, its seed, and the steps measured, by expert."""

    prompt: int
    seed: int
    steps: dict[str, tuple[int, ...]]

    @property
    def needed_steps(self) -> int:
        """Denoising steps up to the last one measured; what follows tells calibration nothing."""
        return max(max(steps, default=-1) for steps in self.steps.values()) + 1


@dataclasses.dataclass(frozen=True)
class Unit:
    """One piece of work, stored as one file when it is done: a state, in the exact form one layer of it.

    Attributes:
        expert, video, step, call: which state; ``call`` 0 is the conditional branch, 1 the unconditional.
        layer: row of the tables, in the exact form.
    """

    expert: str
    video: int
    step: int
    call: int
    layer: int | None = None

    @property
    def state(self) -> str:
        return f"{self.expert}.{self.video}.{self.step}.{self.call}"

    @property
    def name(self) -> str:
        return f"unit-{self.state}" + ("" if self.layer is None else f".{self.layer}")


@dataclasses.dataclass(frozen=True)
class Expert:
    """What a transformer of the pipeline brings: rows of its tables and the steps it serves.

    Attributes:
        layers: blocks whose self-attention gets a threshold; ``dense_layers`` are left out.
        heads: H.
        steps: denoising steps it serves after the dense warm-up, ascending.
        assigned: in the exact form, the video of every layer and head.
    """

    layers: tuple[int, ...]
    heads: int
    steps: tuple[int, ...]
    assigned: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a calibration will do.

    Attributes:
        prompts: all that were given.
        held_out: videos for the comparison in the end; no prompt of theirs is among those of ``videos``.
    """

    settings: Settings
    config: HasteConfig
    request: Request
    prompts: tuple[str, ...]
    experts: dict[str, Expert]
    videos: tuple[Video, ...]
    held_out: tuple[Video, ...]

    @property
    def calls(self) -> tuple[int, ...]:
        """The transformer calls of a step that are measured."""
        both = self.settings.branches == "both" and self.request.guidance > 1
        return (0, 1) if both else (0,)

    def units(self) -> list[Unit]:
        """All work, in an order in which every prefix spreads over experts, intervals and heads."""
        rounds = max(len(steps) for video in self.videos for steps in video.steps.values())
        states = [
            Unit(name, v, video.steps[name][i], call)
            for call in self.calls
            for i in range(rounds)
            for v, video in enumerate(self.videos)
            for name in self.experts
            if i < len(video.steps[name])
        ]
        if self.settings.method == "gradient":
            return states
        return [
            dataclasses.replace(unit, layer=row)
            for unit in states
            for row, videos in enumerate(self.experts[unit.expert].assigned)
            if unit.video in videos
        ]

    def video_request(self, video: Video) -> Request:
        return dataclasses.replace(self.request, prompt=self.prompts[video.prompt], seed=video.seed)

    def prompts_digest(self) -> str:
        return hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """As plain data: what a journal is recognised by."""
        plain = dataclasses.asdict(self)
        plain["config"] = self.config.to_options()
        plain["request"]["image"] = None if self.request.image is None else str(self.request.image)
        return json.loads(json.dumps(plain))


def make_plan(
    pipe: Any, prompts: Sequence[str], request: Request, config: HasteConfig, settings: Settings
) -> Plan:
    """Draw videos, steps and the heads' prompts.

    Args:
        pipe: the pipeline; its transformers and scheduler are looked at, nothing runs.
        prompts: the pool.
        request: size, steps and guidance of every video.

    Raises:
        OptionError: too few prompts, or no step to measure.
    """
    # A sixth is set aside whether it is compared or not, so that the comparison changes no draw.
    reserved = max(settings.held_out, len(prompts) // 6)
    count = settings.video_count(len(prompts) - reserved)
    if len(prompts) - reserved < 1 or any(not prompt.strip() for prompt in prompts):
        raise OptionError(
            found=f"{len(prompts)} prompts, {settings.held_out} of them held out",
            wanted="at least one prompt to calibrate with, and none empty",
            where="option prompts",
            fix="Give more prompts, one a line.",
        )
    served = served_steps(pipe, request)
    shuffled = random.Random(f"{settings.seed}/prompts").sample(range(len(prompts)), len(prompts))
    apart, pool = shuffled[: settings.held_out], shuffled[reserved:]
    measured = {name: tuple(s for s in steps if s >= config.dense_steps) for name, steps in served.items()}
    videos = tuple(
        Video(
            prompt=pool[i % len(pool)],
            seed=_seed(settings, "video", i),
            steps={
                name: _draw_steps(settings, request.steps, name, i, steps) for name, steps in measured.items()
            },
        )
        for i in range(count)
    )
    return Plan(
        settings=settings,
        config=config,
        request=request,
        prompts=tuple(prompts),
        experts={
            name: _expert(name, transformer, measured[name], config, settings, count)
            for name, transformer in find_transformers(pipe).items()
        },
        videos=videos,
        held_out=tuple(Video(p, _seed(settings, "held out", i), {}) for i, p in enumerate(apart)),
    )


def served_steps(pipe: Any, request: Request) -> dict[str, tuple[int, ...]]:
    """The denoising steps that each transformer serves: Wan 2.2 hands over at its boundary.

    Raises:
        OptionError: a transformer that serves none.
    """
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(request.steps)
    times = scheduler.timesteps.tolist()
    names = list(find_transformers(pipe))
    ratio = getattr(pipe.config, "boundary_ratio", None)
    if len(names) == 1 or ratio is None:
        return {names[0]: tuple(range(request.steps))}
    boundary = ratio * scheduler.config.num_train_timesteps
    served = {
        names[0]: tuple(i for i, t in enumerate(times) if t >= boundary),
        names[1]: tuple(i for i, t in enumerate(times) if t < boundary),
    }
    for name, steps in served.items():
        if not steps:
            raise OptionError(
                found=f"{request.steps} steps, none of which {name} serves",
                wanted="work for every transformer",
                where="option steps",
                fix="Ask for more steps.",
            )
    return served


def interval_bounds(settings: Settings, steps: int) -> tuple[tuple[int, int], ...]:
    """First and last step of each interval; four of 50 steps are [0,11] [12,24] [25,36] [37,49] (HASTE)."""
    if isinstance(settings.intervals, tuple):
        return settings.intervals
    n = settings.intervals
    edges = [i * steps // n for i in range(n + 1)]
    return tuple((a, b - 1) for a, b in zip(edges, edges[1:], strict=False) if b > a)


def _draw_steps(
    settings: Settings, total: int, name: str, video: int, served: tuple[int, ...]
) -> tuple[int, ...]:
    """One step from each interval: of all steps with one expert, else of those that the expert serves."""
    if len(served) == total or isinstance(settings.intervals, tuple):
        pools = [[s for s in served if a <= s <= b] for a, b in interval_bounds(settings, total)]
    else:
        pools = [list(served[a : b + 1]) for a, b in interval_bounds(settings, len(served))]
    generator = random.Random(f"{settings.seed}/steps/{name}/{video}")
    drawn = tuple(generator.choice(pool) for pool in pools if pool)
    if not drawn:
        raise OptionError(
            found=f"no step of {name} in the intervals",
            wanted="at least one step that is not a dense warm-up step",
            where="option intervals",
            fix="Ask for more steps, fewer dense steps or other intervals.",
        )
    return drawn


def _expert(
    name: str, transformer: Any, steps: tuple[int, ...], config: HasteConfig, settings: Settings, videos: int
) -> Expert:
    blocks = len(repeated_blocks(transformer, f"calibration, {name}"))
    layers = tuple(i for i in range(blocks) if i not in config.dense_layers)
    heads = int(transformer.config.num_attention_heads)
    generator = random.Random(f"{settings.seed}/heads/{name}")
    assigned = tuple(tuple(generator.randrange(videos) for _ in range(heads)) for _ in layers)
    return Expert(layers, heads, steps, assigned if settings.method == "exact" else ())


def _seed(settings: Settings, what: str, index: int) -> int:
    return random.Random(f"{settings.seed}/{what}/{index}").randrange(2**31)
