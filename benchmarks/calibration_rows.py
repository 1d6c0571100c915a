"""The rows of the calibration study: settings, each over the same videos, compared with dense."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste_compile import _torch, doctor
from haste_compile.calibration.command import read_prompts
from haste_compile.calibration.profile import CalibrationProfile
from haste_compile.config import parse_options
from haste_compile.evaluation.metrics import psnr_db, ssim
from haste_compile.generation import Request, default_options, default_request, generate
from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline, pick_device
from haste_compile.pipeline import optimize

#: How near two densities have to be to be called equal.
EQUAL_DENSITY = 0.005
_TUNING_ROUNDS = 3
#: Stands for the PSNR of equal videos.
_EQUAL_DB = 200.0


def load(args: argparse.Namespace) -> tuple[Any, list[str], Request, dict[str, Any]]:
    """Pipeline, calibration prompts, request and backend options, from a script's arguments."""
    model = args.model or NANO_WAN
    device = pick_device(args.device)
    dtype = getattr(torch, args.dtype) if args.dtype else default_dtype(device)
    pipe = load_pipeline(model, device=device, dtype=dtype)
    prompts = read_prompts(model, getattr(args, "pool", None))
    sizes = {name: getattr(args, name) for name in ("steps", "height", "width", "frames")}
    request = dataclasses.replace(
        default_request(model), **{name: value for name, value in sizes.items() if value is not None}
    )
    options = {k: v for k, v in default_options(model).items() if k != "top_p"}
    return pipe, prompts, request, {**options, **parse_options(getattr(args, "option", None) or [])}


def environment(pipe: Any) -> dict[str, Any]:
    """Device, dtype and versions."""
    parameter = next(pipe.transformer.parameters())
    return {
        "device": doctor.device_name(parameter.device),
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "versions": doctor.versions(),
    }


@dataclasses.dataclass(frozen=True)
class Figures:
    """One setting over all videos; ``psnr``, ``ssim`` and ``latent_error`` have an entry for each."""

    name: str
    density: float
    refresh_rate: float
    psnr: np.ndarray
    ssim: np.ndarray
    latent_error: np.ndarray
    time_over_dense: float

    def to_dict(self) -> dict[str, Any]:
        return {
            field.name: value.tolist()
            if isinstance(value := getattr(self, field.name), np.ndarray)
            else value
            for field in dataclasses.fields(self)
        }

    def __str__(self) -> str:
        return (
            f"{self.name:28} {self.density:7.3f} {self.refresh_rate:7.3f}  {self.psnr.mean():7.2f} "
            f"{self.psnr.min():7.2f}  {self.ssim.mean():.4f} {self.latent_error.mean():8.4f} "
            f"{self.time_over_dense:8.2f}"
        )


class Rows:
    """Runs settings over the evaluation videos, uncompiled on both sides.

    Args:
        options: of the backend, without thresholds.
        folder: where profiles are put for the backend to read.
    """

    def __init__(self, pipe: Any, requests: Sequence[Request], options: dict[str, Any], folder: Path) -> None:
        self.pipe, self.requests, self.options, self.folder = pipe, list(requests), options, folder
        self.figures: list[Figures] = []
        self._latents: list[np.ndarray] = []
        self._videos: list[np.ndarray] = []
        self._seconds: list[float] = []
        self._tuning: tuple[Request, float] | None = None

    def dense(self) -> None:
        """Generate the references."""
        for request in self.requests:
            run = generate(self.pipe, request, lambda _step: None, decode=False)
            self._latents.append(run.video)
            self._videos.append(decode(self.pipe, run.video))
            self._seconds.append(run.seconds)

    def run(self, name: str, options: dict[str, Any]) -> Figures:
        """Generate every video under ``options``; a profile among them may be an object."""
        psnr, similar, latent, times, density, refresh = [], [], [], [], [], []
        for i, request in enumerate(self.requests):
            latents, seconds, figures = self._generate(request, options)
            video = decode(self.pipe, latents)
            psnr.append(min(psnr_db(video, self._videos[i]), _EQUAL_DB))
            similar.append(ssim(video, self._videos[i]))
            reference = self._latents[i]
            latent.append(float(np.linalg.norm(latents - reference) / np.linalg.norm(reference)))
            times.append(seconds / self._seconds[i])
            density.append(figures[0])
            refresh.append(figures[1])
        row = Figures(
            name,
            statistics.fmean(density),
            statistics.fmean(refresh),
            np.array(psnr),
            np.array(similar),
            np.array(latent),
            statistics.median(times),
        )
        self.figures.append(row)
        print(row, flush=True)
        return row

    def tune(self, request: Request, options: dict[str, Any]) -> None:
        """Note the density of ``options`` on a tuning video, for ``at_equal_density``."""
        self._tuning = request, self._generate(request, options)[2][0]

    def at_equal_density(self, profile: CalibrationProfile) -> CalibrationProfile:
        """The profile with its budget moved until the tuning video has the noted density.

        The budget counts densities at states of dense runs; what a sparse run realises is a little different.
        """
        if self._tuning is None:
            raise RuntimeError("tune() comes first")
        request, wanted = self._tuning
        asked = float(np.mean([expert.density.mean() for expert in profile.experts.values()]))
        dense_share = self.options.get("dense_steps", 0) / request.steps
        for _ in range(_TUNING_ROUNDS):
            found = self._generate(request, {"profile": profile, "reuse": "never"})[2][0]
            if abs(found - wanted) <= EQUAL_DENSITY / 5:
                break
            asked += (wanted - found) / (1 - dense_share)
            profile = profile.with_budget(f"density:{asked}")
        return profile

    def _generate(
        self, request: Request, options: dict[str, Any]
    ) -> tuple[np.ndarray, float, tuple[float, float]]:
        """Latents, seconds, (density, refresh rate)."""
        if isinstance(profile := options.get("profile"), CalibrationProfile):
            profile.save(self.folder)
            options = {**options, "profile": str(self.folder)}
        with _torch.many_graphs(), optimize(self.pipe, inner="eager", **options) as handle:
            handle.reset()
            run = generate(self.pipe, request, lambda _step: None, decode=False)
            found = list(handle.statistics().values())
            handle.reset()
        density = statistics.fmean(f.density for f in found)
        return run.video, run.seconds, (density, statistics.fmean(f.refresh_rate for f in found))


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


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, draws: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean."""
    generator = np.random.default_rng(0)
    means = generator.choice(values, (draws, len(values))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
