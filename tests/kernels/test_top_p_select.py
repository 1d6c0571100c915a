from __future__ import annotations

import pytest
import torch
from predictor import DEVICE, control, gpu, site_state, tokens_first
from torch import Tensor

from haste_compile.kernels.block_mask import token_pairs, unpack_bits
from haste_compile.kernels.layout import Counter
from haste_compile.kernels.top_p_select import reference

pytest.importorskip("triton")
import triton  # noqa: E402

from haste_compile.kernels.block_scores import kernel as block_scores  # noqa: E402
from haste_compile.kernels.block_scores.reference import block_scores as score_blocks  # noqa: E402
from haste_compile.kernels.top_p_select import kernel  # noqa: E402

both = pytest.mark.parametrize("implementation", ["reference", "kernel"])


def select(implementation: str, scores: Tensor, top_p: Tensor) -> Tensor:
    """Kept blocks, bool, of scores [B, H, T, T]."""
    blocks = scores.shape[-1]
    if implementation == "reference":
        return unpack_bits(reference.top_p_select(scores, top_p), blocks)
    return unpack_bits(run_kernel(scores, top_p)[0][0], blocks).cpu()


def run_kernel(
    scores: Tensor, top_p: Tensor, *, slot: int = 0, flags: Tensor | None = None, tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """The kernel on log-sum-exps of one group a block, whose rows of scores have these proportions."""
    batch, heads, blocks, _ = scores.shape
    tokens = blocks * 64 if tokens is None else tokens
    flags = torch.ones(batch, heads, dtype=torch.int32) if flags is None else flags
    mask, _, counters = site_state(2, batch, heads, tokens, 64, 64)
    mask.fill_(-7)
    lse, *moved = (
        x.to(DEVICE).contiguous() for x in (scores.log2(), top_p, flags, control(slot), mask, counters)
    )
    padded = max(32, triton.next_power_of_2(blocks))
    kernel.select_kernel[(blocks, batch * heads)](
        lse, *moved, 0, batch * heads, heads, tokens, mask.shape[-1],
        STRIDE=64, PER_BLOCK=1, BLOCK=64, BLOCKS=padded, num_warps=kernel.choose_warps(padded),
    )  # fmt: skip
    return moved[3], moved[4]


def row(values: list[float]) -> Tensor:
    """Scores whose first row is ``values``; the other rows are uniform."""
    scores = torch.ones(1, 1, len(values), len(values))
    scores[0, 0, 0] = torch.tensor(values)
    return scores


@both
@pytest.mark.parametrize(
    ("values", "top_p", "kept"),
    [
        ([1, 2, 4, 1], 0.75, [1, 2]),  # 4 + 2 is exactly 0.75 · 8
        ([1, 2, 4, 1], 0.76, [0, 1, 2]),  # one more, and of the tied ones the lower
        ([1, 2, 4, 1], 0.125, [2]),  # the block that crosses is kept
        ([2, 2, 2, 2], 0.5, [0, 1]),
        ([2, 2, 2, 2], 0.51, [0, 1, 2]),
        ([0, 3, 0, 5], 1.0, [1, 3]),  # all that have mass
        ([0, 0, 0, 0], 0.9, [0]),  # no mass: still one block
        ([1e-30, 0, 3e-30, 0], 0.9, [0, 2]),
        ([1e-3, 0, 0, 1e3], 1e-9, [3]),
        ([float("nan")] * 4, 0.9, [0]),
    ],
)
def test_selection_by_hand(implementation: str, values: list[float], top_p: float, kept: list[int]):
    selected = select(implementation, row(values), torch.tensor([top_p, 0.9]))
    assert selected[0, 0, 0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize(
    ("values", "top_p", "kept"),
    [
        ([float("nan"), 1, 2, 1], 0.5, [2]),
        ([float("inf"), 1, 2, float("-inf")], 1.0, [1, 2]),
    ],
)
def test_what_is_no_score_has_no_mass(values: list[float], top_p: float, kept: list[int]):
    selected = select("reference", row(values), torch.tensor([top_p, 0.9]))
    assert selected[0, 0, 0].nonzero().flatten().tolist() == kept


def test_a_row_with_one_number_that_is_none_keeps_one_block():
    # A group that meets one is normalised by it, so its whole row is lost.
    selected = select("kernel", row([float("nan"), 1, 2, 1]), torch.tensor([0.5, 0.9]))
    assert selected[0, 0, 0].nonzero().flatten().tolist() == [0]


@both
@pytest.mark.parametrize("blocks", [1, 32, 41])
def test_selection_is_the_greedy_one(implementation: str, blocks: int):
    generator = torch.Generator().manual_seed(blocks)
    thresholds = torch.tensor([0.3, 0.9, 1.0])
    scores = torch.softmax(3 * torch.randn(1, 3, blocks, blocks, generator=generator), -1) * 8
    selected = select(implementation, scores, thresholds)
    for head, u in ((h, u) for h in range(3) for u in range(blocks)):
        values = scores[0, head, u].double()
        order = values.argsort(descending=True, stable=True)
        sums = values[order].cumsum(0) / values.sum()
        kept = selected[0, head, u]
        count = int(kept.sum())
        assert kept[order[:count]].all()  # the largest ones, ties to the lower index
        assert sums[count - 1] >= thresholds[head] - 1e-6  # enough
        assert count == 1 or sums[count - 2] < thresholds[head] + 1e-6  # and not one too many


@both
def test_ties_within_a_row_of_many_words(implementation: str):
    scores = torch.full((1, 1, 40, 40), 0.125)
    selected = select(implementation, scores, torch.tensor([0.9, 0.9]))
    assert torch.equal(selected, (torch.arange(40) < 36).expand(1, 1, 40, 40))


def test_kernel_counts_token_pairs_of_ragged_blocks():
    scores = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    mask, counters = run_kernel(scores, torch.full((3,), 0.6), slot=1, tokens=4 * 64 + 7)
    pairs = token_pairs(mask[1], 4 * 64 + 7, 64)
    assert torch.equal(counters[1, :, :, Counter.KEPT], pairs)
    assert torch.equal(counters[1, :, :, Counter.KEPT_SUM], pairs)
    assert (counters[0] == 0).all() and (mask[0] == -7).all()


def test_kernel_leaves_heads_that_reuse_alone():
    scores = torch.rand(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    flags = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)
    scores[flags == 0] = float("nan")
    mask, counters = run_kernel(scores, torch.full((2,), 0.6), flags=flags)
    mask, counters = mask[0].cpu(), counters[0].cpu()
    assert (mask[flags == 0] == -7).all() and (counters[flags == 0] == 0).all()
    assert torch.equal(mask[flags == 1], reference.top_p_select(scores, torch.full((2,), 0.6))[flags == 1])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("blocks", [591, 1200, 2500])
def test_kernel_at_full_length(blocks: int):
    generator = torch.Generator().manual_seed(blocks)
    scores = torch.softmax(3 * torch.randn(1, 1, blocks, blocks, generator=generator), -1) * 8
    top_p = torch.tensor([0.9, 0.9])
    got, expected = (select(name, scores, top_p) for name in ("kernel", "reference"))
    # float32 against float64 sums: at most the block at the threshold differs, and in few rows.
    differing = (got != expected).sum(-1)
    assert differing.max() <= 1 and (differing > 0).float().mean() < 0.05


@pytest.mark.parametrize(("tokens", "block", "stride"), [(64, 64, 16), (200, 64, 16), (333, 128, 32)])
def test_masks_are_those_of_the_references(
    tokens: int, block: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, heads, slot = 2, 3, 1
    q, k = (tokens_first(batch, heads, tokens, 64, torch.float16, seed=seed, scale=2.0) for seed in (0, 1))
    top_p = torch.tensor([0.5, 0.9, 0.99], device=DEVICE)
    flags = torch.tensor([[1, 0, 1], [1, 1, 0]], dtype=torch.int32, device=DEVICE)
    ctl = control(slot).to(DEVICE)
    mask, _, counters = (x.to(DEVICE) for x in site_state(2, batch, heads, tokens, 64, block))
    mask.fill_(-7)
    # Two heads a turn, so that a turn begins at another head than the first.
    groups, blocks = -(-tokens // stride), -(-tokens // block)
    monkeypatch.setattr(block_scores, "SCRATCH_BYTES", 2 * 4 * groups * blocks)
    kernel.select_(q, k, top_p, flags, ctl, mask, counters, block=block, stride=stride)
    wanted = reference.top_p_select(score_blocks(q, k, block=block, stride=stride), top_p)
    assert torch.equal(mask[slot][flags == 1], wanted[flags == 1])
    assert (mask[slot][flags == 0] == -7).all() and (mask[0] == -7).all()
    pairs = token_pairs(wanted, tokens, block) * flags
    assert torch.equal(counters[slot, :, :, Counter.KEPT], pairs.to(counters.dtype)) and pairs.any()


@gpu
@pytest.mark.gpu
def test_masks_at_full_size_are_those_of_the_references() -> None:
    # float32 against float64 sums: a row may differ where a prefix lies within rounding of the threshold.
    q, k = (tokens_first(1, 2, 32760, 128, torch.bfloat16, seed=seed, scale=2.0) for seed in (0, 1))
    top_p, flags = torch.full((2,), 0.9, device=DEVICE), torch.ones(1, 2, dtype=torch.int32, device=DEVICE)
    mask, _, counters = (x.to(DEVICE) for x in site_state(1, 1, 2, 32760, 128, 128))
    kernel.select_(q, k, top_p, flags, control().to(DEVICE), mask, counters, block=128, stride=16)
    scores = score_blocks(q.float(), k.float(), block=128, stride=16)
    wanted = unpack_bits(reference.top_p_select(scores, top_p), 256)
    differing = (unpack_bits(mask[0], 256) != wanted).sum(-1)
    assert differing.max() <= 2 and (differing > 0).float().mean() < 1e-2
