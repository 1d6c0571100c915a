"""Which kernel a GPU gets: the one written for Hopper where it fits, else Triton's."""

from __future__ import annotations

from torch import Tensor

from haste_compile.kernels.block_mask import BlockMask
from haste_compile.kernels.block_sparse_attention import hopper, kernel


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As :func:`kernel.attend`."""
    form = hopper if hopper.suits(q, k, v, block) else kernel
    return form.attend(q, k, v, mask, block=block, scale=scale)
