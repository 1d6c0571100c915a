"""Distances between two videos of the same prompt and seed.

Videos are float arrays [F, H, W, C] with values in [0, 1], as ``WanPipeline`` returns them with
``output_type="np"``. Both figures come from torchmetrics; SSIM is its default (Gaussian window of 11 pixels,
σ = 1.5; Wang et al. 2004) on each frame, then the mean over frames.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from haste_compile.errors import InputError


def psnr_db(video: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio over all pixels of all frames, in dB; infinite for equal videos.

    Raises:
        InputError: the two are not videos of one shape with values in [0, 1].
    """
    a, b = _as_tensors(video, reference)
    if torch.equal(a, b):
        return math.inf
    return float(peak_signal_noise_ratio(a, b, data_range=1.0))


def ssim(video: np.ndarray, reference: np.ndarray, *, device: torch.device | str = "cpu") -> float:
    """Structural similarity, mean over frames; 1 for equal videos.

    Args:
        device: where it is computed.

    Raises:
        InputError: the two are not videos of one shape with values in [0, 1].
    """
    a, b = (x.permute(0, 3, 1, 2).to(device) for x in _as_tensors(video, reference))
    value = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(value, torch.Tensor)  # a tuple only when the full map is asked for
    return float(value)


def absolute_difference(video: np.ndarray, reference: np.ndarray, *, gain: float = 1.0) -> np.ndarray:
    """|video − reference| · gain, clipped to [0, 1]: float32 [F, H, W, C].

    Raises:
        InputError: the two are not videos of one shape with values in [0, 1].
    """
    a, b = _as_tensors(video, reference)
    return ((a - b).abs() * gain).clamp(max=1.0).numpy()


def _as_tensors(video: np.ndarray, reference: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    for name, array in (("video", video), ("reference", reference)):
        if array.ndim != 4 or array.shape != reference.shape or array.dtype.kind != "f":
            raise InputError(
                found=f"{array.dtype} {list(array.shape)}",
                wanted=f"a float video [F, H, W, C], like the reference's {list(reference.shape)}",
                where=name,
                fix='Take both videos from a pipeline called with output_type="np" and the same size.',
            )
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise InputError(
                found=f"values from {array.min()} to {array.max()}",
                wanted="finite values in [0, 1]",
                where=name,
                fix="Divide 8-bit frames by 255; NaN means that the generation itself failed.",
            )
    return torch.from_numpy(np.ascontiguousarray(video, np.float32)), torch.from_numpy(
        np.ascontiguousarray(reference, np.float32)
    )
