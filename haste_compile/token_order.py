"""Orders of the video tokens. A block is a run of consecutive tokens: the order decides what shares a block.

A transformer flattens its grid of T×H×W tokens in raster order: time, then rows, then columns. A block of 64
tokens is then a few long rows of one frame, and a neighbourhood in space and time is spread over many blocks.
The other orders (ours) make a block a compact piece of the grid:

* ``tile3d``: tiles of t×h×w tokens, one after another. The tile has as many tokens as a block. Of the tiles
  of that volume with sides that are powers of two, it is the one whose blocks come out tightest: with the
  least mean squared distance of a token from the centre of its block. Tiles that the grid holds whole come
  first, so that each of them is exactly one block; those that its edges cut follow.
* ``hilbert``: a Hilbert curve, generalised to boxes whose sides are no powers of two. Runs of any length are
  compact, though their shapes vary.

Attention does not depend on the order of its keys, so with full masks every order gives the same video.
"""

from __future__ import annotations

import functools
import itertools
from typing import TypeAlias

import torch
from torch import Tensor

#: Frames, rows and columns of the token grid.
Grid: TypeAlias = tuple[int, int, int]

#: The two index tensors that a graph in another order needs: into the order, and back to raster order.
ORDER_FIELDS = ("token_order", "token_order_inverse")


@functools.lru_cache(maxsize=32)
def token_order(name: str, grid: Grid, block: int) -> Tensor:
    """Raster index of every token, in the order asked for: ``x.index_select(axis, token_order(...))``.

    Args:
        name: one of ``config.TOKEN_ORDERS``.
        grid: [T, H, W] of the tokens.
        block: tokens a block.

    Returns:
        int64 [T·H·W], a permutation, on the CPU; cached, so not to be written to.
    """
    if name == "tile3d":
        return _tiles_in_turn(grid, tile_shape(grid, block))
    if name == "hilbert":
        return torch.tensor(_raster_indices(hilbert_curve(grid), grid))
    return torch.arange(grid[0] * grid[1] * grid[2])


def order_tensor(field: str, name: str, grid: Grid, block: int) -> Tensor:
    """A new tensor for one of ``ORDER_FIELDS``: int64 [T·H·W] on the CPU."""
    order = token_order(name, grid, block)
    return order.argsort() if field == ORDER_FIELDS[1] else order.clone()


def describe(name: str, grid: Grid, block: int) -> str:
    """The order in a few words, such as "tile3d (4×4×4 in a grid of 9×16×16)"."""
    size = "×".join(map(str, grid))
    if name == "tile3d":
        return f"tile3d ({'×'.join(map(str, tile_shape(grid, block)))} in a grid of {size})"
    return f"{name} (a grid of {size})"


@functools.lru_cache(maxsize=32)
def tile_shape(grid: Grid, block: int) -> Grid:
    """The tile of ``tile3d``; the whole grid, hence raster order, where no tile of that volume fits in."""
    sides = [2**i for i in range(block.bit_length())]
    tiles = [
        (t, h, w)
        for t, h, w in itertools.product(sides, repeat=3)
        if t * h * w == block and t <= grid[0] and h <= grid[1] and w <= grid[2]
    ]
    return min(tiles, key=lambda tile: spread(_tiles_in_turn(grid, tile), grid, block), default=grid)


def spread(order: Tensor, grid: Grid, block: int) -> float:
    """Mean squared distance of a token from the centre of its block, in steps of the grid."""
    places = torch.stack(torch.unravel_index(order, grid), 1).double()  # [N, 3]
    blocks = torch.arange(len(order)) // block
    count = torch.bincount(blocks).double()[:, None]
    centres = torch.zeros(len(count), 3, dtype=torch.float64).index_add_(0, blocks, places) / count
    return round(float((places - centres[blocks]).square().sum(1).mean()), 9)


