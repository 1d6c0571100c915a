from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from haste_compile.errors import InputError
from haste_compile.kernels.block_mask import BlockMask, pack_bits, token_pairs, unpack_bits
from haste_compile.kernels.block_sparse_attention import cpu, reference
from haste_compile.kernels.block_sparse_attention.launch import Launch, choose_launch

pytest.importorskip("triton")
from haste_compile.kernels.block_sparse_attention import kernel  # noqa: E402

#: Where the Triton kernel runs: compiled on a GPU, else interpreted.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device")

pytestmark = pytest.mark.usefixtures("nan_memory")

#: B, H, N, D, block: one token, ragged by one either way, several blocks, both head dims, both blocks.
SHAPES = [
    (1, 2, 1, 64, 64),
    (2, 1, 63, 64, 64),
    (1, 2, 129, 64, 128),
    (2, 2, 200, 128, 64),
    (1, 2, 333, 64, 64),
    (1, 1, 333, 128, 128),
    (1, 2, 256, 64, 128),
]

Attend = Callable[..., tuple[Tensor, Tensor]]
Oracle = Attend


def lists(kept: Tensor, block: int) -> BlockMask:
    """BlockMask of bool [B, H, Tq, Tk] whose unspecified tail holds what would fault if it were used."""
    indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    tail = torch.arange(kept.shape[-1], device=kept.device) >= kept.sum(-1, keepdim=True)
    return BlockMask(kept.sum(-1, dtype=torch.int32), indices.masked_fill(tail, 2**22), block)


def by_kernel(launch: Launch | None) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, bits: Tensor, *, block: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        kept = unpack_bits(bits, -(-q.shape[2] // block))
        return kernel.attend(q, k, v, lists(kept, block), block=block, scale=scale, launch=launch)

    return attend


POINTERS = Launch(tma=False, num_warps=4, num_stages=1)
ATTEND: dict[str, Attend] = {
    "reference": reference.attend,
    "kernel": by_kernel(None),
    "kernel, pointers": by_kernel(POINTERS),
} | ({} if DEVICE == "cuda" else {"cpu": cpu.attend})
#: bf16 on a GPU only: the interpreter's bf16 product is wrong.
DTYPES = [torch.bfloat16, torch.float16] if DEVICE == "cuda" else [torch.float16, torch.float32]


def from_graph(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Gaussian [B, H, N, D] with a graph's strides, (N·H·D, D, H·D, 1); NaN past the last token."""
    whole = torch.full((batch, tokens + 40, heads, dim), float("nan"), dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    whole[:, :tokens] = torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype)
    return whole.to(DEVICE)[:, :tokens].transpose(1, 2)


def problem(shape: tuple[int, ...], dtype: torch.dtype, density: float = 0.5) -> tuple[Tensor, ...]:
    """q, k, v as a graph delivers them, and bool [B, H, Tq, Tk] kept blocks."""
    batch, heads, tokens, dim, block = shape
    q, k, v = (from_graph(batch, heads, tokens, dim, dtype, seed) for seed in range(3))
    blocks = -(-tokens // block)
    kept = torch.rand(batch, heads, blocks, blocks, generator=torch.Generator().manual_seed(7)) < density
    kept[..., -1] |= ~kept.any(-1)
    return q, k, v, kept.to(DEVICE)


def sdpa_error(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, block: int, scale: float, exact: Tensor
) -> float:
    """Largest error of SDPA in the same dtype with the mask written out, the yardstick of every tolerance."""
    of_token = torch.arange(q.shape[2], device=q.device) // block
    mask = kept[:, :, of_token][..., of_token]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return (out.cpu().double() - exact).abs().max().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ATTEND)
def test_error_is_at_most_twice_that_of_sdpa(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, oracle: Oracle
) -> None:
    block, scale = shape[-1], 0.8 * shape[3] ** -0.5
    q, k, v, kept = problem(shape, dtype)
    out, lse = ATTEND[name](q, k, v, pack_bits(kept), block=block, scale=scale)
    exact, exact_lse = oracle(q, k, v, kept, block=block, scale=scale)
    assert out.dtype == dtype and out.stride() == torch.empty_like(q).stride()
    assert lse.dtype == torch.float32 and lse.is_contiguous()
    allowed = 2 * max(sdpa_error(q, k, v, kept, block, scale, exact), torch.finfo(dtype).eps)
    assert (out.cpu().double() - exact).abs().max().item() <= allowed
    # PyTorch's CPU kernel takes a shorter exponential for half precision; GPUs approximate exp2 and log2.
    coarse = DEVICE == "cuda" or (name == "cpu" and dtype != torch.float32)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=2e-6, atol=1e-4 if coarse else 4e-6)


@pytest.mark.parametrize("name", ATTEND)
def test_dropped_keys_do_not_leak(name: str) -> None:
    shape = (1, 2, 333, 64, 64)
    q, k, v, kept = problem(shape, DTYPES[-1])
    kept[..., 2], kept[..., 0] = False, True
    clean, clean_lse = ATTEND[name](q, k, v, pack_bits(kept), block=64, scale=0.125)
    k[:, :, 128:192], v[:, :, 128:192] = float("nan"), float("inf")
    out, lse = ATTEND[name](q, k, v, pack_bits(kept), block=64, scale=0.125)
    assert out.isfinite().all()
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


@pytest.mark.parametrize("name", ATTEND)
def test_padded_keys_carry_no_mass_when_every_score_is_low(name: str, oracle: Oracle) -> None:
    # A padded key of score 0 would outweigh real scores of -400 by e^400.
    q, k, v, kept = problem((1, 1, 70, 64, 64), torch.float16, density=1.0)
    q[:], k[:] = 1.0, -6.25
    out, lse = ATTEND[name](q, k, v, pack_bits(kept), block=64, scale=1.0)
    exact, exact_lse = oracle(q, k, v, kept, block=64, scale=1.0)
    torch.testing.assert_close(out.cpu().double(), exact, rtol=0, atol=1e-3)
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["reference", "kernel", "kernel, pointers"])
def test_a_full_mask_is_dense_attention(name: str) -> None:
    q, k, v, kept = problem((1, 2, 200, 64, 64), DTYPES[-1], density=1.0)
    out, _ = ATTEND[name](q, k, v, pack_bits(kept), block=64, scale=0.125)
    tolerance = 8 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=0, atol=tolerance)


