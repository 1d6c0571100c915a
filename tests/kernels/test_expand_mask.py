from __future__ import annotations

import pytest
import torch
from predictor import DEVICE, control
from torch import Tensor

from haste_compile.kernels.block_mask import pack_bits
from haste_compile.kernels.expand_mask import reference

pytest.importorskip("triton")
from haste_compile.kernels.expand_mask import kernel  # noqa: E402


def random_mask(blocks: int) -> Tensor:
    kept = torch.rand(2, 3, blocks, blocks, generator=torch.Generator().manual_seed(blocks)) < 0.3
    kept[..., 0, :] = True  # a full row
    kept[..., -1] = True  # the last bit; no row is empty
    return kept


def assert_lists(counts: Tensor, indices: Tensor, kept: Tensor) -> None:
    for position in torch.cartesian_prod(*(torch.arange(size) for size in kept.shape[:3])).tolist():
        expected = kept[tuple(position)].nonzero().flatten().tolist()
        assert int(counts[tuple(position)]) == len(expected)
        assert indices[tuple(position)][: len(expected)].tolist() == expected


@pytest.mark.parametrize("blocks", [1, 5, 32, 45])
def test_reference_lists_kept_blocks_in_order(blocks: int):
    kept = random_mask(blocks)
    lists = reference.expand_mask(pack_bits(kept), blocks, block=64)
    assert lists.counts.dtype == lists.indices.dtype == torch.int32 and lists.block == 64
    assert_lists(lists.counts, lists.indices, kept)


@pytest.mark.parametrize("blocks", [1, 5, 32, 45])
@pytest.mark.parametrize("slot", [0, 1])
def test_kernel_lists_the_slot_that_ctl_names(blocks: int, slot: int):
    masks = torch.stack((random_mask(blocks), random_mask(blocks).flip(-1)))
    counts, indices = kernel.expand(pack_bits(masks).to(DEVICE), control(slot).to(DEVICE), blocks)
    assert counts.dtype == indices.dtype == torch.int32
    assert_lists(counts.cpu(), indices.cpu(), masks[slot])


def test_kernel_lists_all_blocks_in_a_dense_step():
    bits = pack_bits(torch.zeros(1, 1, 2, 45, 45, dtype=torch.bool)).to(DEVICE)
    counts, indices = kernel.expand(bits, control(dense=True).to(DEVICE), 45)
    assert_lists(counts.cpu(), indices.cpu(), torch.ones(1, 2, 45, 45, dtype=torch.bool))
