"""The forms of the kernel by name, for benchmarks and GPU tests; users get what ``dispatch`` picks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from haste_compile.kernels.variable_block_attention import hopper, kernel

#: (q, k, v, order, offsets, mask, ctl, scale=) -> out, lse.
Attend = Callable[..., tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of the kernel.

    Attributes:
        attend: as ``kernel.attend``.
        capabilities: major compute capabilities that it runs on; empty: all from 8 on.
        confirmed: a GPU has run it and its output was checked; what is not may hang, so its first run belongs
            in a child process with a time limit.
    """

    attend: Attend
    capabilities: tuple[int, ...]
    confirmed: bool

    def refuses(self, capability: tuple[int, int]) -> str | None:
        """Why it does not run on that device; None where it does."""
        if self.capabilities and capability[0] not in self.capabilities:
            return f"needs compute capability {self.capabilities[0]}, not {capability[0]}.{capability[1]}"
        return None


def _scheduled(schedule: hopper.Schedule) -> Attend:
    def attend(*inputs: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return hopper.attend(*inputs, scale=scale, schedule=schedule)  # type: ignore[call-arg,misc,arg-type]

    return attend


VARIANTS: dict[str, Variant] = {
    "triton": Variant(kernel.attend, (), confirmed=True),
    "gluon": Variant(_scheduled(hopper.Schedule()), (9,), confirmed=True),
    "gluon, 3 stages": Variant(
        _scheduled(hopper.Schedule(stages=3, q_stages=1)), (9,), confirmed=True
    ),
    "gluon, tiles in order": Variant(
        _scheduled(hopper.Schedule(small_last=False)), (9,), confirmed=True
    ),
}  # fmt: skip
