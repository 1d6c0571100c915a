"""What one process of the calibration study does: generate a few videos together, compare, tune, calibrate.

Videos that a worker is given together go through the pipeline as one batch, each with its own seed; a small
model leaves a GPU waiting for launches, and a batch needs no more of them than one video. Masks, drift and
the layer gate belong to one sample of the batch, so they are what they were for one video; rounding differs,
on both sides of every comparison alike, since dense references are made in the same batches.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import calibration_states
from haste_compile import _torch, doctor
from haste_compile.calibration.command import read_prompts
from haste_compile.calibration.profile import CalibrationProfile
from haste_compile.calibration.run import calibrate
from haste_compile.calibration.use import warming_up
from haste_compile.config import parse_options
from haste_compile.evaluation.metrics import psnr_db, ssim
from haste_compile.explanation import TEXT_TOKENS
from haste_compile.generation import Request, default_options, default_request, generate
from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline, pick_device
from haste_compile.pipeline import Handle, optimize

#: How near two densities have to be to be called equal.
EQUAL_DENSITY = 0.005
_TUNING_ROUNDS = 6
#: Settings after which Dynamo is made to forget their graphs.
_MANY = 16
#: Stands for the PSNR of equal videos.
_EQUAL_DB = 200.0


@dataclasses.dataclass(frozen=True)
class Together:
    """Some videos under one setting; the arrays have an entry for each, density and rate are means."""

    density: float
    refresh_rate: float
    psnr: np.ndarray
    ssim: np.ndarray
    latent_error: np.ndarray


class Bench:
    """A pipeline on one device, and what the study does with it. Nothing is compiled but by ``eager``.

    Args:
        args: the script's arguments.
        device: where the pipeline goes, such as "cuda:1"; None: what the arguments say.
        folder: where references and profiles lie, the same for all processes of a study.
    """

    def __init__(self, args: argparse.Namespace, device: str | None, folder: Path) -> None:
        self.device = pick_device(device or args.device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)  # where Triton launches
        changed = argparse.Namespace(**{**vars(args), "device": str(self.device)})
        self.pipe, self.pool, self.request, self.options = load(changed)
        self.folder = folder
        self._last: dict[str, Any] | None = None
        self._compiled = 0
        self._busy_dense: float | None = None
        self._forget()  # what this process compiled before

    def facts(self) -> dict[str, Any]:
        return environment(self.pipe)

    def dense(self, numbers: Sequence[int], requests: Sequence[Request]) -> None:
        """Generate references and keep latents and videos in the folder, under their numbers."""
        latents = generate_together(self.pipe, requests)
        for number, found in zip(numbers, latents, strict=True):
            video = decode(self.pipe, found)
            np.savez(self.folder / f"reference-{number}.npz", latents=found, video=video)

    def compare(
        self, numbers: Sequence[int], requests: Sequence[Request], options: dict[str, Any]
    ) -> Together:
        """Generate under ``options`` and compare with the references; a profile may be an object."""
        latents, density, refresh = self._sparse(requests, options)
        psnr, similar, distance = [], [], []
        for number, found in zip(numbers, latents, strict=True):
            with np.load(self.folder / f"reference-{number}.npz") as reference:
                dense, wanted = reference["latents"], reference["video"]
            video = decode(self.pipe, found)
            psnr.append(min(psnr_db(video, wanted), _EQUAL_DB))
            similar.append(ssim(video, wanted, device=self.device))
            distance.append(float(np.linalg.norm(found - dense) / np.linalg.norm(dense)))
        return Together(density, refresh, np.array(psnr), np.array(similar), np.array(distance))

    def density(self, requests: Sequence[Request], options: dict[str, Any]) -> float:
        """Mean density of the requests under ``options``."""
        return self._sparse(requests, options)[1]

    def at_density(
        self, profile: CalibrationProfile, requests: Sequence[Request], wanted: float
    ) -> CalibrationProfile:
        """The profile with its budget moved until the requests have the wanted density, every mask rebuilt.

        The budget counts densities at states of dense runs; what a sparse run realises is a little different.
        """
        asked = float(np.mean([expert.density.mean() for expert in profile.experts.values()]))
        least = float(
            np.mean([(1 - expert.sparsities.max(-1)).mean() for expert in profile.experts.values()])
        )
        sparse_share = 1 - self.options.get("dense_steps", 0) / requests[0].steps
        best, distance = profile, float("inf")
        for _ in range(_TUNING_ROUNDS):
            found = self.density(requests, {"profile": profile, "reuse": "never"})
            if abs(found - wanted) < distance:
                best, distance = profile, abs(found - wanted)
            if distance <= EQUAL_DENSITY / 5:
                break
            asked = min(1.0, max(least + 1e-6, asked + (wanted - found) / sparse_share))
            profile = profile.with_budget(f"density:{asked}")
        return best

    def threshold_at_density(
        self, options: dict[str, Any], requests: Sequence[Request], wanted: float
    ) -> float:
        """The shared threshold under which the requests have the wanted density, every mask rebuilt."""
        known = {0.0: 0.0, 1.0: 1.0}
        for turn in range(2 * _TUNING_ROUNDS):
            low = max((p for p, density in known.items() if density <= wanted), default=0.0)
            high = min((p for p, density in known.items() if density > wanted), default=1.0)
            # A straight line alone would creep up from one side, density being convex in the threshold.
            share = 0.5 if turn % 2 else (wanted - known[low]) / (known[high] - known[low])
            top_p = low + max(0.05, min(0.95, share)) * (high - low)
            known[top_p] = self.density(requests, {**options, "top_p": top_p, "reuse": "never"})
            if abs(known[top_p] - wanted) <= EQUAL_DENSITY / 5:
                break
        return min((p for p in known if 0 < p < 1), key=lambda p: abs(known[p] - wanted))

    def calibrate(
        self,
        options: dict[str, Any],
        settings: dict[str, Any],
        *,
        out: Path | None = None,
        rank: int = 0,
        ranks: int = 1,
        port: int = 0,
    ) -> CalibrationProfile:
        """One calibration, or this process's part of one; every rank returns the profile."""
        self._forget()
        with _rank(rank, ranks, port):
            return calibrate(
                self.pipe,
                self.pool,
                request=self.request,
                options={**self.options, **options},
                model="nano-wan",
                out=out,
                **settings,
            )

    def step_weights(self, request: Request) -> np.ndarray:
        """How much a velocity error of the conditional and the unconditional call moves the latents at every
        step, squared: [2, steps]. The guided velocity is g·conditional − (g − 1)·unconditional, and a step
        of flow matching adds the velocity times the change of σ.
        """
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(request.steps)
        moved = np.square(np.diff(scheduler.sigmas.double().numpy()))
        return np.stack((moved * request.guidance**2, moved * (request.guidance - 1) ** 2))

    def overlap(self, request: Request, top_p: float) -> dict[str, Any]:
        """``calibration_states.drift_and_overlap`` in a dense video."""
        self._forget()
        return calibration_states.drift_and_overlap(self.pipe, request, self.options, top_p)

    def joint(self, settings: dict[str, Any], profile: CalibrationProfile) -> dict[str, Any]:
        """``calibration_states.joint_errors`` of a profile."""
        self._forget()
        return calibration_states.joint_errors(
            self.pipe, self.pool, self.request, self.options, settings, profile
        )

    def seconds(self, request: Request, options: dict[str, Any]) -> dict[str, float | None]:
        """Times of one video's denoising loop under the options; nothing else may run meanwhile.

        Returns:
            "sparse", and "dense" just before it; on a GPU also "busy_sparse" and "busy_dense", what it spends
            in kernels, from runs of their own under a profiler.
        """
        dense = self._loop_seconds(request)
        if self._busy_dense is None:
            self._busy_dense = self._busy_seconds(request)
        with self._optimized(options):
            sparse, busy = self._loop_seconds(request), self._busy_seconds(request)
        return {"sparse": sparse, "dense": dense, "busy_sparse": busy, "busy_dense": self._busy_dense}

    def _loop_seconds(self, request: Request) -> float:
        """Seconds of one denoising loop, after a short one that compiles."""
        warm = dataclasses.replace(request, steps=self.options.get("dense_steps", 0) + 2)
        with warming_up():  # fewer steps than a profile was made for, on purpose
            generate(self.pipe, warm, _ignore_step, decode=False)
        return generate(self.pipe, request, _ignore_step, decode=False).seconds

    def _busy_seconds(self, request: Request) -> float | None:
        """Seconds that the GPU spends on one video in kernels and copies; None without one."""
        if self.device.type != "cuda":
            return None
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            generate(self.pipe, request, _ignore_step, decode=False)
        events = profiler.key_averages()
        # A launch on the host is an event, too, and repeats its kernel's time.
        total = sum(event.self_device_time_total for event in events if event.device_type == DeviceType.CUDA)
        return total / 1e6 or None

    def _sparse(
        self, requests: Sequence[Request], options: dict[str, Any]
    ) -> tuple[np.ndarray, float, float]:
        """Latents, density, refresh rate."""
        with self._optimized(options) as handle:
            latents = generate_together(self.pipe, requests)
            found = list(handle.statistics().values())
            handle.reset()
        density = statistics.fmean(f.density for f in found)
        return latents, density, statistics.fmean(f.refresh_rate for f in found)

    @contextlib.contextmanager
    def _optimized(self, options: dict[str, Any]) -> Iterator[Handle]:
        """The pipeline under ``options``; a profile among them may be an object."""
        if isinstance(profile := options.get("profile"), CalibrationProfile):
            folder = tempfile.mkdtemp(dir=self.folder)
            profile.save(folder)
            options = {**options, "profile": folder}
        else:
            options = {**self.options, **options}
        if options != self._last:
            self._compiled += 1
            if self._compiled > _MANY:
                self._forget()
            self._last = options
        options = {**options, "inner": "eager", "strict": True}  # a row that is silently dense tells nothing
        with _torch.many_graphs(), optimize(self.pipe, compile="blocks", **options) as handle:
            handle.reset()
            yield handle

    def _forget(self) -> None:
        """Dynamo keeps only so many graphs of a function, and looks through all of them at every call."""
        torch.compiler.reset()
        self._last, self._compiled = None, 0


