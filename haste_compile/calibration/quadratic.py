"""Allocation that knows of interactions between heads (ours).

The joint error of a choice c is ‖Σ_h x_{h,c(h)}‖² / R, where x_{h,k} ∈ R^R are the inner products of the
gradient form's R probes with what head h changes at candidate k. The additive programme keeps the diagonal of
that quadratic form only. Here a local search starts from its solution and changes one head, or two at a time,
while the joint error falls and the budget holds.
"""

from __future__ import annotations

import numpy as np

from haste_compile.calibration.allocate import allocate

#: Single changes that are paired with each other in one round: the best of either direction.
_PAIRED = 512
_ROUNDS = 2000


def joint_error(products: np.ndarray, choice: np.ndarray) -> float:
    """The error that the probes predict for all heads sparse at once.

    Args:
        products: inner products, float64 [R, heads, K].
        choice: int64 [heads].
    """
    chosen = products[:, np.arange(products.shape[1]), choice].sum(1)
    return float(chosen @ chosen / len(chosen))


def allocate_quadratic(
    products: np.ndarray, errors: np.ndarray, sparsity: np.ndarray, least: float
) -> np.ndarray:
    """One candidate for each head, by local search on the joint error.

    Args:
        products: inner products, float64 [R, heads, K].
        errors, sparsity, least: as for ``allocate``.

    Returns:
        int64 [heads]; its predicted joint error is at most that of the additive solution.

    Raises:
        BudgetError, DependencyError: as ``allocate``.
    """
    choice = allocate(errors, sparsity, least)
    heads = np.arange(len(choice))
    for _ in range(_ROUNDS):
        now = products[:, heads, choice]
        residual = now.sum(1)
        step = products - now[:, :, None]
        gain = (2 * np.einsum("r,rhk->hk", residual, step) + np.einsum("rhk,rhk->hk", step, step)) / len(
            residual
        )
        saved = (sparsity - sparsity[heads, choice][:, None]) / len(choice)
        spare = sparsity[heads, choice].mean() - least
        move = _best_move(gain, saved, step, spare)
        if move is None:
            break
        for head, option in move:
            choice[head] = option
    return choice


def _best_move(
    gain: np.ndarray, saved: np.ndarray, step: np.ndarray, spare: float
) -> list[tuple[int, int]] | None:
    """The change of one head, or of two, that lowers the joint error most within the budget; None for none.

    Args:
        gain: change of the joint error by each single change, [heads, K]; ``saved``: that of the sparsity.
        step: change of the inner products, [R, heads, K].
        spare: sparsity above the budget.
    """
    least_gain = 1e-12 * max(float(np.abs(gain).max()), 1e-30)
    allowed = np.where(saved >= -spare - 1e-12, gain, np.inf)
    single = np.unravel_index(allowed.argmin(), gain.shape)
    best, move = float(allowed[single]), [(int(single[0]), int(single[1]))]

    flat_gain, flat_saved = gain.ravel(), saved.ravel()
    options = gain.shape[1]
    denser = _first(np.flatnonzero(flat_saved < 0), flat_gain)
    sparser = _first(np.flatnonzero(flat_saved > 0), flat_gain)
    if len(denser) and len(sparser):
        flat_step = step.reshape(len(step), -1)
        cross = 2 * flat_step[:, denser].T @ flat_step[:, sparser] / len(step)
        both = flat_gain[denser][:, None] + flat_gain[sparser] + cross
        saves = flat_saved[denser][:, None] + flat_saved[sparser]
        same_head = (denser // options)[:, None] == sparser // options
        both[(saves < -spare - 1e-12) | same_head] = np.inf
        i, j = np.unravel_index(both.argmin(), both.shape)
        if both[i, j] < best:
            best = float(both[i, j])
            move = [divmod(int(denser[i]), options), divmod(int(sparser[j]), options)]
    return move if best < -least_gain else None


def _first(indices: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return indices[np.argsort(gain[indices], kind="stable")[:_PAIRED]]
