from __future__ import annotations

import pytest
import torch
from torch import Tensor

from haste_compile.kernels.block_mask import BlockMask, pack_bits, token_pairs, unpack_bits, words


def random_kept(*shape: int, density: float = 0.4) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < density


@pytest.mark.parametrize("key_blocks", [1, 31, 32, 33, 64, 591])
def test_bits_and_booleans_are_inverse(key_blocks: int) -> None:
    kept = random_kept(2, 3, 5, key_blocks)
    bits = pack_bits(kept)
    assert bits.dtype == torch.int32
    assert bits.shape == (2, 3, 5, words(key_blocks))
    assert torch.equal(unpack_bits(bits, key_blocks), kept)


def test_the_layout_of_a_word_is_fixed() -> None:
    kept = torch.zeros(34, dtype=torch.bool)
    kept[[0, 31, 33]] = True
    assert pack_bits(kept).tolist() == [1 - 2**31, 2]


def test_bits_past_the_last_key_block_are_ignored() -> None:
    every = torch.full((1, 1, 3, 1), -1, dtype=torch.int32)
    assert unpack_bits(every, 3).shape == (1, 1, 3, 3)
    assert token_pairs(every, 300, 128).tolist() == [[300 * 300]]


@pytest.mark.parametrize("tokens", [1, 64, 200, 256])
def test_token_pairs_count_real_tokens(tokens: int) -> None:
    block, blocks = 64, -(-tokens // 64)
    kept = random_kept(2, 3, blocks, blocks)
    of_token = torch.arange(tokens) // block
    by_tokens = kept[:, :, of_token][..., of_token].sum((-1, -2))
    assert torch.equal(token_pairs(pack_bits(kept), tokens, block), by_tokens)


def test_density_does_not_read_the_unspecified_tail() -> None:
    kept = random_kept(2, 2, 4, 4) | torch.eye(4, dtype=torch.bool)
    counts = kept.sum(-1, dtype=torch.int32)
    indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    indices[torch.arange(4) >= counts.unsqueeze(-1)] = 2**30
    wanted = token_pairs(pack_bits(kept), 200, 64).sum() / (2 * 2 * 200**2)
    assert BlockMask(counts, indices, 64).density(200) == pytest.approx(wanted.item())
