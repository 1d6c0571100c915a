"""The objective against NumPy, and the probes that stand for it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from haste_compile.calibration.objective import PLAIN, BandWeights, band_errors, colour, weighted_error
from haste_compile.errors import OptionError

SIZES = [(1, 1, 1, 1, 1), (1, 2, 5, 8, 8), (2, 3, 9, 7, 6), (1, 1, 8, 5, 12)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bands_by_numpy(error: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """The definition, frequency by frequency, in float64 and with numpy's other normalisation."""
    spectrum = np.fft.fftn(error, axes=(2, 3, 4))
    total = (np.abs(np.fft.fftn(dense, axes=(2, 3, 4))) ** 2).sum()
    sums = np.zeros(4)
    for t, y, x in np.ndindex(*error.shape[2:]):
        ft, fy, fx = (np.fft.fftfreq(n)[i] for n, i in zip(error.shape[2:], (t, y, x), strict=True))
        late, fine = abs(ft) >= 0.25, not (abs(fy) < 0.25 and abs(fx) < 0.25)
        sums[2 * late + fine] += (np.abs(spectrum[:, :, t, y, x]) ** 2).sum()
    return sums / total


@pytest.mark.parametrize("size", SIZES)
def test_bands_against_numpy(size: tuple[int, ...]) -> None:
    error, dense = normal(*size, seed=1), normal(*size, seed=2)
    wanted = bands_by_numpy(error.double().numpy(), dense.double().numpy())
    np.testing.assert_allclose(band_errors(error, dense).numpy(), wanted, rtol=2e-5, atol=1e-7)
    weighted = wanted @ [1.0, 0.5, 0.01, 0.01]
    assert weighted_error(error, dense, BandWeights()) == pytest.approx(weighted, rel=2e-5)


def test_equal_weights_give_the_relative_squared_error() -> None:
    error, dense = normal(1, 2, 5, 8, 8, seed=1), normal(1, 2, 5, 8, 8, seed=2)
    wanted = float(error.square().sum() / dense.square().sum())
    assert weighted_error(error, dense, PLAIN) == pytest.approx(wanted, rel=1e-5)


def test_half_precision_is_summed_in_float32() -> None:
    error = normal(1, 2, 5, 8, 8, seed=1).to(torch.float16) * 1e-3
    dense = normal(1, 2, 5, 8, 8, seed=2).to(torch.bfloat16)
    found = band_errors(error, dense)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, band_errors(error.float(), dense.float()))


def test_a_pure_wave_lies_in_its_band() -> None:
    t, y = torch.arange(8)[:, None, None], torch.arange(8)[None, :, None]
    ones = torch.ones(8, 8, 8)
    late, fine = torch.cos(torch.pi * t) * ones, torch.cos(torch.pi * y) * ones
    for wave, band in ((ones, 0), (fine, 1), (late, 2), (late * fine, 3)):
        found = band_errors(wave[None, None], ones[None, None])
        assert found.argmax() == band and found[band] == pytest.approx(1.0)
        assert found.sum() == pytest.approx(1.0)


def test_probes_of_a_whole_basis_give_the_error_exactly() -> None:
    """E[⟨probe, ε⟩²] for white noise is the sum over any orthonormal basis."""
    size = (1, 1, 3, 4, 5)
    error, dense = normal(*size, seed=1), normal(*size, seed=2)
    basis = torch.eye(error.numel()).reshape(-1, *size)
    probes = torch.stack([colour(e, dense, BandWeights()) for e in basis])
    found = float((probes * error).flatten(1).sum(1).square().sum())
    assert found == pytest.approx(weighted_error(error, dense, BandWeights()), rel=1e-4)


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_bad_weights_are_refused(weight: float) -> None:
    with pytest.raises(OptionError, match="HL"):
        BandWeights(HL=weight)
