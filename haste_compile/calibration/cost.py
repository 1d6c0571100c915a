"""What a calibration costs, told before it runs: counts from the plan, seconds from a few timed calls."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from haste_compile.calibration.intercept import Interception
from haste_compile.calibration.plan import Plan
from haste_compile.calibration.run import deterministic
from haste_compile.config import HasteConfig
from haste_compile.explanation import example_inputs
from haste_compile.generation import Request
from haste_compile.predictors import get_predictor

#: Blocks that the way back is timed through.
_TIMED_BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Measured times of one transformer at one video size.

    Attributes:
        forward: one dense forward.
        again: running every block once more under autograd, once for each state.
        backward: sending one probe back through every block.
        sparse: attending sparse at every site, for one candidate.
    """

    forward: float
    again: float
    backward: float
    sparse: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds by part of the work, and how often the transformer runs for it.

    Attributes:
        dense, measuring, held_out: seconds on one device.
        forwards: calls of the transformer for dense and held-out videos.
        units: states, in the exact form times layers.
        measured_forwards: forwards that measuring takes, partial ones by their share of the blocks.
        full_forwards: what it would take without answering the blocks before the probed one from a recording.
        backwards: backward passes.
    """

    dense: float
    measuring: float
    held_out: float
    forwards: int
    units: int
    measured_forwards: float
    full_forwards: float
    backwards: int

    @property
    def seconds(self) -> float:
        return self.dense + self.measuring + self.held_out

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "seconds": self.seconds}

    def __str__(self) -> str:
        saved = self.full_forwards - self.measured_forwards
        return "\n".join(
            [
                f"dense videos     {_minutes(self.dense)}",
                f"measuring        {_minutes(self.measuring)}, {self.units} units: "
                f"{self.measured_forwards:.0f} forwards, {self.backwards} backward passes",
                f"held-out videos  {_minutes(self.held_out)}",
                f"in all           {_minutes(self.seconds)} on one device",
                *([f"re-running from the probed layer saves {saved:.0f} forwards"] if saved >= 1 else []),
            ]
        )


def time_transformer(
    transformer: nn.Module, request: Request, config: HasteConfig, *, vae_scales: tuple[int, int] = (4, 8)
) -> Seconds:
    """Run one random state of that size, a second time after a first that compiles, and time its parts.

    Ways back are timed through the last blocks, as many as tell enough: a model's blocks are alike.

    Raises:
        OptionError, StateError: as ``Interception``.
    """
    latent = (
        (request.frames - 1) // vae_scales[0] + 1,
        request.height // vae_scales[1],
        request.width // vae_scales[1],
    )
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(x.shape, generator=generator).to(x) if isinstance(x, Tensor) and x.dim() > 1 else x
        for name, x in example_inputs(transformer, latent).items()
    }
    device = next(transformer.parameters()).device
    with deterministic(), Interception(transformer, config) as interception:
        output = interception.record(inputs, "first")
        clock = _Clock(device)
        interception.record(inputs, "second")
        forward = clock.lap()
        probes = [torch.randn(output.shape, generator=generator).to(output) for _ in range(2)]
        _send_back(interception, inputs, probes[:1], [], blocks=1)  # compiles: all blocks are one graph
        clock.lap()
        timed = min(_TIMED_BLOCKS, len(interception.blocks))
        _send_back(interception, inputs, probes[:1], [], blocks=timed)
        one = clock.lap()
        sparse: list[float] = []
        _send_back(interception, inputs, probes, [_time_sparse(config, clock, sparse)], blocks=timed)
        two = clock.lap() + clock.outside
        share = timed / len(interception.blocks)
    backward = max(two - one, 0.0)
    return Seconds(forward, max(one - backward, 0.0) / share, backward / share, sum(sparse) / share)


def estimate(plan: Plan, seconds: dict[str, Seconds]) -> Cost:
    """The cost of a plan.

    Args:
        seconds: of each expert.
    """
    settings = plan.settings
    branches = 2 if plan.request.guidance > 1 else 1
    candidates = len(settings.measured)
    mean_forward = sum(s.forward for s in seconds.values()) / len(seconds)
    video_forwards = plan.request.steps * branches
    dense_forwards = sum(video.needed_steps for video in plan.videos) * branches
    units = plan.units()
    measuring, forwards, full, backwards = 0.0, 0.0, 0.0, 0
    for unit in units:
        cost, expert = seconds[unit.expert], plan.experts[unit.expert]
        if unit.layer is None:
            ages = len(settings.ages) if settings.delta == "choose" else 0
            measuring += cost.forward + cost.again + settings.probes * cost.backward
            measuring += (candidates + ages) * cost.sparse
            forwards, full, backwards = forwards + 2, full + 2, backwards + settings.probes
        else:
            runs = candidates * expert.assigned[unit.layer].count(unit.video)
            share = 1 - expert.layers[unit.layer] / (expert.layers[-1] + 1)
            layers = len(expert.layers)
            measuring += (
                runs * share * cost.forward + candidates * cost.sparse / layers + cost.forward / layers
            )
            forwards, full = forwards + runs * share + 1 / layers, full + runs + 1 / layers
    return Cost(
        dense=dense_forwards * mean_forward,
        measuring=measuring,
        held_out=2 * len(plan.held_out) * video_forwards * mean_forward,
        forwards=dense_forwards + 2 * len(plan.held_out) * video_forwards,
        units=len(units),
        measured_forwards=forwards,
        full_forwards=full,
        backwards=backwards,
    )


Observe = Callable[[Tensor, Tensor, Tensor, Tensor], None]


def _send_back(
    interception: Interception,
    inputs: dict[str, Any],
    probes: list[Tensor],
    observers: list[Observe],
    *,
    blocks: int | None = None,
) -> None:
    """Send probes back through all blocks, or through so many of the last."""

    def observe(*tensors: Tensor) -> None:
        for observer in observers:
            observer(*tensors)

    gradients = interception.output_gradients(inputs, probes)
    for block in list(reversed(range(len(interception.blocks))))[:blocks]:
        _, gradients = interception.block_gradients(block, gradients, observe)


def _time_sparse(config: HasteConfig, clock: _Clock, into: list[float]) -> Observe:
    def observe(q: Tensor, k: Tensor, v: Tensor, _dense: Tensor) -> None:
        clock.pause()
        heads = torch.full((q.shape[1],), 0.9, device=q.device)
        predictor = get_predictor(config.predictor)
        if not into:  # kernels compile
            predictor.attend_once(q, k, v, heads, config)
            clock.lap()
        predictor.attend_once(q, k, v, heads, config)
        into.append(clock.lap())

    return observe


class _Clock:
    """Laps of a device's time; ``outside``: what was run before a ``pause`` since the last lap."""

    def __init__(self, device: torch.device) -> None:
        self._device, self.outside = device, 0.0
        self._started = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def lap(self) -> float:
        now = self._now()
        lap, self._started = now - self._started, now
        return lap

    def pause(self) -> None:
        self.outside += self.lap()


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"
