from __future__ import annotations

import numpy as np
import pytest
import torch
from predictor import DEVICE, INTERPRETED, control, gpu
from torch import Tensor

from haste_compile.kernels.cluster_order import reference


def random_labels(*shape: int, clusters: int) -> Tensor:
    return torch.randint(clusters, shape, generator=torch.Generator().manual_seed(0))


def test_clusters_are_contiguous_and_keep_the_order_of_their_tokens():
    labels = random_labels(3, 500, clusters=17)
    labels[labels == 4] = 5  # an empty one
    order, offsets = reference.cluster_order(labels, 17)
    for head in range(3):
        assert (order[head].numpy() == np.argsort(labels[head].numpy(), kind="stable")).all()
        assert offsets[head, 0] == 0 and offsets[head, -1] == 500
        sizes = np.bincount(labels[head].numpy(), minlength=17)
        assert (offsets[head].diff().numpy() == sizes).all() and sizes[4] == 0


def check_kernel(tokens: int, clusters: tuple[int, int]) -> None:
    from haste_compile.kernels.cluster_order import kernel

    labels = torch.stack([random_labels(2, 3, tokens, clusters=c) for c in clusters], 2).int().to(DEVICE)
    order = torch.full((2, 2, 3, 2, tokens), -1, dtype=torch.int32, device=DEVICE)
    offsets = torch.full((2, 2, 3, sum(clusters) + 2), -1, dtype=torch.int32, device=DEVICE)
    flags = torch.ones(2, 3, dtype=torch.int32, device=DEVICE)
    flags[1, 1] = 0
    kernel.sort_(labels, flags, control(slot=1).to(DEVICE), order, offsets, q_clusters=clusters[0])
    assert (order[0] == -1).all() and (offsets[0] == -1).all()
    assert (order[1, 1, 1] == -1).all() and (offsets[1, 1, 1] == -1).all()
    for b, h in flags.nonzero().tolist():
        wanted = [reference.cluster_order(labels[b, h, side][None].long(), clusters[side]) for side in (0, 1)]
        assert torch.equal(order[1, b, h].long(), torch.cat([x for x, _ in wanted]))
        assert torch.equal(offsets[1, b, h].long(), torch.cat([x[0] for _, x in wanted]))


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter; a GPU runs the real thing")
@pytest.mark.parametrize(("tokens", "clusters"), [(1, (1, 2)), (512, (4, 40)), (700, (33, 9))])
def test_the_kernel_sorts_as_the_reference_does(tokens: int, clusters: tuple[int, int]):
    check_kernel(tokens, clusters)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("tokens", "clusters"), [(1, (1, 2)), (5003, (40, 300)), (32760, (300, 1000))])
def test_the_compiled_kernel_sorts_as_the_reference_does(tokens: int, clusters: tuple[int, int]):
    check_kernel(tokens, clusters)
