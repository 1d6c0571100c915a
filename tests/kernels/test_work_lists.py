from __future__ import annotations

import pytest
import torch
from variable_blocks import Problem

from haste_compile.kernels.variable_block_attention.reference import labels

pytest.importorskip("triton")
from haste_compile.kernels.variable_block_attention import work_lists  # noqa: E402

pytestmark = pytest.mark.usefixtures("nan_memory")

#: Clusters larger than a tile; many more key clusters than query clusters, the last word of the map ragged.
SHAPES = [(1, 2, 900, 64, 3, 2), (2, 1, 700, 64, 4, 600)]


@pytest.mark.parametrize("small_last", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_hold_the_kept_keys_in_order_and_tiles_every_query_once(
    shape: tuple[int, ...], dense: bool, small_last: bool
):
    problem = Problem(shape, torch.float16)
    tokens, clusters = shape[2], shape[4]
    (turn,) = work_lists.turns(*problem.slots(dense=dense), rows=128, small_last=small_last)
    assert (turn.first, turn.heads) == (0, shape[0] * shape[1])
    of_key = labels(problem.order[:, :, 1], problem.offsets[:, :, clusters + 1 :]).flatten(0, 1)
    kept, order = problem.map.flatten(0, 1).to(of_key.device), problem.order.flatten(0, 1)
    offsets = problem.offsets.flatten(0, 1)
    for head in range(turn.heads):
        for row in range(clusters):
            keys = order[head, 1][kept[head, row][of_key[head]][order[head, 1].long()]]
            if dense:
                keys = torch.arange(tokens, device=keys.device) if row == 0 else keys[:0]
            count = int(turn.counts[head, row])
            assert turn.lists[head, row, :count].tolist() == keys.tolist()
        tiles = [tile for tile in turn.tiles[head].tolist() if tile[0] >= 0]
        ends = [tokens] if dense else offsets[head, 1 : clusters + 1].tolist()
        places = [
            (cluster, place)
            for cluster, begin, end in tiles
            for place in range(begin, min(begin + 128, end))
            if end == ends[cluster]
        ]
        owners = [next(c for c, end in enumerate(ends) if place < end) for place in range(tokens)]
        assert sorted(places, key=lambda x: x[1]) == list(zip(owners, range(tokens), strict=True))
        small = [end - begin <= 64 for _, begin, end in tiles]
        assert small == sorted(small) or not small_last
        assert small_last or [begin for _, begin, _ in tiles] == sorted(begin for _, begin, _ in tiles)
