"""Launch parameters of the block-sparse attention kernel, computed from what the GPU can do.

The features follow from the compute capability and the stages from shared memory, never from a device's name.
Run on a GPU: compute capability 9.0. Compiled in the tests, and not run: 8.0, 8.9, 12.0.
"""

from __future__ import annotations

import dataclasses

#: Shared memory a thread block may use, bytes, by compute capability (CUDA C Programming Guide, "Technical
#: Specifications per Compute Capability"); capabilities not listed get the smallest.
_SHARED_MEMORY = {
    (8, 0): 163 << 10,
    (8, 7): 163 << 10,
    (9, 0): 227 << 10,
    (10, 0): 227 << 10,
    (10, 3): 227 << 10,
}
_SMALLEST_SHARED_MEMORY = 99 << 10

#: What Triton adds to the tiles: barriers, scratch of reductions and of the output's layout change.
_MARGIN = 18 << 10


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernel runs.

    Attributes:
        tma: load Q, K and V through tensor memory descriptors.
        num_warps, num_stages: as Triton means them.
        parts: steps that a key block takes. Without TMA a tile of 128 × 128 scores does not fit in registers
            beside 128 × 128 outputs and operands that were loaded into registers: ptxas spills a kilobyte.
        host_descriptors: with ``tma``, those of K and V are made on the host, once a launch; else every
            program makes its own, which needs no address before the launch, so that a graph can hold it.
    """

    tma: bool
    num_warps: int
    num_stages: int
    parts: int = 1
    host_descriptors: bool = True


def choose_launch(
    capability: tuple[int, int], *, block: int, dim: int, itemsize: int, tma_ready: bool
) -> Launch:
    """Launch parameters for one compute capability and problem.

    Args:
        capability: (major, minor) of the device.
        block: tokens a block, 64 or 128; the tile is block × block.
        dim: head dim D.
        itemsize: bytes an element.
        tma_ready: addresses and strides are multiples of 16 bytes.
    """
    tma = capability[0] == 9 and tma_ready
    parts = 2 if not tma and block == dim == 128 else 1
    tile = block * dim * itemsize
    available = _SHARED_MEMORY.get(capability, _SMALLEST_SHARED_MEMORY) - _MARGIN - tile  # Q stays
    stages = max(1, min(4, available // (2 * tile // parts)))  # a stage holds one tile of K and one of V
    return Launch(tma=tma, num_warps=8 if block == 128 else 4, num_stages=stages, parts=parts)
