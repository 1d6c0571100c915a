"""Hopper's gathering kernel: its schedule in a model, its machine code read; with a GPU, the real thing."""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
from typing import Any

import pytest
import torch
from predictor import DEVICE
from torch import Tensor
from variable_blocks import Problem

pytest.importorskip("triton")
import gluon_model  # noqa: E402

from haste_compile.errors import InputError  # noqa: E402
from haste_compile.kernels.cross_compile import (  # noqa: E402
    SHARED_MEMORY_LIMIT,
    CrossCompiled,
    Request,
    compile_all,
    kernel_name,
)
from haste_compile.kernels.variable_block_attention import dispatch, hopper, kernel, work_lists  # noqa: E402
from haste_compile.kernels.variable_block_attention.variants import VARIANTS  # noqa: E402

HOPPER = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] == 9
SCHEDULES = {
    "default": hopper.Schedule(),
    "in turns": hopper.Schedule(in_turns=True),
    "3 stages": hopper.Schedule(stages=3, q_stages=1),
    "1 stage": hopper.Schedule(stages=1, q_stages=1),
}
on_the_cpu = pytest.mark.skipif(DEVICE == "cuda", reason="work lists are made by Triton's interpreter")


def in_the_model(
    problem: Problem, programs: int, schedule: hopper.Schedule, *, dense: bool = False,
    module: types.ModuleType | Any = hopper, seed: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Every turn of heads, one launch each."""
    q, k, v = problem.q, problem.k, problem.v
    order, offsets, mask, ctl = problem.slots(dense=dense)
    out, lse = torch.full_like(q, float("nan")), torch.full(q.shape[:3], float("nan"))
    batch, heads, tokens, dim = q.shape

    def pointer(x: Tensor) -> gluon_model.Pointer:
        return gluon_model.Pointer(x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,)))

    strides = {
        f"stride_{name}{axis}": step
        for name, x in (("q", q), ("k", k), ("v", v), ("o", out))
        for axis, step in zip("bhn", x.stride()[:3], strict=True)
    }
    for turn in work_lists.turns(order, offsets, mask, ctl, rows=hopper.BLOCK, workspace=schedule.workspace):
        arguments = {
            "q": pointer(q), "k": pointer(k), "v": pointer(v), "out": pointer(out), "lse": pointer(lse),
            "order": pointer(order), "ctl": pointer(ctl), "tiles": pointer(turn.tiles),
            "counts": pointer(turn.counts), "lists": pointer(turn.lists),
            "counter": pointer(torch.zeros(1, dtype=torch.int32)), **strides,
            "first": turn.first, "all_heads": batch * heads, "heads": heads, "tokens": tokens,
            "q_clusters": mask.shape[3], "most": turn.most, "row_tiles": turn.heads * turn.most, "scale": 0.1,
            "D": dim, "STAGES": schedule.stages, "Q_STAGES": schedule.q_stages,
            "IN_TURNS": schedule.in_turns,
        }  # fmt: skip
        gluon_model.launch(module, "variable_block_attention_hopper", programs, arguments, seed)
    return out, lse


def check(out: Tensor, lse: Tensor, exact: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(out.double(), exact[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(lse.double(), exact[1], rtol=0, atol=1e-5)


#: One token; one ragged block and an empty cluster; tiles of both halves and of one, lists of many lengths.
SHAPES = [(1, 1, 1, 64, 1, 2), (1, 2, 70, 64, 3, 9), (2, 2, 901, 64, 5, 40)]


@on_the_cpu
@pytest.mark.parametrize(("shape", "programs"), list(zip(SHAPES, (1, 2, 3), strict=True)), ids=str)
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_schedule_computes_attention_and_ends(name: str, shape: tuple[int, ...], programs: int) -> None:
    three_heads = dataclasses.replace(SCHEDULES[name], workspace=3 * 4 * shape[4] * shape[2])
    problem = Problem(shape, torch.float32)
    check(*in_the_model(problem, programs, three_heads), problem.exact())


@on_the_cpu
def test_a_dense_step_needs_no_clusters() -> None:
    problem = Problem((1, 2, 333, 64, 4, 9), torch.float32)
    found = in_the_model(problem, 2, hopper.Schedule(), dense=True)
    problem.map[:] = True
    check(*found, problem.exact())


@on_the_cpu
def test_dropped_keys_do_not_leak() -> None:
    problem = Problem(SHAPES[1], torch.float32)
    problem.map[..., 1], problem.map[..., 0] = False, True
    exact = problem.exact()
    dropped = problem.labels[1] == 1
    assert dropped.any()
    problem.k[dropped], problem.v[dropped] = float("nan"), float("inf")
    check(*in_the_model(problem, 1, hopper.Schedule()), exact)


@on_the_cpu
@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("block += 1", "block += 1"),  # as it is
        # A wait too short; phases that are off; buffers, turns and fences that are forgotten.
        ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(2, deps=[scores])"),
        ("(block // STAGES & 1) ^ 1", "block // STAGES & 1"),
        ("mbarrier.arrive(v_empty.index(value_stage))", "pass"),
        ("mbarrier.arrive(v_empty.index(stage))", "pass"),
        ("mbarrier.arrive(other_turn)", "mbarrier.arrive(my_turn)"),
        ("mbarrier.wait(k_empty.index(stage), free)", "pass"),
        ("mbarrier.wait(q_empty.index(slot), (round_of_q // Q_STAGES & 1) ^ 1)", "pass"),
        ("fence_async_shared()", "pass"),
        ("mbarrier.arrive(q_full.index(slot))", "pass"),
        ("token = upcoming", "pass"),
        ("(column < count)[None, :]", "(column >= 0)[None, :]"),
        ("gl.minimum(begin + half * 64", "gl.minimum(begin"),
    ],
)  # fmt: skip
def test_the_model_sees_a_broken_schedule(line: str, instead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if line != instead:
        monkeypatch.setattr(gluon_model, "PATIENCE", 0.5)
    broken = types.ModuleType("broken")
    vars(broken).update(vars(hopper))
    sources = {name: inspect.getsource(getattr(hopper, name).fn) for name in ("_produce", "_consume")}
    assert any(line in source for source in sources.values())
    for source in sources.values():
        changed = source.split("\n", 1)[1].replace(line, instead)
        exec("from __future__ import annotations\n" + changed, vars(broken))
    # Lists of many blocks and of one: what the first forgives, the producer far ahead in the second does not.
    schedule = hopper.Schedule(in_turns=True)
    seen = line == instead
    for shape in ((1, 2, 901, 64, 5, 40), (1, 1, 500, 64, 40, 30)):
        problem = Problem(shape, torch.float32, density=0.5 if shape[4] == 5 else 0.02)
        try:
            out, _ = in_the_model(problem, 1, schedule, module=broken)
        except RuntimeError as error:
            assert any(failure in str(error) for failure in gluon_model.FAILURES)
            out = torch.full_like(problem.q, float("nan"))
        right = torch.allclose(out.double(), problem.exact()[0], rtol=0, atol=1e-5)
        assert right or line != instead
        seen |= not right
    assert seen


def request(name: str, dtype: str) -> Request:
    schedule = SCHEDULES[name]
    numbers = ("first", "all_heads", "heads", "tokens", "q_clusters", "most", "row_tiles")
    return Request(
        kernel=kernel_name(hopper.variable_block_attention_hopper),
        signature={
            **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}:16"), "lse": "*fp32:16",
            **dict.fromkeys(("order", "ctl", "tiles", "counts", "lists", "counter"), "*i32:16"),
            **{f"stride_{x}{axis}": "i32:16" for x in "qkvo" for axis in "bhn"},
            **dict.fromkeys(numbers, "i32"), "scale": "fp32",
        },
        constexprs={
            "D": hopper.DIM, "STAGES": schedule.stages, "Q_STAGES": schedule.q_stages,
            "IN_TURNS": schedule.in_turns,
        },
        disassemble=True,
    )  # fmt: skip


CASES = [("default", "bf16"), ("default", "fp16"), ("in turns", "bf16"), ("3 stages", "bf16")]


@pytest.fixture(scope="module")
def compiled() -> dict[tuple[str, str], CrossCompiled]:
    return dict(zip(CASES, compile_all([request(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_fits_and_uses_what_hopper_has(
    case: tuple[str, str], compiled: dict[tuple[str, str], CrossCompiled]
) -> None:
    found = compiled[case]
    assert found.shared <= SHARED_MEMORY_LIMIT["sm_90a"]
    assert found.spill_bytes == 0 and "serialized" not in found.log
    for wanted in ("setmaxnreg.inc.sync.aligned.u32 \t232", "setmaxnreg.dec.sync.aligned.u32 \t40"):
        assert wanted in found.ptx
    # Q·Kᵀ before the loop and in it, P·V in it and after it; two consumers; 16 features or keys a step.
    assert found.sass.count("HGMMA") == 2 * (2 * hopper.DIM // 16 + 2 * 128 // 16)
    # Q, K and V: 128 rows of 256 bytes, 128 threads; none of the copies is narrower.
    assert len(re.findall(r"LDGSTS", found.sass)) == 3 * 16 + 4  # and the arrivals behind copies
    assert found.sass.count("LDGSTS.E.BYPASS.128") == 3 * 16
    assert found.sass.count("ARRIVES.LDGSTSBAR.64.ARVCNT") == 4  # noinc: the count holds them already
    # The output: 64 rows of 256 bytes by 128 threads, two consumers.
    assert found.sass.count("STG.E.128") == 2 * 8


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_release_overtakes_a_warp(
    case: tuple[str, str], compiled: dict[tuple[str, str], CrossCompiled]
) -> None:
    # One thread arrives for its warp group: after a barrier, before which every warp has waited.
    flow = re.findall(
        r"bar\.sync|bar\.warp\.sync|mbarrier\.arrive\.shared|wgmma\.wait_group|stmatrix"
        r"|cp\.async\.mbarrier\.arrive|cp\.async\.cg",
        compiled[case].ptx,
    )
    for before, arrival in zip(flow, flow[1:], strict=False):
        if arrival.startswith("mbarrier.arrive"):
            assert before in ("bar.sync", "bar.warp.sync")
    # Every arrival behind copies follows copies, but for the one that says that there is no tile left.
    behind = [place for place, word in enumerate(flow) if word.startswith("cp.async.mbarrier")]
    assert [flow[place - 1] for place in behind[:3]] == ["cp.async.cg"] * 3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fence_lies_between_every_wait_for_copies_and_its_products(
    case: tuple[str, str], compiled: dict[tuple[str, str], CrossCompiled]
) -> None:
    flow = re.findall(
        r"mbarrier\.try_wait|fence\.proxy\.async|wgmma\.mma_async|wgmma\.fence", compiled[case].ptx
    )
    text = "".join({"mb": "w", "fe": "f", "mm": "P", "fc": "x"}[_kind(word)] for word in flow)
    runs = re.findall(r"w[wfx]*P+", text)
    assert len(runs) == 2 * 3 and all("f" in run for run in runs)


def _kind(word: str) -> str:
    return {"mbarrier.try_wait": "mb", "fence.proxy.async": "fe", "wgmma.mma_async": "mm"}.get(word, "fc")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_softmax_lies_under_the_products(
    case: tuple[str, str], compiled: dict[tuple[str, str], CrossCompiled]
) -> None:
    # As for the sibling: both products, a wait for the first, 64 + 2 exponentials, a wait for the second.
    words = re.findall(r"HGMMA|WARPGROUP\.DEPBAR|MUFU\.EX2|MUFU\.RCP", compiled[case].sass)
    text = "".join({"H": "P", "W": "w", "M": "e"}[word[0]] if "RCP" not in word else "r" for word in words)
    assert len(re.findall(r"P{16}we{64,66}w", text)) == 2


def test_what_does_not_suit_it_is_refused_by_name_and_gets_the_triton_kernel() -> None:
    problem = Problem((1, 1, 150, 64, 3, 9), torch.float16)
    q, k, v = problem.q, problem.k, problem.v
    assert not hopper.suits(q, k, v)
    with pytest.raises(InputError, match="head dim 64"):
        hopper.attend(q, k, v, *problem.slots(), scale=0.1)
    found = dispatch.attend(q, k, v, *problem.slots(), scale=0.1)
    for a, b in zip(found, kernel.attend(q, k, v, *problem.slots(), scale=0.1), strict=True):
        assert torch.equal(a, b)


def test_only_rows_of_whole_vectors_are_copied() -> None:
    q = torch.zeros(1, 300, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    assert hopper._copied_whole(q) and hopper._strides(q) == [128, 128, 256]
    assert not hopper._copied_whole(torch.zeros(1, 2, 300, 136, dtype=torch.bfloat16)[..., :128])
    assert not hopper._copied_whole(
        torch.zeros(2 * 300 * 128 + 1, dtype=torch.bfloat16)[1:].view(1, 2, 300, 128)
    )


@pytest.mark.parametrize("suits", [False, True])
def test_what_suits_it_gets_it(suits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "suits", lambda q, k, v: suits)
    monkeypatch.setattr(hopper, "attend", lambda *inputs, scale: "hopper")
    monkeypatch.setattr(kernel, "attend", lambda *inputs, scale: "triton")
    assert dispatch.attend(*[None] * 7, scale=0.1) == ("hopper" if suits else "triton")
    assert {"triton", "gluon"} <= set(VARIANTS) and VARIANTS["triton"].confirmed


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 128, 1, 2), (1, 2, 70, 128, 3, 9), (2, 3, 1333, 128, 9, 40), (1, 12, 4100, 128, 30, 100)],
    ids=str,
)
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("gluon")])
def test_on_hopper_it_agrees_with_float64_and_with_the_triton_kernel(
    name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    problem = Problem(shape, dtype)
    inputs = (problem.q, problem.k, problem.v, *problem.slots())
    out, lse = VARIANTS[name].attend(*inputs, scale=0.1)
    exact, exact_lse = problem.exact()
    assert (out - exact).abs().max().item() <= problem.allowed(exact)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=1e-4)
    wanted, _ = kernel.attend(*inputs, scale=0.1)
    torch.testing.assert_close(out, wanted, rtol=0, atol=4 * torch.finfo(dtype).eps)
    for _ in range(20):  # the order of the tiles varies, the result must not
        assert torch.equal(out, VARIANTS[name].attend(*inputs, scale=0.1)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
def test_on_hopper_a_dense_step_needs_no_clusters_and_dropped_keys_do_not_leak() -> None:
    problem = Problem((1, 4, 2000, 128, 12, 60), torch.bfloat16)
    out, _ = hopper.attend(problem.q, problem.k, problem.v, *problem.slots(dense=True), scale=0.1)
    wanted = torch.nn.functional.scaled_dot_product_attention(problem.q, problem.k, problem.v, scale=0.1)
    torch.testing.assert_close(out, wanted, rtol=0, atol=8 * torch.finfo(out.dtype).eps)
    problem.map[..., 1], problem.map[..., 0] = False, True
    clean, _ = hopper.attend(problem.q, problem.k, problem.v, *problem.slots(), scale=0.1)
    dropped = (problem.labels[1] == 1).to(DEVICE)
    problem.k[dropped], problem.v[dropped] = float("nan"), float("inf")
    assert torch.equal(clean, hopper.attend(problem.q, problem.k, problem.v, *problem.slots(), scale=0.1)[0])
