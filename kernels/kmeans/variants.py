"""Launch configurations of k-means by name, for benchmarks and GPU tests; users get ``choose_tiles``'s."""

from __future__ import annotations

from haste_compile.kernels.kmeans.launch import Tiles

#: For Hopper and elements of two bytes.
VARIANTS: dict[str, Tiles] = {
    "2 programs of 8 warps": Tiles(
        128, 64, 4, 32, 64, 64, 128, num_warps=8, num_stages=3, programs=2, registers=128
    ),
    "2 programs of 8 warps, 256 tokens": Tiles(
        256, 64, 2, 32, 64, 64, 128, num_warps=8, num_stages=2, programs=2, registers=128
    ),
    "2 programs of 4 warps": Tiles(128, 64, 4, 32, 64, 32, 64, num_warps=4, num_stages=2, programs=2),
    "3 programs of 4 warps": Tiles(
        128, 64, 4, 32, 64, 32, 64, num_warps=4, num_stages=2, programs=3, registers=168
    ),
    "1 program": Tiles(128, 64, 4, 32, 64, 64, 128, num_warps=8, num_stages=3),
    "1 program, unfolded": Tiles(128, 64, 4, 32, 64, 64, 128, num_warps=8, num_stages=3, kinds=64),
}