def test_a_full_mask_on_the_cpu_is_sdpa_bit_for_bit() -> None:
    q, k, v, kept = (x.cpu() for x in problem((2, 2, 333, 64, 64), torch.float32, density=1.0))
    out, _ = cpu.attend(q, k, v, pack_bits(kept), block=64, scale=0.125)
    assert torch.equal(out, F.scaled_dot_product_attention(q, k, v, scale=0.125))


def test_the_cpu_computes_kept_pairs_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, kept = (x.cpu() for x in problem((2, 2, 333, 64, 64), torch.float32))
    kept[0, 1, 2] = True  # a row that keeps everything takes the other path
    computed = 0

    def counting(
        q: Tensor, k: Tensor, v: Tensor, scale: float, flash: Any = cpu._flash
    ) -> tuple[Tensor, Tensor]:
        nonlocal computed
        computed += q.shape[0] * q.shape[2] * k.shape[2]
        return flash(q, k, v, scale)

    monkeypatch.setattr(cpu, "_flash", counting)
    cpu.attend(q, k, v, pack_bits(kept), block=64, scale=0.125)
    # Query rows are whole blocks (the last one's padding is thrown away), key columns are real tokens.
    columns = kept * (torch.arange(6) * 64).neg().add(333).clamp(max=64)
    assert computed == 64 * columns.sum()
    assert computed >= token_pairs(pack_bits(kept), 333, 64).sum()


