"""PSNR and SSIM against formulas worked out by hand, and the difference clip."""

from __future__ import annotations

import math

import numpy as np
import pytest

from haste_compile.errors import InputError
from haste_compile.evaluation.metrics import absolute_difference, psnr_db, ssim
from haste_compile.evaluation.video import write_mp4


def _video(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.2, 0.8, (5, 32, 48, 3)).astype(np.float32)


def test_psnr_of_a_known_error() -> None:
    video = _video()
    assert psnr_db(video + np.float32(0.1), video) == pytest.approx(20.0, abs=1e-3)  # −10·log10(0.1²)
    assert psnr_db(video + np.float32(0.01), video) == pytest.approx(40.0, abs=1e-2)


def test_psnr_is_over_all_frames_not_a_mean_of_frames() -> None:
    video = _video()
    other = video.copy()
    other[0] += 0.1
    assert psnr_db(other, video) == pytest.approx(20 + 10 * math.log10(5), abs=1e-3)


def test_equal_videos() -> None:
    assert psnr_db(_video(), _video()) == math.inf
    assert ssim(_video(), _video()) == pytest.approx(1.0, abs=1e-6)


def test_ssim_of_flat_videos() -> None:
    """Without variance SSIM is its luminance term, (2ab + c₁) / (a² + b² + c₁) with c₁ = 0.01²."""
    a, b = (np.full((2, 32, 32, 3), value, np.float32) for value in (0.3, 0.6))
    expected = (2 * 0.3 * 0.6 + 1e-4) / (0.3**2 + 0.6**2 + 1e-4)
    assert ssim(a, b) == pytest.approx(expected, abs=1e-3)


def test_ssim_falls_with_noise() -> None:
    video, noise = _video(), np.random.default_rng(1).normal(0, 1, (5, 32, 48, 3)).astype(np.float32)
    values = [ssim(np.clip(video + s * noise, 0, 1), video) for s in (0.01, 0.05, 0.2)]
    assert 1 > values[0] > values[1] > values[2]


def test_difference_is_scaled_and_clipped() -> None:
    video = _video()
    other = video.copy()
    other[1, 2, 3] = (video[1, 2, 3] + 0.1) % 1.0
    difference = absolute_difference(other, video, gain=4.0)
    assert difference[1, 2, 3] == pytest.approx([0.4] * 3, abs=1e-5)
    difference[1, 2, 3] = 0
    assert not difference.any()
    assert absolute_difference(np.ones_like(video), np.zeros_like(video), gain=4.0).max() == 1.0


@pytest.mark.parametrize(
    "bad",
    [
        _video()[:4],
        _video()[0],
        (_video() * 255).astype(np.uint8),
        _video() * 2,
        np.full_like(_video(), np.nan),
    ],
    ids=["length", "rank", "dtype", "range", "nan"],
)
def test_bad_videos_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="video"):
        psnr_db(bad, _video())


def test_odd_sizes_cannot_be_written(tmp_path) -> None:
    with pytest.raises(InputError, match="even H and W"):
        write_mp4(tmp_path / "odd.mp4", _video()[:, :31], fps=8)
    assert not (tmp_path / "odd.mp4").exists()
