"""Several processes on one calibration: who does which unit, and when all are done.

Under ``torchrun`` every rank takes every world-size-th unit that the journal lacks. A unit depends on nothing
but the plan, and sums run over units in the plan's order, so the result does not depend on their number.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch.distributed as dist

_T = TypeVar("_T")
#: Ranks may be hours apart: one has a state more than another.
_PATIENCE = datetime.timedelta(days=7)


class Ranks:
    """This process among those that work on the same calibration."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, units: Sequence[_T]) -> list[_T]:
        """The units that fall to this rank."""
        return list(units[self.rank :: self.count])

    def wait(self) -> None:
        """Until every rank is here."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The ranks that ``torchrun`` started, or this process alone. Uses gloo: only barriers are exchanged."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield Ranks(0, 1)
    elif dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size())
        finally:
            dist.destroy_process_group()
