"""Whose weights are these? A few sampled values of every parameter, compared with a tolerance (ours).

Cheap at any size (14B: some 1,100 parameters × 8 values), the same on every device, and tolerant of the dtype
the weights are held in: a checkpoint loaded in bfloat16, float16 or float32 gives values that agree to within
bfloat16's rounding. Parameters are recognised by number of elements and values, not by name, because a
compiled graph receives them without names, and one block's graph only its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

#: Sampled values of a parameter.
SAMPLES = 8
#: bfloat16 keeps 8 bits; a value may have been rounded twice on its way.
_RELATIVE = 2.0**-7


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Of P parameters in the module's order: ``sizes`` int64 [P], ``values`` float32 [P, SAMPLES]."""

    sizes: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, parameters: Iterable[Tensor]) -> Fingerprint:
        """Sample parameters; reads them all in one transfer for each device they lie on."""
        floating = [p.detach() for p in parameters if p.is_floating_point() and p.numel() > 0]
        sizes = np.array([p.numel() for p in floating], np.int64)
        by_device: dict[torch.device, list[int]] = {}
        for i, parameter in enumerate(floating):
            by_device.setdefault(parameter.device, []).append(i)
        values = np.zeros((len(floating), SAMPLES), np.float32)
        for indices in by_device.values():
            values[indices] = torch.stack([_sample(floating[i]) for i in indices]).cpu().numpy()
        return cls(sizes, values)

    def unknown(self, others: Fingerprint) -> int:
        """How many parameters of ``others`` are none of these."""
        known = 0
        for size, row in zip(others.sizes, others.values, strict=True):
            rows = self.values[self.sizes == size]
            limit = _RELATIVE * np.maximum(np.abs(rows), np.abs(row))
            known += bool((np.abs(rows - row) <= limit).all(1).any())
        return len(others.sizes) - known

    def digest(self) -> str:
        """SHA-256 of the samples as they were taken, to show and to compare by eye."""
        return hashlib.sha256(self.sizes.tobytes() + self.values.tobytes()).hexdigest()


def _sample(parameter: Tensor) -> Tensor:
    steps = torch.linspace(0, 1, SAMPLES, dtype=torch.float64) * (parameter.numel() - 1)
    flat = parameter.reshape(-1)  # a view: parameters are contiguous
    return flat.index_select(0, steps.round().long().to(parameter.device)).float()
