"""Launch configurations of k-means by name, for benchmarks and GPU tests; users get ``choose_tiles``'s."""

from __future__ import annotations

import dataclasses

from haste_compile.kernels.kmeans.launch import Tiles, choose_tiles

_HOPPER = choose_tiles(90, element_size=2)

#: For Hopper and elements of two bytes.
VARIANTS: dict[str, Tiles] = {
    "2 programs": _HOPPER,
    "1 program": dataclasses.replace(_HOPPER, programs=1, registers=None),
}
