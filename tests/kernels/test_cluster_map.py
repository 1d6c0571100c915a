from __future__ import annotations

import numpy as np
import pytest
import torch
from predictor import DEVICE, INTERPRETED, control, gpu
from torch import Tensor

from haste_compile.kernels.block_mask import unpack_bits
from haste_compile.kernels.cluster_map import reference
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter


def problem(heads: int, rows: int, columns: int, dim: int = 64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Centroids of queries and of keys, and how many tokens each cluster has; one of each side is empty."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(heads, n, dim, generator=generator) * 2 for n in (rows, columns))
    q_sizes, k_sizes = (torch.randint(1, 60, (heads, n), generator=generator) for n in (rows, columns))
    q_sizes[:, 0], k_sizes[:, 3] = 0, 0
    return queries, keys, q_sizes, k_sizes


def by_numpy(queries: Tensor, keys: Tensor, sizes: Tensor, top_p: float, least: int) -> np.ndarray:
    """The kept clusters of one head, by the definition."""
    mass = sizes.double().numpy() * np.exp(queries.double().numpy() @ keys.double().numpy().T / 8)
    kept = np.zeros(mass.shape, bool)
    for row, share in enumerate(mass / mass.sum(1, keepdims=True)):
        total = 0.0
        for rank, column in enumerate(np.argsort(-share, kind="stable")):
            if total >= top_p and rank >= least:
                break
            kept[row, column] = True
            total += share[column]
    return kept


@pytest.mark.parametrize(("top_p", "least"), [(0.9, 4), (0.5, 1), (0.3, 12), (1e-6, 1)])
def test_the_reference_is_the_definition(top_p: float, least: int):
    queries, keys, _, sizes = problem(3, 7, 40)
    bits = reference.cluster_map(queries, keys, sizes, torch.full((3,), top_p), scale=1 / 8, least=least)
    kept = unpack_bits(bits, 40)
    for head in range(3):
        assert (kept[head].numpy() == by_numpy(queries[head], keys[head], sizes[head], top_p, least)).all()
    assert (kept.sum(-1) >= least).all()


def test_all_of_the_mass_is_every_cluster_that_has_tokens():
    queries, keys, _, sizes = problem(1, 5, 33)
    bits = reference.cluster_map(queries, keys, sizes, torch.ones(1), scale=1 / 8, least=1)
    assert torch.equal(unpack_bits(bits, 33)[0], (sizes > 0).expand(5, 33))


def test_ties_go_to_the_lower_index():
    queries, keys = torch.zeros(1, 1, 64), torch.zeros(1, 10, 64)
    bits = reference.cluster_map(
        queries, keys, torch.full((1, 10), 7), torch.tensor([0.35]), scale=1.0, least=2
    )
    assert unpack_bits(bits, 10).nonzero()[:, 2].tolist() == [0, 1, 2, 3]
    sizes = torch.tensor([[1, 1, 9, 1, 1]])
    floor = reference.cluster_map(queries, keys[:, :5], sizes, torch.tensor([0.1]), scale=1.0, least=3)
    assert unpack_bits(floor, 5).nonzero()[:, 2].tolist() == [0, 1, 2]


def test_token_pairs_are_counted_by_hand():
    bits = torch.tensor([[[0b101], [0b010]]], dtype=torch.int32)
    assert reference.token_pairs(bits, torch.tensor([[2, 3]]), torch.tensor([[10, 20, 30]])).item() == 140


def check_kernel(heads: int, rows: int, columns: int, least: int) -> None:
    from haste_compile.kernels.cluster_map import kernel

    queries, keys, q_sizes, k_sizes = problem(2 * heads, rows, columns)
    top_p = torch.linspace(0.3, 0.95, heads)
    wanted = reference.cluster_map(queries, keys, k_sizes, top_p.repeat(2), scale=1 / 8, least=least)
    pairs = reference.token_pairs(wanted, q_sizes, k_sizes)

    centroids = torch.zeros(2, 2, heads, rows + columns, 64)
    centroids[1] = torch.cat((queries, keys), 1).unflatten(0, (2, heads))
    begins = [torch.nn.functional.pad(sizes.cumsum(1), (1, 0)) for sizes in (q_sizes, k_sizes)]
    offsets = torch.zeros(2, 2, heads, rows + columns + 2, dtype=torch.int32)
    offsets[1] = torch.cat(begins, 1).unflatten(0, (2, heads))
    mask = torch.zeros(2, 2, heads, rows, -(-columns // 32), dtype=torch.int32)
    counters = torch.zeros(2, 2, heads, COUNTER_COLUMNS, dtype=torch.int64)
    flags = torch.ones(2, heads, dtype=torch.int32)
    flags[0, 0] = 0
    centroids, offsets, mask, counters, flags = (
        x.to(DEVICE) for x in (centroids, offsets, mask, counters, flags)
    )
    ctl = control(slot=1).to(DEVICE)
    kernel.select_(centroids, offsets, top_p.to(DEVICE), flags, ctl, mask, counters, scale=1 / 8, least=least)
    assert not mask[0].any() and not counters[0].any()
    assert not mask[1, 0, 0].any() and not counters[1, 0, 0].any()
    wanted, pairs = wanted.unflatten(0, (2, heads)), pairs.unflatten(0, (2, heads))
    chosen = flags.cpu() != 0
    assert torch.equal(mask[1].cpu()[chosen], wanted[chosen])
    for column in (Counter.KEPT, Counter.KEPT_SUM):
        assert torch.equal(counters[1, ..., column].cpu()[chosen], pairs[chosen])


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
@pytest.mark.parametrize(("rows", "columns", "least"), [(3, 33, 4), (1, 5, 1)])
def test_the_kernel_selects_as_the_reference_does(rows: int, columns: int, least: int):
    check_kernel(2, rows, columns, least)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("rows", "columns", "least"), [(3, 33, 4), (300, 1000, 100)])
def test_the_compiled_kernel_selects_as_the_reference_does(rows: int, columns: int, least: int):
    check_kernel(2, rows, columns, least)
