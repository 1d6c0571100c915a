"""Run a Wan pipeline once and time its denoising loop step by step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste_compile.errors import OptionError
from haste_compile.explanation import TEXT_TOKENS
from haste_compile.loading import NANO_PROFILE, NANO_WAN, import_optional


@dataclasses.dataclass(frozen=True)
class Request:
    """One video to generate.

    Attributes:
        prompt, negative_prompt: the text of the two guidance branches.
        seed: of the initial noise, drawn on the CPU so that it is the same on every device.
        steps: denoising steps.
        guidance: guidance scale; 1 or less switches the unconditional branch off.
        height, width, frames: size of the video; multiples of 16, and of 4 plus 1.
        fps: frames per second of the written file.
        image: first frame, for image-to-video pipelines only.
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 50
    guidance: float = 5.0
    height: int = 480
    width: int = 832
    frames: int = 81
    fps: int = 16
    image: Path | None = None

    def __post_init__(self) -> None:
        rules = (
            ("steps", self.steps, "at least 1", self.steps >= 1),
            ("height", self.height, "a positive multiple of 16", self.height > 0 and self.height % 16 == 0),
            ("width", self.width, "a positive multiple of 16", self.width > 0 and self.width % 16 == 0),
            ("frames", self.frames, "a multiple of 4, plus 1", self.frames > 0 and self.frames % 4 == 1),
            ("fps", self.fps, "at least 1", self.fps >= 1),
        )
        for name, value, wanted, right in rules:
            if not right:
                raise OptionError(
                    found=str(value), wanted=wanted, where=f"option {name}", fix="Correct the value."
                )


#: What suits the embedded model: its training size, and as many steps as two cores do in a minute.
NANO_REQUEST = Request(
    prompt="a red circle moves left, a blue square moves up",
    steps=22,
    guidance=3.0,
    height=256,
    width=256,
    frames=33,
)
#: Options for the embedded model's 2,304 tokens: blocks of 64 leave 36 to choose from. The others were chosen
#: on the demo's own prompt, with `python -m benchmarks.drift_threshold --top-p 0.95 -o dense_steps=2`. The
#: paper's δ = 30 is a raw L1 norm for heads of 128 features and another scale; here most heads drift by less
#: than 3 in a step, and 30 would hardly ever rebuild a mask. Up to 4, the PSNR is that of a rebuild in every
#: step. top_p 0.9 without dense steps falls short of 25 dB.
NANO_OPTIONS: dict[str, Any] = {
    "block_size": 64,
    "stride": 16,
    "top_p": 0.95,
    "delta": 4.0,
    "dense_steps": 2,
}


def default_request(model: str | Path) -> Request:
    """Size, steps and guidance that suit a model: the embedded one, or Wan 2.1 at 480p."""
    return NANO_REQUEST if Path(model) == NANO_WAN else Request(prompt="A cat walks on the grass, realistic")


#: What a calibration profile stands in the way of: its thresholds, and what they were measured under.
_FIXED_BY_PROFILE = {
    *("profile", "top_p", "delta", "predictor", "block_size", "stride", "relative_drift", "token_order"),
    *("clusters", "cluster_iterations", "cluster_tolerance", "cluster_floor"),
}


def default_options(model: str | Path) -> dict[str, Any]:
    """Options of the haste backend that suit a model, one threshold for all heads."""
    return dict(NANO_OPTIONS) if Path(model) == NANO_WAN else {}


def complete_options(model: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """The user's options and what suits the model where they leave it open.

    The embedded model has a calibration profile; it is left out where an option contradicts it.
    """
    if Path(model) != NANO_WAN or "profile" in given:
        return dict(given)
    if _FIXED_BY_PROFILE & set(given):
        return {**default_options(model), **given}
    return {"profile": str(NANO_PROFILE), **given}


@dataclasses.dataclass(frozen=True)
class Generation:
    """A generated video, float32 [F, H, W, 3] in [0, 1], and the seconds of each denoising step.

    Or its latents, float32 [C, F, H, W], where it was not decoded.
    """

    video: np.ndarray
    step_seconds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Seconds of the whole denoising loop, without text encoding and decoding."""
        return sum(self.step_seconds)


def generate(
    pipe: Any, request: Request, on_step: Callable[[int], None], *, decode: bool = True
) -> Generation:
    """Generate the video; ``on_step(i)`` is called after step i, off the clock.

    With ``decode=False`` the result holds the latents.

    Raises:
        OptionError: an image for a text-to-video pipeline, or none for image-to-video.
    """
    keywords = _image_keywords(pipe, request)
    device = pipe._execution_device
    cfg = request.guidance > 1
    with torch.no_grad():
        prompt, negative = pipe.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            do_classifier_free_guidance=cfg,
            max_sequence_length=TEXT_TOKENS,
            device=device,
        )
    seconds: list[float] = []
    started = 0.0

    def step_ended(_pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal started
        _synchronize(device)
        seconds.append(time.perf_counter() - started)
        on_step(step)
        started = time.perf_counter()
        return tensors

    _synchronize(device)
    started = time.perf_counter()
    output = pipe(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative if cfg else None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        height=request.height,
        width=request.width,
        num_frames=request.frames,
        generator=torch.Generator().manual_seed(request.seed),
        callback_on_step_end=step_ended,
        output_type="np" if decode else "latent",
        **keywords,
    )
    frames = output.frames[0]
    if isinstance(frames, torch.Tensor):
        frames = frames.float().cpu().numpy()
    return Generation(np.asarray(frames, np.float32), tuple(seconds))


def _image_keywords(pipe: Any, request: Request) -> dict[str, Any]:
    wants_image = "ImageToVideo" in type(pipe).__name__
    if wants_image != (request.image is not None):
        raise OptionError(
            found="no image" if wants_image else f"the image {request.image}",
            wanted="a first frame" if wants_image else "none, for text to video",
            where=f"the request to {type(pipe).__name__}",
            fix="Give --image for image-to-video models, and only for them.",
        )
    if request.image is None:
        return {}
    if not request.image.is_file():
        raise OptionError(
            found=f"no file {request.image}", wanted="an image", where="option image", fix="Correct the path."
        )
    image = import_optional("PIL.Image", extra="demo").open(request.image).convert("RGB")
    return {"image": image.resize((request.width, request.height))}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
