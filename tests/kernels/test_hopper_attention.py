"""Hopper's Gluon kernel: its schedule run in a model, its machine code read; with a GPU, the real thing."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
import gluon_model  # noqa: E402

from haste_compile.errors import InputError  # noqa: E402
from haste_compile.kernels.block_mask import BlockMask, pack_bits  # noqa: E402
from haste_compile.kernels.block_sparse_attention import (  # noqa: E402
    dispatch,
    hopper,
    reference,
    tail_order,
)
from haste_compile.kernels.block_sparse_attention.variants import VARIANTS  # noqa: E402
from haste_compile.kernels.cross_compile import (  # noqa: E402
    SHARED_MEMORY_LIMIT,
    CrossCompiled,
    Request,
    compile_all,
    kernel_name,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
SCHEDULES = {
    "default": hopper.Schedule(),
    "in turns": hopper.Schedule(in_turns=True),
    "3 stages": hopper.Schedule(stages=3, q_stages=1),
    "1 stage": hopper.Schedule(stages=1, q_stages=1),
    "short tail": hopper.Schedule(tail=8),
    "no tail": hopper.Schedule(tail=0),
}


def problem(batch: int, heads: int, tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [B, H, N, D] with a graph's strides, and bool [B, H, T, T] with rows of many lengths."""
    generator = torch.Generator().manual_seed(tokens)
    q, k, v = (
        torch.randn(batch, tokens, heads, dim, generator=generator).to(dtype).to(DEVICE).transpose(1, 2)
        for _ in range(3)
    )
    blocks = -(-tokens // 128)
    share = torch.rand(batch, heads, blocks, 1, generator=generator)
    kept = torch.rand(batch, heads, blocks, blocks, generator=generator) < share
    kept[..., -1] |= ~kept.any(-1)
    return q, k, v, kept.to(DEVICE)


def lists(kept: Tensor) -> BlockMask:
    indices = kept.int().argsort(dim=-1, descending=True, stable=True).int()
    tail = torch.arange(kept.shape[-1], device=kept.device) >= kept.sum(-1, keepdim=True)
    return BlockMask(kept.sum(-1, dtype=torch.int32), indices.masked_fill(tail, 2**22), 128)


def in_the_model(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, programs: int, schedule: hopper.Schedule,
    module: types.ModuleType | Any = hopper,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, tokens, dim = q.shape
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
    wide = types.SimpleNamespace(primitive_bitwidth=16)
    blocks = mask.indices.shape[2]
    arguments = {
        "q": gluon_model.Descriptor(q, 64, wide),
        "k": gluon_model.Descriptor(k, 128, wide),
        "v": gluon_model.Descriptor(v, 128, wide),
        "out": gluon_model.Descriptor(out, 64, torch.float32),
        "lse": gluon_model.Pointer(lse.view(-1)),
        "counts": gluon_model.Pointer(mask.counts.reshape(-1)),
        "indices": gluon_model.Pointer(mask.indices.reshape(-1)),
        "order": gluon_model.Pointer(tail_order.reference(mask.counts, schedule.tail)),
        "counter": gluon_model.Pointer(torch.zeros(1, dtype=torch.int32)),
        "heads": heads, "query_blocks": blocks, "key_blocks": blocks, "tokens": tokens,
        "tiles": batch * heads * blocks, "scale": scale,
        "D": dim, "STAGES": schedule.stages, "Q_STAGES": schedule.q_stages,
        "RAGGED": tokens % 128 != 0, "IN_TURNS": schedule.in_turns,
        "TAIL": schedule.tail,
    }  # fmt: skip
    gluon_model.launch(module, "block_sparse_attention_hopper", programs, arguments)
    return out, lse


@pytest.mark.parametrize(
    ("shape", "programs"), [((1, 1, 70, 64), 1), ((2, 2, 640, 64), 3), ((1, 2, 933, 64), 2)]
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_computes_attention_and_ends(
    name: str, shape: tuple[int, int, int, int], programs: int
) -> None:
    q, k, v, kept = (x.cpu() for x in problem(*shape, torch.float32))
    out, lse = in_the_model(q, k, v, lists(kept), 0.1, programs, SCHEDULES[name])
    exact, exact_lse = reference.attend(
        q.double(), k.double(), v.double(), pack_bits(kept), block=128, scale=0.1
    )
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


def test_rows_whose_maximum_grows_are_rescaled() -> None:
    # The list is walked backwards: scores rise a little in every block, and then by far more.
    q, k, v, _ = (x.cpu() for x in problem(1, 2, 1280, 64, torch.float32))
    levels = torch.tensor([60.0, 30.0, 5.0, 4.2, 3.3, 2.5, 1.7, 1.1, 0.6, 0.0])
    q *= 0.1
    q[..., 0], k[..., 0] = 1.0, levels.repeat_interleave(128)
    kept = torch.ones(1, 2, 10, 10, dtype=torch.bool)
    out, lse = in_the_model(q, k, v, lists(kept), 1.0, 2, hopper.Schedule())
    exact, exact_lse = reference.attend(
        q.double(), k.double(), v.double(), pack_bits(kept), block=128, scale=1.0
    )
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("block += 1", "block += 1"),  # as it is
        # Values released before their product was waited for; a phase that is off; a turn that is not passed.
        ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(2, deps=[scores])"),
        ("(block // STAGES & 1) ^ 1", "block // STAGES & 1"),
        ("_release(v_empty.index(value_stage))", "pass"),
        ("_release(k_empty.index(key_stage))", "_release(k_empty.index(value_stage))"),
        ("tma.store_wait(0)", "pass"),
        ("mbarrier.arrive(other_turn)", "mbarrier.arrive(my_turn)"),
        ("mbarrier.wait(empty.index(stage), (block // STAGES & 1) ^ 1)", "pass"),
        ("mbarrier.wait(work_empty.index(0), done & 1)", "pass"),  # before all know this tile
        ("tail = gl.maximum(tiles - TAIL, 0)", "tail = 1"),
    ],
)  # fmt: skip
def test_the_model_sees_a_broken_schedule(line: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if line != instead:
        monkeypatch.setattr(gluon_model, "PATIENCE", 1.0)
    broken = types.ModuleType("broken")
    vars(broken).update(vars(hopper))
    for name in ("_schedule", "_next_tile", "_load", "_produce", "_consume"):
        source = inspect.getsource(getattr(hopper, name).fn).split("\n", 1)[1].replace(line, instead)
        exec("from __future__ import annotations\n" + source, vars(broken))
    assert any(
        line in inspect.getsource(getattr(hopper, name).fn)
        for name in ("_schedule", "_next_tile", "_load", "_produce", "_consume")
    )
    q, k, v, kept = (x.cpu() for x in problem(1, 2, 933, 64, torch.float32))
    exact, _ = reference.attend(q.double(), k.double(), v.double(), pack_bits(kept), block=128, scale=0.1)
    try:
        out, _ = in_the_model(q, k, v, lists(kept), 0.1, 1, hopper.Schedule(in_turns=True), broken)
    except RuntimeError as error:
        assert any(failure in str(error) for failure in gluon_model.FAILURES)
        return
    assert torch.allclose(out.double(), exact, rtol=0, atol=1e-5) == (line == instead)


def request(name: str, dim: int, dtype: str, ragged: bool) -> Request:
    def tile(rows: int) -> str:
        layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
        return f"tensordesc<{dtype}[1, 1, {rows}, {dim}],{layout}>"

    schedule = SCHEDULES[name]
    return Request(
        kernel=kernel_name(hopper.block_sparse_attention_hopper),
        signature={
            "q": tile(64), "k": tile(128), "v": tile(128), "out": tile(64), "lse": "*fp32:16",
            "counts": "*i32:16", "indices": "*i32:16", "order": "*i32:16", "counter": "*i32:16",
            "heads": "i32", "query_blocks": "i32", "key_blocks": "i32", "tokens": "i32", "tiles": "i32",
            "scale": "fp32",
        },
        constexprs={
            "D": dim, "STAGES": schedule.stages, "Q_STAGES": schedule.q_stages, "RAGGED": ragged,
            "IN_TURNS": schedule.in_turns, "TAIL": schedule.tail,
        },
        disassemble=True,
    )  # fmt: skip


CASES = [
    ("default", 128, "bf16", True),
    ("default", 128, "fp16", False),
    ("in turns", 128, "bf16", True),
    ("3 stages", 128, "bf16", True),
]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[Any, ...], CrossCompiled]:
    return dict(zip(CASES, compile_all([request(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_fits_and_uses_what_hopper_has(
    case: tuple[Any, ...], compiled: dict[tuple[Any, ...], CrossCompiled]
) -> None:
    found = compiled[case]
    assert found.shared <= SHARED_MEMORY_LIMIT["sm_90a"]
    assert found.spill_bytes == 0 and "serialized" not in found.log
    for wanted in ("setmaxnreg.inc.sync.aligned.u32 \t240", "setmaxnreg.dec.sync.aligned.u32 \t24"):
        assert wanted in found.ptx
    dim = case[1]
    # Q·Kᵀ before the loop and in it, P·V in it and after it; two consumers; 16 features or keys a step.
    assert found.sass.count("HGMMA") == 2 * (2 * dim // 16 + 2 * 128 // 16)
    assert re.search(r"cp\.async\.bulk\.tensor\.4d\.shared::(cta|cluster)\.global", found.ptx)
    assert "cp.async.bulk.tensor.4d.global.shared::cta" in found.ptx


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_release_overtakes_a_warp(
    case: tuple[Any, ...], compiled: dict[tuple[Any, ...], CrossCompiled]
) -> None:
    # One thread arrives for its warp group: after a barrier, before which every warp has waited.
    flow = re.findall(
        r"bar\.sync|bar\.warp\.sync|mbarrier\.arrive\.shared|wgmma\.wait_group|stmatrix|fence\.proxy\.async"
        r"|cp\.async\.bulk\.wait_group|cp\.async\.bulk\.tensor\.4d\.global",
        compiled[case].ptx,
    )
    for before, arrival in zip(flow, flow[1:], strict=False):
        if arrival.startswith("mbarrier.arrive"):
            assert before in ("bar.sync", "bar.warp.sync")
    # K's and V's buffers: every thread arrives for itself, after its wait for the products that read them.
    products = re.findall(
        r"wgmma\.mma_async|wgmma\.wait_group|cp\.async\.mbarrier\.arrive\.noinc", compiled[case].ptx
    )
    releases = [i for i, word in enumerate(products) if word.startswith("cp.async")]
    assert len(releases) == 2 * 4 and not any(products[i - 1].endswith("mma_async") for i in releases)
    # The output: written by all warps, fenced by each, then a barrier, then one thread's copy.
    for place, word in enumerate(flow):
        if word.startswith("cp.async.bulk.tensor"):
            assert flow[place - 3 : place] == ["stmatrix", "fence.proxy.async", "bar.sync"]
            assert flow[place + 1 : place + 3] == ["cp.async.bulk.wait_group", "bar.sync"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_softmax_lies_under_the_products(
    case: tuple[Any, ...], compiled: dict[tuple[Any, ...], CrossCompiled]
) -> None:
    # Machine code of the loop: both products, a wait for the first, nearly all of 66 exponentials (64 and one
    # more for each of the two rows of a thread), a wait for the second.
    words = re.findall(r"HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2|MUFU\.RCP", compiled[case].sass)
    text = "".join({"H": "P", "W": "w", "M": "e"}[word[0]] if "RCP" not in word else "r" for word in words)
    assert len(re.findall(r"P{16}we{61,66}w", text)) == 2


def test_forms_say_what_they_run_on() -> None:
    assert VARIANTS["gluon"].refuses((8, 0), 128) == "needs compute capability 9, not 8.0"
    assert VARIANTS["gluon"].refuses((9, 0), 64) == "needs blocks of 128, not 64"
    assert VARIANTS["gluon"].refuses((9, 0), 128) is None


def test_what_does_not_suit_it_is_refused_by_name_and_gets_the_triton_kernel() -> None:
    q, k, v, kept = problem(1, 1, 200, 64, torch.float16)
    assert not hopper.suits(q, k, v, 128)
    with pytest.raises(InputError, match="head dim 64"):
        hopper.attend(q, k, v, lists(kept), block=128, scale=0.1)
    out, lse = dispatch.attend(q, k, v, lists(kept), block=128, scale=0.1)
    wanted, wanted_lse = VARIANTS["triton"].attend(q, k, v, lists(kept), block=128, scale=0.1)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_hopper_gets_it() -> None:
    q, k, v, kept = problem(1, 2, 1000, 128, torch.bfloat16)
    assert hopper.suits(q, k, v, 128) and not hopper.suits(q[..., 1:], k, v, 128)
    out, _ = dispatch.attend(q, k, v, lists(kept), block=128, scale=0.1)
    assert torch.equal(out, hopper.attend(q, k, v, lists(kept), block=128, scale=0.1)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_on_hopper_rows_whose_maximum_grows_are_right() -> None:
    q, k, v, _ = problem(1, 2, 1280, 128, torch.bfloat16)
    levels = torch.tensor([60.0, 30.0, 5.0, 4.2, 3.3, 2.5, 1.7, 1.1, 0.6, 0.0], device=DEVICE)
    q *= 0.1
    # Some rows only, so that those of one warp do not agree.
    q[..., 0] = (torch.arange(1280, device=DEVICE) % 5 == 0).to(q.dtype)
    k[..., 0] = levels.repeat_interleave(128).to(k.dtype)
    kept = torch.ones(1, 2, 10, 10, dtype=torch.bool, device=DEVICE)
    out, lse = hopper.attend(q, k, v, lists(kept), block=128, scale=1.0)
    exact, exact_lse = reference.attend(
        q.double(), k.double(), v.double(), pack_bits(kept), block=128, scale=1.0
    )
    yardstick = (F.scaled_dot_product_attention(q, k, v, scale=1.0).double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * yardstick
    torch.testing.assert_close(lse.double(), exact_lse, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape", [(1, 1, 70, 128), (2, 3, 1333, 128), (1, 12, 4100, 128), (1, 40, 8192, 128)]
)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gluon")])
def test_on_hopper_it_agrees_with_the_reference(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    q, k, v, kept = problem(*shape, dtype)
    scale = shape[3] ** -0.5
    out, lse = VARIANTS[name].attend(q, k, v, lists(kept), block=128, scale=scale)
    wanted, wanted_lse = VARIANTS["triton"].attend(q, k, v, lists(kept), block=128, scale=scale)
    torch.testing.assert_close(out, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)
    torch.testing.assert_close(lse, wanted_lse, rtol=0, atol=1e-4)
    for _ in range(20):  # the order of the tiles varies, the result must not
        again, _ = VARIANTS[name].attend(q, k, v, lists(kept), block=128, scale=scale)
        assert torch.equal(out, again)