def load(args: argparse.Namespace) -> tuple[Any, list[str], Request, dict[str, Any]]:
    """Pipeline, calibration prompts, request and backend options, from a script's arguments."""
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    pipe = load_pipeline(args.model or NANO_WAN, device=device, dtype=dtype)
    return pipe, *load_task(args)


def load_task(args: argparse.Namespace) -> tuple[list[str], Request, dict[str, Any]]:
    """Calibration prompts, request and backend options; as ``load``, without a pipeline."""
    model = args.model or NANO_WAN
    prompts = read_prompts(model, getattr(args, "pool", None))
    sizes = {name: getattr(args, name) for name in ("steps", "height", "width", "frames")}
    request = dataclasses.replace(
        default_request(model), **{name: value for name, value in sizes.items() if value is not None}
    )
    options = {k: v for k, v in default_options(model).items() if k != "top_p"}
    return prompts, request, {**options, **parse_options(getattr(args, "option", None) or [])}


def environment(pipe: Any) -> dict[str, Any]:
    """Device, dtype and versions."""
    parameter = next(pipe.transformer.parameters())
    return {
        "device": doctor.device_name(parameter.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": doctor.versions(),
    }


@torch.no_grad()
def generate_together(pipe: Any, requests: Sequence[Request]) -> np.ndarray:
    """Latents [videos, C, F, H, W] of requests that differ in prompt and seed alone, as one batch."""
    first = requests[0]
    if any(dataclasses.replace(r, prompt=first.prompt, seed=first.seed) != first for r in requests):
        raise ValueError("requests of one batch may differ in prompt and seed alone")
    guided = first.guidance > 1
    prompt, negative = pipe.encode_prompt(
        prompt=[request.prompt for request in requests],
        negative_prompt=[request.negative_prompt for request in requests],
        do_classifier_free_guidance=guided,
        max_sequence_length=TEXT_TOKENS,
        device=pipe._execution_device,
    )
    output = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative if guided else None,
        num_inference_steps=first.steps,
        guidance_scale=first.guidance,
        height=first.height,
        width=first.width,
        num_frames=first.frames,
        generator=[torch.Generator().manual_seed(request.seed) for request in requests],
        output_type="latent",
    )
    return output.frames.float().cpu().numpy()


@torch.no_grad()
def decode(pipe: Any, latents: np.ndarray) -> np.ndarray:
    """The video of latents [C, F, H, W], float32 [F, H, W, 3] in [0, 1], by the pipeline's VAE."""
    vae = pipe.vae
    device = next(vae.parameters()).device
    shape = (1, -1, 1, 1, 1)
    mean, deviation = (
        torch.tensor(values).view(shape).to(device, vae.dtype)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    normal = torch.from_numpy(latents)[None].to(device, vae.dtype)
    video = vae.decode(normal * deviation + mean, return_dict=False)[0]
    return np.asarray(pipe.video_processor.postprocess_video(video, output_type="np")[0], np.float32)


def _ignore_step(_step: int) -> None:
    """A step that nobody looks at."""


@contextlib.contextmanager
def _rank(rank: int, ranks: int, port: int) -> Iterator[None]:
    """The environment that ``torchrun`` would give this process; gloo finds the others by the port."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    given = (str(rank), str(ranks), str(rank), "127.0.0.1", str(port))
    os.environ.update(zip(names, given, strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
