"""What a calibration is asked to do, in one frozen and validated dataclass."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from haste_compile.calibration.allocate import Budget
from haste_compile.calibration.objective import BandWeights
from haste_compile.errors import OptionError

#: Prompts that the exact form draws from, one a head (HASTE).
_EXACT_POOL = 10
_GRADIENT_VIDEOS = 2


@dataclasses.dataclass(frozen=True)
class Settings:
    """How thresholds are calibrated.

    Attributes:
        method: "gradient" (ours), or "exact", the paper's form.
        candidates: thresholds a head may get, in (0, 1]; a "shared" budget adds its own.
        budget: see ``allocate.Budget``.
        allocator: "additive", or "quadratic", which knows of interactions and needs the gradient form.
        videos: dense videos whose states are measured, each with a prompt and a seed of its own; in the exact
            form every head draws one of them. None: 2, or 10 in the exact form, as far as there are prompts.
        intervals: how many equal intervals the steps are cut into, or their bounds, first and last step;
            every video is measured at one step drawn from each.
        branches: "both" guidance branches are measured at a drawn step, or only the "conditional" one.
        probes: probes sent backwards at each state, in the gradient form.
        weights: of the bands of the objective.
        delta: "keep" the option's δ for all heads, or "choose" one for each (gradient form).
        ages: steps after which stale masks are tried, ascending, where δ is chosen.
        tolerance: what a stale mask may cost beyond a fresh one, as a share.
        held_out: prompts on which the result is compared with dense in the end. They, and in any case a sixth
            of the pool, are kept out of calibration.
        keep_products: store the probes' inner products, so that a budget can be met anew with interactions.
        seed: of every draw.
    """

    method: Literal["gradient", "exact"] = "gradient"
    candidates: tuple[float, ...] = (0.85, 0.90, 0.95)
    budget: str = "shared:0.9"
    allocator: Literal["additive", "quadratic"] = "additive"
    videos: int | None = None
    intervals: int | tuple[tuple[int, int], ...] = 4
    branches: Literal["both", "conditional"] = "both"
    probes: int = 3
    weights: BandWeights = BandWeights()
    delta: Literal["keep", "choose"] = "keep"
    ages: tuple[int, ...] = (1, 2, 4)
    tolerance: float = 0.25
    held_out: int = 0
    keep_products: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("method", ("gradient", "exact")),
            ("allocator", ("additive", "quadratic")),
            ("branches", ("both", "conditional")),
            ("delta", ("keep", "choose")),
        ):
            if getattr(self, name) not in allowed:
                raise _wrong(name, getattr(self, name), "one of " + ", ".join(map(repr, allowed)))
        Budget.parse(self.budget)
        if not self.candidates or any(not 0 < c <= 1 for c in self.candidates):
            raise _wrong("candidates", self.candidates, "thresholds in (0, 1]")
        for name, low in (("videos", 1), ("probes", 1), ("held_out", 0)):
            value = getattr(self, name)
            if not (name == "videos" and value is None) and (not _is_integer(value) or value < low):
                raise _wrong(name, value, f"an integer of at least {low}")
        if not _is_integer(self.seed):
            raise _wrong("seed", self.seed, "an integer")
        if self.tolerance < 0:
            raise _wrong("tolerance", self.tolerance, "a number of at least 0")
        if not self.ages or list(self.ages) != sorted(set(self.ages)) or self.ages[0] < 1:
            raise _wrong("ages", self.ages, "ascending numbers of steps, at least 1")
        self._check_intervals()
        if self.method == "exact" and (self.allocator == "quadratic" or self.delta == "choose"):
            raise _wrong("method", self.method, "'gradient' for allocator='quadratic' and delta='choose'")

    def _check_intervals(self) -> None:
        bounds = self.intervals
        if _is_integer(bounds):
            if bounds < 1:  # type: ignore[operator]
                raise _wrong("intervals", bounds, "at least 1")
        elif not isinstance(bounds, tuple) or any(len(b) != 2 or not 0 <= b[0] <= b[1] for b in bounds):
            raise _wrong("intervals", bounds, "a number, or pairs (first step, last step)")

    @property
    def measured(self) -> tuple[float, ...]:
        """The thresholds that are measured, ascending: the candidates and a shared budget's."""
        budget = Budget.parse(self.budget)
        extra = (budget.value,) if budget.kind == "shared" else ()
        return tuple(sorted({*self.candidates, *extra}))

    def video_count(self, prompts: int) -> int:
        """How many videos are measured when there are so many prompts."""
        if self.videos is not None:
            return self.videos
        return _GRADIENT_VIDEOS if self.method == "gradient" else min(_EXACT_POOL, max(prompts, 1))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(name: str, value: Any, wanted: str) -> OptionError:
    return OptionError(found=repr(value), wanted=wanted, where=f"option {name}", fix="Correct the value.")
