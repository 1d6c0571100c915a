"""The order of the last tiles: kernel against reference, and that it compiles for Hopper."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
from haste_compile.kernels.block_sparse_attention.tail_order import (  # noqa: E402
    PART,
    TAIL,
    order_tail,
    reference,
    tail_order_kernel,
)
from haste_compile.kernels.cross_compile import compile_for  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
runs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs a GPU or TRITON_INTERPRET=1",
)


def test_the_reference_sorts_the_last_by_length():
    counts = torch.tensor([[[9, 1, 3]], [[3, 7, 1]]], dtype=torch.int32)
    assert reference(counts, 4).tolist() == [4, 2, 3, 5]
    assert reference(counts, 8).tolist() == [0, 4, 2, 3, 1, 5]


@runs_triton
@pytest.mark.parametrize(
    ("shape", "tail"), [((1, 1, 5), 16), ((1, 2, 8), 16), ((2, 3, 37), 64), ((1, 40, 64), TAIL)]
)
def test_the_kernel_agrees(shape: tuple[int, int, int], tail: int):
    counts = torch.randint(1, 9, shape, dtype=torch.int32, device=DEVICE)
    order, counter = order_tail(counts, tail)
    wanted = reference(counts, tail)
    assert torch.equal(order[: len(wanted)], wanted) and counter.tolist() == [0]


@runs_triton
def test_none_is_an_order_too():
    order, counter = order_tail(torch.ones(1, 1, 3, dtype=torch.int32, device=DEVICE), 0)
    assert counter.tolist() == [0] and order.dtype == torch.int32


def test_it_compiles_without_spills():
    signature = {"counts": "*i32:16", "order": "*i32:16", "counter": "*i32:16", "tiles": "i32"}
    assert compile_for(tail_order_kernel, signature, {"TAIL": TAIL, "PART": PART}).spill_bytes == 0
