"""Allocation against brute force; budgets; interactions; δ."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from haste_compile.calibration.allocate import Budget, allocate
from haste_compile.calibration.drift import FREEZE, choose_delta
from haste_compile.calibration.quadratic import allocate_quadratic, joint_error
from haste_compile.errors import BudgetError, OptionError


def problem(
    seed: int, heads: int = 5, options: int = 3
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Errors over many orders of magnitude that fall with the threshold, sparsities that fall too."""
    rng = np.random.default_rng(seed)
    errors = -np.sort(-(10.0 ** rng.uniform(-9, -2, (heads, options))), axis=1)
    sparsity = -np.sort(-rng.uniform(0, 1, (heads, options)), axis=1)
    return errors, sparsity, rng


def choices(heads: int, options: int) -> np.ndarray:
    return np.array(list(itertools.product(range(options), repeat=heads)))


@pytest.mark.parametrize("seed", range(20))
def test_additive_is_the_best_of_all_choices(seed: int) -> None:
    errors, sparsity, rng = problem(seed)
    least = rng.uniform(sparsity.min(1).mean(), sparsity.max(1).mean())
    every = choices(5, 3)
    rows = np.arange(5)
    allowed = every[sparsity[rows, every].mean(1) >= least - 1e-12]
    wanted = errors[rows, allowed].sum(1).min()
    found = allocate(errors, sparsity, least)
    assert sparsity[rows, found].mean() >= least - 1e-8
    assert errors[rows, found].sum() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("seed", range(10))
def test_quadratic_is_close_to_the_best_and_never_worse_than_additive(seed: int) -> None:
    errors, sparsity, rng = problem(seed)
    products = rng.normal(size=(16, 5, 1)) * np.sqrt(errors) + 0.3 * rng.normal(size=(16, 5, 3)) * np.sqrt(
        errors
    )
    errors = np.square(products).mean(0)
    least = float(np.quantile(sparsity, 0.4))
    rows, every = np.arange(5), choices(5, 3)
    allowed = every[sparsity[rows, every].mean(1) >= least - 1e-12]
    best = min(joint_error(products, choice) for choice in allowed)
    additive = joint_error(products, allocate(errors, sparsity, least))
    choice = allocate_quadratic(products, errors, sparsity, least)
    assert sparsity[rows, choice].mean() >= least - 1e-8
    assert best - 1e-15 <= joint_error(products, choice) <= additive
    assert joint_error(products, choice) <= best + 0.25 * (additive - best) + 1e-15


def test_quadratic_sees_heads_that_cancel() -> None:
    """Two heads whose errors are opposite cost nothing together; the additive sum cannot know."""
    signal = np.array([1.0, -2.0, 0.5, 3.0])
    products = np.zeros((4, 3, 2))
    products[:, 0, 0], products[:, 1, 0], products[:, 2, 0] = signal, -signal, 0.8 * signal
    errors = np.square(products).mean(0)
    sparsity = np.tile([0.9, 0.0], (3, 1))
    assert allocate(errors, sparsity, 0.3).tolist() == [1, 1, 0]
    assert allocate_quadratic(products, errors, sparsity, 0.3).tolist() == [0, 0, 1]


def test_a_budget_beyond_reach_names_the_range() -> None:
    errors, sparsity, _ = problem(0)
    with pytest.raises(BudgetError, match="between") as caught:
        allocate(errors, sparsity, 1.0)
    low, high = sparsity.min(1).mean(), sparsity.max(1).mean()
    assert f"{low:.4f} and {high:.4f}" in str(caught.value)
    assert allocate(errors, sparsity, high).tolist() == sparsity.argmax(1).tolist()


def test_a_loose_budget_takes_the_least_error() -> None:
    errors, sparsity, _ = problem(1)
    assert allocate(errors, sparsity, 0.0).tolist() == errors.argmin(1).tolist()


def test_fourteen_billion_sized_problem() -> None:
    errors, sparsity, _ = problem(2, heads=1600, options=8)
    found = allocate(errors, sparsity, 0.6)
    assert sparsity[np.arange(1600), found].mean() >= 0.6 - 1e-7


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    errors, sparsity, _ = problem(3, heads=100, options=8)
    os.write(1, b"before|")
    allocate(errors, sparsity, 0.5)
    os.write(1, b"after")
    assert capfd.readouterr().out == "before|after"


@pytest.mark.parametrize(
    ("text", "least"),
    [("sparsity:0.6", 0.6), ("0.6", 0.6), (0.6, 0.6), ("density:0.3", 0.7), ("shared:0.9", 0.35)],
)
def test_budgets(text: str | float, least: float) -> None:
    sparsity = np.array([[0.8, 0.5], [0.6, 0.2]])
    assert Budget.parse(text).least_sparsity(sparsity, [0.5, 0.9]) == pytest.approx(least)


@pytest.mark.parametrize("text", ["", "shared", "speed:2", "sparsity:0", "density:1.5", "shared:nan"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="budget"):
        Budget.parse(text)


def test_a_shared_threshold_that_was_not_measured_is_refused() -> None:
    with pytest.raises(BudgetError, match="0.5, 0.9"):
        Budget.parse("shared:0.7").least_sparsity(np.ones((2, 2)), [0.5, 0.9])


def test_delta_follows_staleness() -> None:
    drift = np.array([[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]])[:, None]
    stale = np.array([[9.0, 1.0, 1.0, 1.0], [9.0, 9.0, 1.2, 9.0], [9.0, 9.0, 1.3, 1.0]])[:, None]
    fresh = np.ones((1, 4))
    # Never good enough; good for one step; always good; good again later does not count.
    chosen = choose_delta(drift, stale, fresh, tolerance=0.3)
    assert chosen.tolist() == [[0.0, 1.0, FREEZE, 1.0]]
