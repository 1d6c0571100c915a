"""Launch parameters of the variable-block attention kernel, computed from what the GPU can do."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Launch:
    """How the kernel runs.

    Attributes:
        rows: query tokens a tile, 64 or 128.
        columns: key tokens a step.
        num_warps, num_stages: as Triton means them.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int


def choose_launch(capability: tuple[int, int], *, dim: int, itemsize: int, cluster: float) -> Launch:
    """Launch parameters for one compute capability and problem.

    A query cluster is cut into row tiles, the last of which is half empty on average: clusters of fewer than
    192 tokens get tiles of 64, which lose less.

    Args:
        capability: (major, minor) of the device.
        dim: head dim D.
        itemsize: bytes an element; four-byte ones are for tests.
        cluster: mean tokens of a query cluster.
    """
    if itemsize > 2:
        return Launch(rows=32, columns=32, num_warps=4, num_stages=1)
    rows = 128 if cluster >= 192 else 64
    if capability[0] == 9:
        # 227 KB: three stages of K and V of 64 tokens beside Q, or two of 128.
        return Launch(rows=rows, columns=128 if rows == 128 else 64, num_warps=rows // 16, num_stages=2)
    return Launch(rows=64, columns=64 if dim == 64 else 32, num_warps=4, num_stages=2)
