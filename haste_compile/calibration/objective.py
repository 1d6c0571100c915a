"""What calibration minimises: the error of the predicted velocity in four bands of a 3-D FFT (HASTE, EBC).

    ε = y_sparse − y_dense,   r_q = Σ_{ω∈Ω_q} |FFT(ε)|² / (Σ_ω |FFT(y_dense)|² + tiny),   E = Σ_q w_q r_q

*Ours*, where the paper is silent: the FFT runs over time, height and width, is orthonormal and in float32;
"low" means |f| < 0.25 cycles a sample; a frequency is spatially low when both its spatial axes are. With
equal weights of 1, E is the plain relative squared error.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from haste_compile.errors import OptionError

#: Least |f| in cycles a sample that counts as high.
CUTOFF = 0.25
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class BandWeights:
    """Weights of the four bands, first letter temporal, second spatial: low or high (HASTE's values)."""

    LL: float = 1.0
    LH: float = 0.5
    HL: float = 0.01
    HH: float = 0.01

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < float("inf"):
                raise OptionError(
                    found=repr(value),
                    wanted="a finite number of at least 0",
                    where=f"band weight {field.name}",
                    fix="Correct the value.",
                )

    def values(self) -> tuple[float, float, float, float]:
        return dataclasses.astuple(self)  # type: ignore[return-value]


#: Every frequency counts the same.
PLAIN = BandWeights(1.0, 1.0, 1.0, 1.0)


def band_errors(error: Tensor, dense: Tensor) -> Tensor:
    """r_q of an output error in the bands LL, LH, HL, HH.

    Args:
        error: y_sparse − y_dense, [B, C, T, H, W], any floating dtype.
        dense: y_dense, of the same shape.

    Returns:
        fp32 [4].
    """
    power = _spectrum(error).abs().square().sum((0, 1))
    band = _bands(*error.shape[2:], error.device)
    sums = torch.stack([power[band == q].sum() for q in range(4)])
    return sums / (dense.float().square().sum() + _TINY)  # Parseval: an orthonormal FFT keeps the energy


def weighted_error(error: Tensor, dense: Tensor, weights: BandWeights) -> float:
    """E of an output error: the weighted sum of ``band_errors``."""
    return float(band_errors(error, dense) @ torch.tensor(weights.values(), device=error.device))


def colour(noise: Tensor, dense: Tensor, weights: BandWeights) -> Tensor:
    """Turn white noise g into a probe with E[⟨probe, ε⟩²] = E(ε) for every error ε of this output.

    The probe is W g / ‖y_dense‖ with W = FFT⁻¹ √w FFT, so the mean of its squared inner products with ε is
    εᵀ Wᵀ W ε / ‖y‖², which is E.

    Args:
        noise: independent entries of mean 0 and variance 1, [B, C, T, H, W].
        dense: y_dense, of the same shape.

    Returns:
        fp32, of the same shape.
    """
    band = _bands(*noise.shape[2:], noise.device)
    root = torch.tensor(weights.values(), device=noise.device).sqrt()[band]
    coloured = torch.fft.ifftn(_spectrum(noise) * root, dim=(2, 3, 4), norm="ortho").real
    return coloured / (dense.float().square().sum() + _TINY).sqrt()


def _spectrum(x: Tensor) -> Tensor:
    return torch.fft.fftn(x.float(), dim=(2, 3, 4), norm="ortho")


@functools.lru_cache(maxsize=16)
def _bands(frames: int, height: int, width: int, device: torch.device) -> Tensor:
    """Band of every frequency, int64 [T, H, W]: 0 LL, 1 LH, 2 HL, 3 HH."""
    temporal, vertical, horizontal = (torch.fft.fftfreq(n).abs() >= CUTOFF for n in (frames, height, width))
    spatial = vertical[:, None] | horizontal[None, :]
    return (2 * temporal.long()[:, None, None] + spatial.long()[None]).to(device)
