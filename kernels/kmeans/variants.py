"""Launch configurations of k-means by name, for benchmarks and GPU tests; users get ``choose_tiles``'s."""

from __future__ import annotations

from haste_compile.kernels.kmeans.launch import Tiles

#: For Hopper and elements of two bytes.
VARIANTS: dict[str, Tiles] = {
    "2 programs": Tiles(128, 64, 4, 32, 64, 64, 256, num_warps=8, num_stages=3, programs=2, registers=128),
    "1 program": Tiles(128, 64, 4, 32, 64, 64, 256, num_warps=8, num_stages=3),
}
