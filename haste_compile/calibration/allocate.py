"""Candidate thresholds to heads: the least summed error under a budget of mean sparsity (HASTE, EBC).

    minimise  Σ_{h,k} E[h,k] x[h,k]   where  Σ_k x[h,k] = 1  for every head,  mean_h Σ_k S[h,k] x[h,k] ≥ S_min

An integer programme, solved by ``scipy.optimize.milp``. Heads of all sites of a transformer are one list.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence

import numpy as np

from haste_compile.errors import BudgetError, OptionError
from haste_compile.loading import import_optional

#: Sparsity by which a rounded solution may fall short of the budget.
_SLACK = 1e-9


@dataclasses.dataclass(frozen=True)
class Budget:
    """A lower bound for the mean sparsity of all heads.

    Attributes:
        kind: "sparsity"; "density" (1 − sparsity); or "shared": what one threshold for all heads realises,
            the paper's choice.
        value: the sparsity or density, or the shared threshold.
    """

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """From "sparsity:0.6", "density:0.4", "shared:0.9", or a number that is the mean sparsity.

        Raises:
            OptionError: none of these, or a value out of range.
        """
        kind, colon, number = str(text).partition(":")
        if not colon:
            kind, number = "sparsity", kind
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        if kind not in ("sparsity", "density", "shared") or not 0 < value <= 1:
            raise OptionError(
                found=repr(text),
                wanted="'sparsity:S', 'density:D' or 'shared:τ' with a number in (0, 1]",
                where="option budget",
                fix="Write it like budget='density:0.4'.",
            )
        return cls(kind, value)

    def least_sparsity(self, sparsity: np.ndarray, candidates: Sequence[float]) -> float:
        """S_min for heads whose sparsity at each candidate was measured, [heads, K].

        Raises:
            BudgetError: "shared" with a threshold that was not measured.
        """
        if self.kind == "sparsity":
            return self.value
        if self.kind == "density":
            return 1.0 - self.value
        near = [k for k, top_p in enumerate(candidates) if abs(top_p - self.value) < 1e-6]
        if not near:
            raise BudgetError(
                found=f"shared:{self.value:g}",
                wanted="one of the measured thresholds " + ", ".join(f"{c:g}" for c in candidates),
                where="option budget",
                fix="Choose one of them, or calibrate again with that threshold among the candidates.",
            )
        return float(sparsity[:, near[0]].mean())


def allocate(errors: np.ndarray, sparsity: np.ndarray, least: float) -> np.ndarray:
    """One candidate for each head by the additive programme.

    Args:
        errors: E, float64 [heads, K], finite; ``sparsity``: S, of the same shape.
        least: S_min.

    Returns:
        int64 [heads], index of each head's candidate.

    Raises:
        BudgetError: no choice is that sparse; the message gives the range of what is.
        DependencyError: scipy is missing.
    """
    optimize = import_optional("scipy.optimize", extra="calibrate")
    sparse = import_optional("scipy.sparse", extra="calibrate")
    check_feasible(sparsity, least)
    heads, options = errors.shape
    # Errors span many orders of magnitude; the solver's tolerances are absolute.
    scale = float(errors.max()) or 1.0
    one_each = sparse.kron(sparse.eye(heads), np.ones((1, options)), format="csr")
    constraints = [
        optimize.LinearConstraint(one_each, 1, 1),
        optimize.LinearConstraint(sparsity.reshape(1, -1), heads * (least - _SLACK), np.inf),
    ]
    with _quiet():
        solved = optimize.milp(
            (errors / scale).ravel() * heads,
            integrality=np.ones(heads * options),
            bounds=optimize.Bounds(0, 1),
            constraints=constraints,
            options={"mip_rel_gap": 1e-6},
        )
    if solved.x is None:
        raise BudgetError(
            found=f"no solution ({solved.message})",
            wanted=f"a mean sparsity of at least {least:.4f}",
            where="option budget",
            fix="Ask for a little less.",
        )
    return solved.x.reshape(heads, options).argmax(1)


def check_feasible(sparsity: np.ndarray, least: float) -> None:
    """Raise ``BudgetError`` where even the sparsest choice of every head is not sparse enough."""
    low, high = sparsity.min(1).mean(), sparsity.max(1).mean()
    if least > high + _SLACK:
        raise BudgetError(
            found=f"a mean sparsity of {least:.4f} (density {1 - least:.4f})",
            wanted=f"a sparsity between {low:.4f} and {high:.4f} (density {1 - high:.4f} to {1 - low:.4f})",
            where="option budget",
            fix="Ask for less sparsity, or calibrate with lower candidate thresholds.",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the solver's C code, which prints on file descriptor 1, from spoiling our output."""
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