def test_strides_that_tma_does_not_take(oracle: Oracle) -> None:
    dtype = DTYPES[-1]
    q, k, v = (torch.randn(1, 2, 150, 65, device=DEVICE).to(dtype)[..., :64] for _ in range(3))
    kept = torch.ones(1, 2, 3, 3, dtype=torch.bool, device=DEVICE).tril()
    out, _ = kernel.attend(q, k, v, lists(kept, 64), block=64, scale=0.125)
    exact, _ = oracle(q, k, v, kept, block=64, scale=0.125)
    allowed = 2 * max(sdpa_error(q, k, v, kept, 64, 0.125, exact), torch.finfo(dtype).eps)
    assert (out.cpu().double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("tokens", [300, 333])  # the last block ends in its first half, and in its second
def test_a_key_block_in_two_parts(tokens: int, oracle: Oracle) -> None:
    shape, dtype = (1, 2, tokens, 64, 128), DTYPES[-1]
    q, k, v, kept = problem(shape, dtype)
    launch = Launch(tma=False, num_warps=8, num_stages=1, parts=2)
    out, lse = by_kernel(launch)(q, k, v, pack_bits(kept), block=128, scale=0.1)
    exact, exact_lse = oracle(q, k, v, kept, block=128, scale=0.1)
    allowed = 2 * max(sdpa_error(q, k, v, kept, 128, 0.1, exact), torch.finfo(dtype).eps)
    assert (out.cpu().double() - exact).abs().max().item() <= allowed
    torch.testing.assert_close(lse.cpu().double(), exact_lse, rtol=2e-6, atol=1e-4)


def test_outputs_given_are_filled() -> None:
    q, k, v, kept = problem((1, 2, 129, 64, 64), DTYPES[-1])
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"), device=DEVICE)
    returned = kernel.attend(q, k, v, lists(kept, 64), block=64, scale=0.125, out=out, lse=lse)
    assert returned[0] is out and returned[1] is lse
    assert out.isfinite().all() and lse.isfinite().all()


def test_the_reference_is_traceable_with_symbolic_shapes() -> None:
    q, k, v, kept = (x.cpu() for x in problem((2, 2, 200, 64, 64), torch.float32))
    traced = make_fx(lambda *x: reference.attend(*x, block=64, scale=0.125), tracing_mode="symbolic")
    graph = traced(q, k, v, pack_bits(kept))
    q, k, v, kept = (x.cpu() for x in problem((3, 3, 333, 64, 64), torch.float32))
    wanted = reference.attend(q, k, v, pack_bits(kept), block=64, scale=0.125)
    torch.testing.assert_close(graph(q, k, v, pack_bits(kept)), wanted)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"dtype": torch.float64}, "float64"),
        ({"dim": 32}, "head dim 32"),
        ({"block": 128}, "mask of blocks of 64"),
        ({"scale": -1.0}, "scale -1.0"),
        ({"stride": 2}, "last strides 2"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], found: str) -> None:
    dim, step = change.get("dim", 64), change.get("stride", 1)
    q, k, v = (torch.zeros(1, 1, 64, dim * step, device=DEVICE)[..., ::step] for _ in range(3))
    q, k, v = (x.to(change.get("dtype", DTYPES[-1])) if step == 1 else x.half() for x in (q, k, v))
    if step > 1:
        q = q.repeat_interleave(step, -1)[..., ::step]
    mask = lists(torch.ones(1, 1, 1, 1, dtype=torch.bool, device=DEVICE), 64)
    with pytest.raises(InputError, match=found):
        kernel.attend(q, k, v, mask, block=change.get("block", 64), scale=change.get("scale", 0.125))


def test_launch_follows_the_capability() -> None:
    def choose(major: int, minor: int, *, tma_ready: bool = True, block: int = 128) -> Launch:
        return choose_launch((major, minor), block=block, dim=128, itemsize=2, tma_ready=tma_ready)

    assert choose(9, 0) == Launch(tma=True, num_warps=8, num_stages=2)
    assert choose(9, 0, block=64).tma and choose(9, 0, block=64).num_warps == 4
    assert not choose(9, 0, tma_ready=False).tma
    for other in ((8, 0), (8, 9), (10, 0), (12, 0)):
        assert not choose(*other).tma
        assert choose(*other).parts == 2 and choose(*other, block=64).parts == 1
    assert choose(9, 0).parts == 1 and choose(9, 0, tma_ready=False).parts == 2
    assert choose(8, 9).num_stages == 1  # 99 KB hold no second stage


@gpu
@pytest.mark.gpu
def test_addresses_past_two_to_the_31(oracle: Oracle) -> None:
    heads, tokens, block = 40, 420_000 + 17, 128
    q, k, v = (
        torch.randn(1, tokens, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for _ in range(3)
    )
    blocks = -(-tokens // block)
    counts = torch.full((1, heads, blocks), 2, dtype=torch.int32, device="cuda")
    indices = torch.zeros(1, heads, blocks, blocks, dtype=torch.int32, device="cuda")
    indices[..., 1] = blocks - 1
    out, _ = kernel.attend(q, k, v, BlockMask(counts, indices, block), block=block, scale=128**-0.5)
    first, last = slice(0, block), slice((blocks - 1) * block, tokens)
    k_kept, v_kept = (torch.cat([x[:, -1:, first], x[:, -1:, last]], 2) for x in (k, v))
    wanted = F.scaled_dot_product_attention(q[:, -1:, last].double(), k_kept.double(), v_kept.double())
    torch.testing.assert_close(out[:, -1:, last].double(), wanted, rtol=0, atol=2e-2)


@gpu
@pytest.mark.gpu
def test_a_cuda_graph_replays_on_new_inputs() -> None:
    q, k, v, kept = problem((2, 3, 1333, 128, 128), torch.bfloat16)
    mask = lists(kept, 128)
    call = lambda: kernel.attend(q, k, v, mask, block=128, scale=128**-0.5)  # noqa: E731
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    wanted, wanted_lse = call()
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
