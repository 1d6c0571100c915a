"""Launch configuration of k-means, computed from what the GPU can do."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Launch configuration.

    Attributes:
        tokens, centroids: tile of ``assign``; ``turns`` tiles of tokens, one after the other, are a chunk.
        owned: centroids of a bucket; ``members``: tokens that ``update`` multiplies at a time.
        chunks: whose counts ``scan`` reads at a time; ``dealt``: tokens that ``place`` and ``sort`` read.
        num_warps, num_stages: of the kernel.
        kinds: columns that a tile of distances is folded to; ``centroids``: not at all.
        programs: of a multiprocessor; one computes minima while another one's products run.
        registers: of a thread at most, so that they fit; what spills must not be inside of a loop.
    """

    tokens: int
    centroids: int
    turns: int
    owned: int
    members: int
    chunks: int
    dealt: int
    num_warps: int
    num_stages: int
    kinds: int = 8
    programs: int = 1
    registers: int | None = None


def choose_tiles(capability: int, element_size: int) -> Tiles:
    """Tiles for a compute capability (90 for sm_90) and element size; four-byte elements are for tests."""
    if element_size > 2:
        return Tiles(64, 32, 2, 32, 32, 2, 64, num_warps=4, num_stages=1)
    if capability == 90:
        return Tiles(128, 64, 4, 32, 64, 64, 256, num_warps=8, num_stages=3, programs=2, registers=128)
    return Tiles(64, 64, 8, 32, 64, 32, 128, num_warps=8, num_stages=2)


def fold_steps(tiles: Tiles) -> int:
    """How often a tile of distances is folded."""
    return (tiles.centroids // tiles.kinds).bit_length() - 1
