"""Dense videos, and what calibration keeps of them: the transformer's inputs at the drawn steps.

Where δ is to be chosen, the masks that each head would have built some steps before, and how far its queries
and keys have drifted since, are kept as well.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from haste_compile.calibration import masks
from haste_compile.calibration.intercept import Interception, attend_dense
from haste_compile.calibration.plan import Plan, Unit, Video
from haste_compile.errors import StateError
from haste_compile.generation import generate


def record_video(
    pipe: Any,
    interceptions: dict[str, Interception],
    plan: Plan,
    index: int,
    on_step: Callable[[int], None],
) -> dict[str, Tensor]:
    """Generate video ``index`` of the plan dense, up to its last state, and keep what its states need.

    Returns:
        flat names -> tensors on the host, for ``state_inputs`` and ``stale_masks``.

    Raises:
        StateError: the pipeline called its transformers otherwise than the plan expects.
    """
    video = plan.videos[index]
    recorder = _Recorder(plan, index, video)
    handles = [
        interception.transformer.register_forward_pre_hook(
            recorder.hook(name, interception), with_kwargs=True
        )
        for name, interception in interceptions.items()
    ]
    for name, interception in interceptions.items():
        interception.default = recorder.attend(name)

    def step_ended(step: int) -> None:
        recorder.step_ended()
        on_step(step)
        if step + 1 == video.needed_steps:
            pipe._interrupt = True  # how a callback ends a diffusers pipeline's loop

    try:
        with contextlib.ExitStack() as stack:
            for interception in interceptions.values():
                stack.enter_context(interception.calling())
            generate(pipe, plan.video_request(video), step_ended, decode=False)
    finally:
        for handle in handles:
            handle.remove()
        for interception in interceptions.values():
            interception.default = attend_dense
    recorder.check()
    return recorder.kept


def state_inputs(kept: dict[str, Tensor], unit: Unit, device: torch.device) -> dict[str, Any]:
    """Keyword arguments of the transformer call that a unit measures."""
    prefix = f"{unit.state}.input."
    inputs = {name[len(prefix) :]: x.to(device) for name, x in kept.items() if name.startswith(prefix)}
    return {**inputs, "return_dict": False}


def stale_masks(kept: dict[str, Tensor], unit: Unit, age: int, layer: int) -> dict[str, Tensor] | None:
    """The mask of one layer built ``age`` steps before a unit's state; None where there was no such step."""
    prefix = f"{unit.state}.mask.{age}.{layer}."
    found = {name[len(prefix) :]: x for name, x in kept.items() if name.startswith(prefix)}
    return found or None


def drift(kept: dict[str, Tensor], unit: Unit, age: int) -> Tensor:
    """Drift of every layer and head over the ``age`` steps before a unit's state, fp32 [L, H]."""
    return kept[f"{unit.state}.drift.{age}"]


class _Recorder:
    """Follows a pipeline through its steps and calls."""

    def __init__(self, plan: Plan, index: int, video: Video) -> None:
        self.plan, self.index, self.video = plan, index, video
        self.kept: dict[str, Tensor] = {}
        self._step, self._calls = 0, 0
        self._means: dict[tuple[str, int, int], list[Tensor]] = {}
        self._built: dict[tuple[str, int, int, int], dict[str, Tensor]] = {}
        candidates = plan.settings.measured
        self._top_p = candidates[len(candidates) // 2]

    def hook(self, name: str, interception: Interception) -> Callable[..., None]:
        signature = inspect.signature(type(interception.transformer).forward)

        def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call, self._calls = self._calls, self._calls + 1
            unit = Unit(name, self.index, self._step, call)
            if self._step in self.video.steps[name] and call in self.plan.calls:
                given = signature.bind(module, *args, **kwargs).arguments
                for key, value in given.items():
                    if isinstance(value, Tensor):
                        self.kept[f"{unit.state}.input.{key}"] = value.detach().cpu().clone().contiguous()

        return called

    def attend(self, name: str) -> Callable[..., Tensor]:
        layers, settings = self.plan.experts[name].layers, self.plan.settings
        wanted = set()
        if settings.delta == "choose":
            for step in self.video.steps[name]:
                wanted |= {step, *(step - age for age in settings.ages)}

        def attend(block: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            call = self._calls - 1
            if self._step in wanted and call in self.plan.calls and block in layers:
                self._see(name, call, layers.index(block), q, k)
            return attend_dense(block, q, k, v, scale)

        return attend

    def _see(self, name: str, call: int, layer: int, q: Tensor, k: Tensor) -> None:
        means = torch.stack((masks.token_means(q), masks.token_means(k)), dim=2)
        self._means.setdefault((name, self._step, call), []).append(means)
        if any(self._step + age in self.video.steps[name] for age in self.plan.settings.ages):
            top_p = torch.full((q.shape[1],), self._top_p, device=q.device)
            built = masks.build(q, k, top_p, self.plan.config)
            on_host = {field: x.cpu() for field, x in built.items()}
            self._built[name, self._step, call, layer] = on_host

    def step_ended(self) -> None:
        for name, steps in self.video.steps.items():
            if self._step in steps and self.plan.settings.delta == "choose":
                for call in self.plan.calls:
                    self._keep_stale(name, call)
        self._step, self._calls = self._step + 1, 0

    def _keep_stale(self, name: str, call: int) -> None:
        unit = Unit(name, self.index, self._step, call)
        now = self._means.get((name, self._step, call))
        for age in self.plan.settings.ages:
            before = self._means.get((name, self._step - age, call))
            if now is None or before is None:
                continue
            moved = torch.stack(now) - torch.stack(before)  # [L, B, H, 2, D]
            self.kept[f"{unit.state}.drift.{age}"] = moved.abs().sum((-1, -2)).mean(1)
            for layer in range(len(now)):
                for field, x in self._built[name, self._step - age, call, layer].items():
                    self.kept[f"{unit.state}.mask.{age}.{layer}.{field}"] = x.clone()

    def check(self) -> None:
        for name, steps in self.video.steps.items():
            for step in steps:
                for call in self.plan.calls:
                    state = Unit(name, self.index, step, call).state
                    if f"{state}.input.hidden_states" not in self.kept:
                        raise StateError(
                            found=f"no call {call} of {name} at step {step}",
                            wanted="one call for each guidance branch at every step it serves",
                            where=f"dense video {self.index}",
                            fix="Calibrate with a diffusers Wan pipeline, or with branches='conditional'.",
                        )