def _tiles_in_turn(grid: Grid, tile: Grid) -> Tensor:
    """Tokens tile by tile, whole tiles first, either kind to and fro through the grid; raster in a tile."""
    places = torch.unravel_index(torch.arange(grid[0] * grid[1] * grid[2]), grid)
    numbers = [place // side for place, side in zip(places, tile, strict=True)]
    key = torch.zeros_like(places[0])
    for number, side, size in zip(numbers, tile, grid, strict=True):
        key |= (number + 1) * side > size  # cut by an edge
    turn = torch.zeros_like(key)
    for number, side, size in zip(numbers, tile, grid, strict=True):
        count = -(-size // side)
        turn = turn * count + torch.where(turn % 2 == 1, count - 1 - number, number)
    return (key * len(key) + turn).argsort(stable=True)


def _raster_indices(cells: list[Grid], grid: Grid) -> list[int]:
    return [(t * grid[1] + h) * grid[2] + w for t, h, w in cells]


def hilbert_curve(grid: Grid) -> list[Grid]:
    """The cells of a box, each once, along a curve that nearly always steps to a face neighbour.

    A box is walked from one corner to the corner at the other end of its *main* side. As in Hilbert's
    construction it is cut in half along its sides, and the pieces are walked, turned and mirrored, so that
    each ends beside the corner where the next begins. With main side a and halves lo, hi of each side, in the
    order of a Gray code over the octants:

        a lo, b lo, c lo   along b        a hi, b hi, c all   back along c
        a lo, b hi, c all  along c        a hi, b lo, c lo    back along b
        a all, b lo, c hi  along a

    A box that is flat in c keeps c whole (a lo, b lo along b; b hi along a; a hi, b lo back along b), and one
    whose main side is much the longest is only cut across it. Halves are even where they can be: a box with
    an odd main side and an even number of cells has no path between the two corners, since steps to face
    neighbours change the colour of a chessboard.
    """
    axes = sorted(range(3), key=lambda axis: -grid[axis])
    along: tuple[Grid, Grid, Grid] = (grid[0], 0, 0), (0, grid[1], 0), (0, 0, grid[2])
    cells: list[Grid] = []
    _walk((0, 0, 0), along[axes[0]], along[axes[1]], along[axes[2]], cells)
    return cells


def _walk(start: Grid, a: Grid, b: Grid, c: Grid, cells: list[Grid]) -> None:
    """Append the cells of the box that the signed vectors a, b, c span from ``start``, along a."""
    la, lb, lc = (abs(sum(side)) for side in (a, b, c))
    if 0 in (la, lb, lc):
        return
    if lb < lc:
        b, c, lb, lc = c, b, lc, lb
    if lb == 1:  # a line
        cells += [_move(start, _unit(a), i) for i in range(la)]
    elif la == 1:  # the corner promised is the first cell: any other end will do
        _walk(start, b, c, a, cells)
    elif 2 * la > 3 * lb:
        lo, hi = _halves(a)
        _walk(start, lo, b, c, cells)
        _walk(_move(start, lo), hi, b, c, cells)
    elif 3 * lb > 4 * lc:
        (a_lo, a_hi), (b_lo, b_hi) = _halves(a), _halves(b)
        end = _move(start, a, 1, back=a)
        _walk(start, b_lo, c, a_lo, cells)
        _walk(_move(start, b_lo), a, c, b_hi, cells)
        _walk(_move(end, b_lo, 1, back=b), _flip(b_lo), c, _flip(a_hi), cells)
    else:
        (a_lo, a_hi), (b_lo, b_hi), (c_lo, c_hi) = _halves(a), _halves(b), _halves(c)
        end = _move(start, a, 1, back=a)
        _walk(start, b_lo, c_lo, a_lo, cells)
        _walk(_move(start, b_lo), c, a_lo, b_hi, cells)
        _walk(_move(_move(start, b_lo, 1, back=b), c, 1, back=c), a, _flip(b_lo), _flip(c_hi), cells)
        _walk(_move(_move(end, b_lo), c, 1, back=c), _flip(c), _flip(a_hi), b_hi, cells)
        _walk(_move(end, b_lo, 1, back=b), _flip(b_lo), c_lo, _flip(a_hi), cells)


def _halves(side: Grid) -> tuple[Grid, Grid]:
    """A side in two: the first half even where that leaves something for the second."""
    length = abs(sum(side))
    half = length // 2
    half += half % 2 if length > 2 else 0
    unit = _unit(side)
    return _move((0, 0, 0), unit, half), _move((0, 0, 0), unit, length - half)


def _unit(side: Grid) -> Grid:
    length = abs(sum(side))
    return side[0] // length, side[1] // length, side[2] // length


def _flip(side: Grid) -> Grid:
    return -side[0], -side[1], -side[2]


def _move(place: Grid, along: Grid, times: int = 1, *, back: Grid | None = None) -> Grid:
    """``place`` moved by a vector; ``back``: then one cell against that vector's direction."""
    t, h, w = (p + times * step for p, step in zip(place, along, strict=True))
    if back is not None:
        unit = _unit(back)
        t, h, w = t - unit[0], h - unit[1], w - unit[2]
    return t, h, w
