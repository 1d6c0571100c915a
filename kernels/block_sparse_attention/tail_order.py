"""In which order the last tiles are worked on: the longest first, so that all multiprocessors end together.

A tile takes as long as its list. In raster order the last multiprocessor ends up to a tile later than the
first: at 12 heads, 32,760 tokens and density .25, 2.8 % of the time is waited, 7.6 % with uneven rows (a list
schedule on 132 processors, computed). All tiles by length would end evenly too, but scatter heads, whose K
and V then leave L2. The last thousand are enough: 1.3 and 0.9 %.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from haste_compile.kernels.launching import launchable

#: Tiles that go by length, at most.
TAIL = 1024
#: Tiles that one program ranks.
PART = 8


def reference(counts: Tensor, tail: int) -> Tensor:
    """The last ``tail`` tiles, longest first, of equal ones the earlier first: int32 [min(tail, tiles)]."""
    flat = counts.reshape(-1)
    first = max(len(flat) - tail, 0)
    return (first + flat[first:].sort(descending=True, stable=True).indices).int()


@triton.jit
def tail_order_kernel(counts, order, counter, tiles, TAIL: tl.constexpr, PART: tl.constexpr):
    """Rank PART tiles among the TAIL. Grid TAIL / PART; the first program sets the counter to 0.

    Args:
        counts: pointer to int32 [tiles]. order: pointer to int32 [TAIL].
    """
    first = tl.maximum(tiles - TAIL, 0)
    places = tl.arange(0, TAIL)
    inside = first + places < tiles
    lengths = tl.load(counts + first + places, mask=inside, other=-1)
    mine = tl.program_id(0) * PART + tl.arange(0, PART)
    length = tl.load(counts + first + mine, mask=first + mine < tiles, other=-1)
    longer = lengths[None, :] > length[:, None]
    earlier = (lengths[None, :] == length[:, None]) & (places[None, :] < mine[:, None])
    rank = tl.sum((longer | earlier).to(tl.int32), 1)
    tl.store(order + rank, first + mine, mask=first + mine < tiles)
    if tl.program_id(0) == 0:
        tl.store(counter, 0)


def order_tail(counts: Tensor, tail: int) -> tuple[Tensor, Tensor]:
    """What a launch of the attention kernel starts from.

    Args:
        counts: int32 [B, H, Tq], contiguous.
        tail: tiles that go by length; 0 or a power of two, at least 8.

    Returns:
        order int32 [tail], as :func:`reference`, unspecified beyond its length; counter int32 [1], 0.
    """
    if tail == 0:
        counter = counts.new_zeros(1)
        return counter, counter
    made = counts.new_empty(tail + 1)
    order, counter = made.split((tail, 1))
    launchable(tail_order_kernel)[(tail // PART,)](
        counts, order, counter, counts.numel(), TAIL=tail, PART=PART
    )
    return order, counter
