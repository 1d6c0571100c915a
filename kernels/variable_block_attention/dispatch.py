"""Which kernel a GPU gets: the one written for Hopper where it fits, else Triton's."""

from __future__ import annotations

from torch import Tensor

from haste_compile.kernels.variable_block_attention import hopper, kernel


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
    form = hopper if hopper.suits(q, k, v) else kernel
    return form.attend(q, k, v, order, offsets, mask, ctl, scale=scale)
