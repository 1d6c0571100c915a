"""The orders themselves: permutations, compact blocks, and a curve that steps to neighbours."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from haste_compile.config import TOKEN_ORDERS
from haste_compile.token_order import (
    Grid,
    describe,
    hilbert_curve,
    order_tensor,
    spread,
    tile_shape,
    token_order,
)

#: nano-wan, Wan at 480p and 720p (the latter takes a second or two a curve), and awkward ones.
GRIDS: list[tuple[Grid, int]] = [
    ((9, 16, 16), 64),
    ((21, 30, 52), 128),
    ((5, 8, 8), 64),
    ((3, 5, 7), 64),
    ((1, 13, 31), 128),
    ((17, 1, 19), 64),
    ((2, 2, 2), 64),
]


@pytest.mark.parametrize("name", TOKEN_ORDERS)
@pytest.mark.parametrize(("grid", "block"), GRIDS, ids=str)
def test_every_order_is_a_permutation(name: str, grid: Grid, block: int) -> None:
    count = grid[0] * grid[1] * grid[2]
    order = order_tensor("token_order", name, grid, block)
    assert order.dtype == torch.int64 and torch.equal(order.sort().values, torch.arange(count))
    inverse = order_tensor("token_order_inverse", name, grid, block)
    x = torch.rand(count)
    assert torch.equal(x[order][inverse], x)
    is_raster = name == "raster" or (name == "tile3d" and tile_shape(grid, block) == grid)
    assert torch.equal(order, torch.arange(count)) == is_raster or count == 8


def test_every_small_box_is_walked_once() -> None:
    for grid in itertools.product(range(1, 8), repeat=3):
        cells = hilbert_curve(grid)
        assert sorted(cells) == list(itertools.product(*map(range, grid))), grid


@pytest.mark.parametrize(
    ("grid", "share"),
    [
        ((8, 8, 8), 1.0),
        ((2, 4, 8), 1.0),
        ((16, 4, 4), 1.0),
        ((1, 8, 8), 1.0),
        ((9, 16, 16), 1.0),
        ((21, 30, 52), 0.99),
        ((9, 17, 13), 0.98),
        ((3, 5, 7), 0.94),
    ],
    ids=str,
)
def test_the_curve_steps_to_neighbours(grid: Grid, share: float) -> None:
    cells = torch.tensor(hilbert_curve(grid))
    steps = cells.diff(dim=0).abs().sum(1)
    assert (steps == 1).double().mean() >= share
    assert steps.max() <= 2  # where parity forbids a neighbour, the curve takes the nearest cell


def test_whole_tiles_are_blocks_and_come_first() -> None:
    assert tile_shape((9, 16, 16), 64) == (4, 4, 4)
    order = token_order("tile3d", (9, 16, 16), 64)
    places = torch.stack(torch.unravel_index(order, (9, 16, 16)), 1)
    blocks = places.view(36, 64, 3)
    extent = blocks.amax(1) - blocks.amin(1) + 1
    assert (extent[:32] == 4).all()  # two layers of 4 frames, each of 4×4 tiles
    assert (places[32 * 64 :, 0] == 8).all()  # the ninth frame is left
    assert torch.equal(blocks[:32].amin(1) % 4, torch.zeros(32, 3, dtype=torch.long))


def test_the_tile_is_the_tightest_of_its_volume() -> None:
    """By an independent count over all tiles, in the grid of Wan at 480p with its three ragged sides."""
    grid, block = (21, 30, 52), 128
    best = tile_shape(grid, block)
    assert best[0] * best[1] * best[2] == block
    chosen = _scatter(token_order("tile3d", grid, block), grid, block)
    assert chosen == pytest.approx(spread(token_order("tile3d", grid, block), grid, block))
    assert chosen < 0.05 * _scatter(token_order("raster", grid, block), grid, block)


def test_a_grid_too_small_for_any_tile_stays_in_raster_order() -> None:
    assert tile_shape((3, 5, 7), 64) == (3, 5, 7)
    assert torch.equal(token_order("tile3d", (3, 5, 7), 64), torch.arange(105))


@pytest.mark.parametrize("name", ["tile3d", "hilbert"])
@pytest.mark.parametrize(("grid", "block"), GRIDS[:3], ids=str)
def test_blocks_are_compacter_than_in_raster_order(name: str, grid: Grid, block: int) -> None:
    found, raster = (_scatter(token_order(n, grid, block), grid, block) for n in (name, "raster"))
    assert found < 0.6 * raster


def test_words() -> None:
    assert describe("tile3d", (9, 16, 16), 64) == "tile3d (4×4×4 in a grid of 9×16×16)"
    assert describe("hilbert", (9, 16, 16), 64) == "hilbert (a grid of 9×16×16)"


def _scatter(order: Tensor, grid: Grid, block: int) -> float:
    """Mean squared distance from the block's centre, block by block."""
    places = torch.stack(torch.unravel_index(order, grid), 1).double()
    parts = [(piece - piece.mean(0)).square().sum() for piece in places.split(block)]
    return float(sum(parts)) / len(order)
