"""The kernels that the attention benchmark puts side by side, each bound to one problem.

A side that cannot run is left out with a reason; a side of ours that is wrong stops the benchmark.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import queue
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention_problems import BLOCK, Problem, check, check_poison, make_problem
from haste_compile.kernels.layout import COUNTER_COLUMNS, CTL_COLUMNS, Ctl

#: Seconds that an unconfirmed kernel gets in its child process, compilation and start of CUDA included.
PROBE_SECONDS = 90
#: The side that ours is measured against.
FLASH_SPARSE = "FlashAttention-4 sparse"


class LeftOutError(Exception):
    """This side cannot be measured here; the message says why."""


@dataclasses.dataclass(frozen=True)
class Side:
    """One kernel.

    Attributes:
        call: launches it and returns the output, [1, H, N, D].
        computes: the problem whose attention it computes: dense kernels keep every block.
        ours: wrong output is then an error, and no reason to leave it out.
    """

    name: str
    call: Callable[[], Tensor]
    computes: Problem
    ours: bool = False


def sides(problem: Problem, left_out: dict[str, str], *, flex: bool, variants: bool) -> list[Side]:
    """Every side that this machine can run; the others go to ``left_out``, name -> reason.

    Args:
        flex: FlexAttention too (it compiles for a minute).
        variants: every form of our kernel, and not only the default.
    """
    makers: dict[str, Callable[[Problem], Side]] = {
        "dense SDPA": dense_sdpa,
        "cuDNN SDPA": cudnn_sdpa,
        "FlashAttention-4 dense": flash_dense,
        FLASH_SPARSE: flash_sparse,
    }
    if flex:
        makers["FlexAttention"] = flex_attention
    makers["haste kernel"] = haste_kernel
    makers["haste op"] = haste_op
    found: list[Side] = []
    for name, make in makers.items():
        try:
            found.append(make(problem))
        except LeftOutError as reason:
            left_out[name] = str(reason)
    return found + list(variant_sides(problem, left_out) if variants else ())


def dense_sdpa(problem: Problem) -> Side:
    """The baseline: what PyTorch picks by itself, cuDNN on Hopper."""
    q, k, v = problem.q, problem.k, problem.v
    return Side("dense SDPA", lambda: F.scaled_dot_product_attention(q, k, v), problem.full())


def cudnn_sdpa(problem: Problem) -> Side:
    """The baseline with cuDNN asked for, which shows whether it is what PyTorch picks."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = problem.q, problem.k, problem.v

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    try:
        call()
    except RuntimeError as error:
        raise LeftOutError(_first_line(error)) from error
    return Side("cuDNN SDPA", call, problem.full())


def flash_dense(problem: Problem) -> Side:
    """FlashAttention-4 without a mask."""
    attention = _flash()
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))  # it takes [B, N, H, D]

    def call() -> Tensor:
        return _only_output(attention.flash_attn_func(q, k, v)).transpose(1, 2)

    return _tried(Side("FlashAttention-4 dense", call, problem.full()))


def flash_sparse(problem: Problem) -> Side:
    """FlashAttention-4 over the same lists, every kept block a full one."""
    attention = _flash()
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    lists = problem.lists()
    tensors = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(lists.counts),
        mask_block_idx=torch.zeros_like(lists.indices),
        full_block_cnt=lists.counts,
        full_block_idx=lists.indices,
        block_size=(BLOCK, BLOCK),
    )
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))

    def call() -> Tensor:
        return _only_output(attention.flash_attn_func(q, k, v, block_sparse_tensors=tensors)).transpose(1, 2)

    return _tried(Side(FLASH_SPARSE, call, problem))


