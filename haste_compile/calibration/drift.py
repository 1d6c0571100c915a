"""δ of temporal mask reuse for every head, from drift and the error of stale masks (ours).

At a measured state each head attends once more under the mask that it would have built ``age`` steps before.
The gradient form gives the error of that in the same unit as the error of a fresh mask. A head may reuse a
mask as long as this costs at most ``tolerance`` times what a fresh mask costs.
"""

from __future__ import annotations

import numpy as np

#: δ of a head that keeps its first mask: above any drift, and finite, as an option has to be.
FREEZE = 1e30


def choose_delta(drift: np.ndarray, stale: np.ndarray, fresh: np.ndarray, *, tolerance: float) -> np.ndarray:
    """The largest drift up to which stale masks are good enough.

    Args:
        drift: [A, L, H], mean drift ‖Q̄_a − Q̄‖₁ + ‖K̄_a − K̄‖₁ over A ascending ages.
        stale: [A, L, H], mean error under masks of that age; ``fresh``: [L, H], under present masks.
        tolerance: what staleness may add, as a share of the fresh error.

    Returns:
        float64 [L, H]: 0 ("always refresh") where even the youngest stale mask costs too much, ``FREEZE``
        where the oldest does not, and else the mean drift at the oldest age in an unbroken row of good ones.
    """
    good = stale <= (1 + tolerance) * fresh
    reached = np.logical_and.accumulate(good, axis=0).sum(0)  # ages in the unbroken row
    oldest = np.take_along_axis(drift, np.maximum(reached - 1, 0)[None], 0)[0]
    delta = np.where(reached == 0, 0.0, oldest)
    return np.where(reached == len(drift), FREEZE, delta)
