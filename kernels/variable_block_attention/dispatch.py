"""Which kernel a GPU gets: Triton's, or the one written for Hopper once a GPU has confirmed it."""

from __future__ import annotations

from torch import Tensor

from haste_compile.kernels.variable_block_attention import hopper, kernel

#: A Hopper GPU has run ``hopper.py`` and its output was right, as ``benchmarks.svg2`` tells.
HOPPER_CONFIRMED = False


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: Tensor,
    offsets: Tensor,
    mask: Tensor,
    ctl: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """As :func:`kernel.attend`."""
    form = hopper if HOPPER_CONFIRMED and hopper.suits(q, k, v) else kernel
    return form.attend(q, k, v, order, offsets, mask, ctl, scale=scale)