def flex_attention(problem: Problem) -> Side:
    """Compiled FlexAttention over the same lists, every kept block a full one."""
    from torch.nn.attention.flex_attention import BlockMask as FlexMask
    from torch.nn.attention.flex_attention import flex_attention

    lists = problem.lists()
    mask = FlexMask.from_kv_blocks(
        torch.zeros_like(lists.counts),
        torch.zeros_like(lists.indices),
        lists.counts,
        lists.indices,
        BLOCK_SIZE=BLOCK,
        seq_lengths=(problem.tokens, problem.tokens),
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    return Side("FlexAttention", lambda: compiled(problem.q, problem.k, problem.v, block_mask=mask), problem)


def haste_kernel(problem: Problem) -> Side:
    """The default form of our kernel, given lists."""
    from haste_compile.kernels.block_sparse_attention import dispatch

    q, k, v, lists = problem.q, problem.k, problem.v, problem.lists()
    return Side(
        "haste kernel",
        lambda: dispatch.attend(q, k, v, lists, block=BLOCK, scale=problem.scale)[0],
        problem,
        ours=True,
    )


def haste_op(problem: Problem) -> Side:
    """What a model runs: expansion of the mask's bits, and the kernel."""
    import haste_compile.kernels.ops  # noqa: F401  defines torch.ops.haste

    q, k, v, cached = problem.q, problem.k, problem.v, state(problem)
    return Side(
        "haste op",
        lambda: torch.ops.haste.block_sparse_attention(
            q, k, v, cached["mask"], cached["ctl"], block=BLOCK, scale=problem.scale
        )[0],
        problem,
        ours=True,
    )


def variant_sides(problem: Problem, left_out: dict[str, str]) -> Iterator[Side]:
    """Every form of our kernel; an unconfirmed one only if a child process saw that it is right."""
    from haste_compile.kernels.block_sparse_attention.variants import VARIANTS

    capability = torch.cuda.get_device_capability(problem.q.device)
    lists = problem.lists()
    for name, variant in VARIANTS.items():
        label = f"haste {name}"
        reason = variant.refuses(capability, BLOCK)
        if reason is None and not variant.confirmed:
            reason = probe(name)
        if reason is not None:
            left_out[label] = reason
            continue

        def call(attend: Any = variant.attend) -> Tensor:
            return attend(problem.q, problem.k, problem.v, lists, block=BLOCK, scale=problem.scale)[0]

        yield Side(label, call, problem, ours=variant.confirmed)


_probed: dict[str, str | None] = {}


def probe(name: str, seconds: float = PROBE_SECONDS) -> str | None:
    """Run a form of the kernel for the first time, in a child that is killed when it hangs.

    Returns:
        why the form must not be run here, None when its output was right; remembered for this process.
    """
    if name not in _probed:
        _probed[name] = in_child(_try_variant, name, seconds)
    return _probed[name]


def in_child(work: Callable[[str], None], argument: str, seconds: float) -> str | None:
    """``work(argument)`` in a fresh process: None when it returned, else what it raised or that it hung."""
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    child = context.Process(target=_report, args=(work, argument, answers), daemon=True)
    child.start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return f"no answer within {seconds:g} s: it hangs" if child.is_alive() else "its process died"
    finally:
        child.join(5)
        if child.is_alive():
            child.kill()


def _report(work: Callable[[str], None], argument: str, answers: Any) -> None:
    try:
        work(argument)
    except Exception as error:  # whatever it is, the parent tells it as the reason
        answers.put(f"{type(error).__name__}: {_first_line(error)}")
    else:
        answers.put(None)


def _try_variant(name: str) -> None:
    from haste_compile.kernels.block_sparse_attention.variants import VARIANTS

    def attend(problem: Problem) -> Tensor:
        return VARIANTS[name].attend(
            problem.q, problem.k, problem.v, problem.lists(), block=BLOCK, scale=problem.scale
        )[0]

    # One block, fewer tiles than multiprocessors, many more; ragged and not; then ten times, for races.
    for tokens, heads, density in ((100, 1, 1.0), (1024, 2, 0.5), (4100, 12, 0.3), (32760, 12, 0.1)):
        problem = make_problem(tokens, heads, density, "uneven")
        first = attend(problem)
        check(name, first, problem)
        for _ in range(10):
            if not torch.equal(first, attend(problem)):
                raise LeftOutError(f"its output differs from run to run at N = {tokens}")
    check_poison(name, attend, make_problem(1333, 4, 0.3))


def state(problem: Problem) -> dict[str, Tensor]:
    """State tensors of one site with one slot, holding the problem's mask."""
    heads, device = problem.heads, problem.q.device
    ctl = torch.zeros(CTL_COLUMNS, dtype=torch.int32, device=device)
    ctl[Ctl.EPOCH] = 1
    return {
        "ctl": ctl,
        "mask": problem.bits().unsqueeze(0).contiguous(),
        "anchors": torch.zeros(1, 1, heads, 2, problem.q.shape[3], device=device),
        "counters": torch.zeros(1, 1, heads, COUNTER_COLUMNS, dtype=torch.int64, device=device),
    }


def _flash() -> Any:
    try:
        from flash_attn.cute import interface
    except ImportError as error:
        raise LeftOutError(f"flash-attn-4 is not installed ({_first_line(error)})") from error
    return interface


def _tried(side: Side) -> Side:
    """Somebody else's kernel may refuse the device or the shape with any exception: then it is left out."""
    try:
        side.call()
    except Exception as error:
        raise LeftOutError(f"{type(error).__name__}: {_first_line(error)}") from error
    return side


def _only_output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
