"""Columns of the two integer tensors that carry a site's state: what the host tells, what the device counts.

Kept apart from the ops so that references and kernels can name a column without importing either.
"""

from __future__ import annotations

import enum


class Ctl(enum.IntEnum):
    """Columns of ``ctl``, int32 [8]: what the clock says about the present call."""

    SLOT = 0  #: which branch of classifier-free guidance; row of the state tensors
    EPOCH = 1  #: number of the video, >= 1, different for every video of a slot
    STEP = 2  #: 0-based denoising step within the video
    DENSE = 3  #: 1: a dense warm-up step
    FORCE = 4  #: 1: rebuild the masks of all heads


class Counter(enum.IntEnum):
    """Columns of ``counters``, int64 [S, B, H, 8]: what a head remembers of its mask and of the video."""

    EPOCH = 0  #: video in which the present mask was built; 0: never
    AGE = 1  #: calls since the mask was built; 0 right after it
    REFRESHES = 2  #: masks built in this video
    CALLS = 3  #: calls in this video
    KEPT = 4  #: query-key token pairs that the present mask keeps
    KEPT_SUM = 5  #: token pairs computed in this video, over all calls; a dense call counts N²
    SEEN = 6  #: video of the last call


CTL_COLUMNS = 8
COUNTER_COLUMNS = 8
