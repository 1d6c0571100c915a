"""The forms of the attention kernel by name, for benchmarks and GPU tests; users get what ``dispatch`` picks.

A form that no GPU has confirmed yet stays here until a run has checked and timed it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from haste_compile.kernels.block_mask import BlockMask
from haste_compile.kernels.block_sparse_attention import hopper, kernel
from haste_compile.kernels.block_sparse_attention.launch import Launch

#: (q, k, v, mask, block=, scale=) -> out, lse.
Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of the kernel.

    Attributes:
        attend: as ``kernel.attend``.
        capabilities: major compute capabilities that it runs on; empty: all from 8 on.
        blocks: block sizes that it takes.
        confirmed: a GPU has run it and its output was checked; what is not may hang, so its first run belongs
            in a child process with a time limit.
    """

    attend: Attend
    capabilities: tuple[int, ...]
    blocks: tuple[int, ...]
    confirmed: bool

    def refuses(self, capability: tuple[int, int], block: int) -> str | None:
        """Why it does not run on that device with that block; None where it does."""
        if self.capabilities and capability[0] not in self.capabilities:
            return f"needs compute capability {self.capabilities[0]}, not {capability[0]}.{capability[1]}"
        return None if block in self.blocks else f"needs blocks of {self.blocks[0]}, not {block}"


def _launched(launch: Launch | None) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        return kernel.attend(q, k, v, mask, block=block, scale=scale, launch=launch)

    return attend


def _scheduled(schedule: hopper.Schedule) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        return hopper.attend(q, k, v, mask, block=block, scale=scale, schedule=schedule)

    return attend


VARIANTS: dict[str, Variant] = {
    "triton": Variant(_launched(None), (), (64, 128), confirmed=True),
    "triton, pointers": Variant(
        _launched(Launch(tma=False, num_warps=8, num_stages=2, parts=2)),
        (8, 9), (64, 128), confirmed=True,
    ),
    "triton, descriptors made on the device": Variant(
        _launched(Launch(tma=True, num_warps=8, num_stages=2, host_descriptors=False)),
        (9,), (128,), confirmed=False,
    ),
    "gluon": Variant(_scheduled(hopper.Schedule()), (9,), (128,), confirmed=True),
    "gluon, in turns": Variant(
        _scheduled(hopper.Schedule(in_turns=True)), (9,), (128,), confirmed=True
    ),
    "gluon, no tail": Variant(_scheduled(hopper.Schedule(tail=0)), (9,), (128,), confirmed=True),
    "gluon, 3 stages": Variant(
        _scheduled(hopper.Schedule(stages=3, q_stages=1)), (9,), (128,), confirmed=True
    ),
}  # fmt: skip
