"""Time block-sparse attention against dense SDPA and FlexAttention, on one NVIDIA GPU.

    python benchmarks/attention.py                  # the table of the README: minutes
    python benchmarks/attention.py --quick          # correctness and a small timing: seconds
    python benchmarks/attention.py --variants       # launch parameters of the attention kernel side by side

Every timing follows a check of the same output: on sampled query blocks its error against float64 must stay
within twice that of SDPA in the same dtype on the same keys; a kernel that fails is not timed. All sides run
in one process, interleaved, first calls excluded; medians. TFLOP/s count kept query-key pairs, 4·D FLOP each.

Exit code: 0, 1 when a kernel is wrong, 2 when the machine cannot run the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from haste_compile.errors import DeviceError, HasteError
from haste_compile.kernels.block_mask import BlockMask, pack_bits, token_pairs
from haste_compile.kernels.layout import COUNTER_COLUMNS, CTL_COLUMNS, Ctl

DTYPE = torch.bfloat16
HEAD_DIM = 128
BLOCK = 128
STRIDE = 16


class WrongResultError(HasteError):
    """A kernel's output is further from float64 than it may be: its time would mean nothing."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One timing.

    Attributes:
        what: which kernel or path.
        tokens: N.
        density: measured, kept token pairs / all pairs; None where the work is not attention.
        milliseconds: median.
        spread: slowest - fastest, in milliseconds.
        tflops: 4·D·pairs / time; None where the work is not attention.
        error: of the checked rows, over SDPA's on the same keys; None where nothing is to check.
    """

    what: str
    tokens: int
    density: float | None
    milliseconds: float
    spread: float
    tflops: float | None
    error: float | None


@dataclasses.dataclass(frozen=True)
class Problem:
    """q, k, v [1, H, N, D] as a transformer delivers them (heads permuted) and a random block mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor  # bool [1, H, Tq, Tk]

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def bits(self) -> Tensor:
        return pack_bits(self.kept)

    def lists(self) -> BlockMask:
        indices = self.kept.int().argsort(dim=-1, descending=True, stable=True).int()
        return BlockMask(self.kept.sum(-1, dtype=torch.int32), indices, BLOCK)

    def pairs(self) -> int:
        return int(token_pairs(self.bits(), self.tokens, BLOCK).sum())


def make_problem(tokens: int, heads: int, density: float, seed: int = 0) -> Problem:
    """Gaussian q, k, v; each key block kept with probability ``density``, a query block's own always."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (1, tokens, heads, HEAD_DIM)
    q, k, v = (
        torch.randn(size, device="cuda", dtype=DTYPE, generator=generator).transpose(1, 2) for _ in range(3)
    )
    blocks = -(-tokens // BLOCK)
    kept = torch.rand(1, heads, blocks, blocks, device="cuda", generator=generator) < density
    kept |= torch.eye(blocks, dtype=torch.bool, device="cuda")
    return Problem(q, k, v, kept)


def check(what: str, out: Tensor, problem: Problem, samples: int = 3) -> float:
    """Largest ratio of errors against float64, ``out``'s over SDPA's, on evenly spread query blocks.

    Raises:
        WrongResultError: a ratio above 2, or a value that is not finite.
    """
    blocks = problem.kept.shape[2]
    of_token = torch.arange(problem.tokens, device=out.device) // BLOCK
    worst = 0.0
    for head in range(out.shape[1]):
        for block in {round(i * (blocks - 1) / (samples - 1)) for i in range(samples)}:
            rows = slice(block * BLOCK, min((block + 1) * BLOCK, problem.tokens))
            keys = problem.kept[0, head, block][of_token]
            q = problem.q[:, head : head + 1, rows]
            k, v = (x[:, head : head + 1, keys] for x in (problem.k, problem.v))
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            yardstick = (F.scaled_dot_product_attention(q, k, v) - exact).abs().max().item()
            error = (out[:, head : head + 1, rows] - exact).abs().max().item()
            if not error <= 2 * yardstick:  # also when it is NaN
                raise WrongResultError(
                    found=f"error {error:.2e} against float64",
                    wanted=f"at most twice SDPA's, {yardstick:.2e}",
                    where=f"{what}, N = {problem.tokens}, head {head}, query block {block}",
                    fix="Run the tests marked gpu.",
                )
            worst = max(worst, error / yardstick)
    return worst


def check_poison(attention: Callable[[Problem], Tensor], heads: int) -> None:
    """NaN in every key and value that a whole head drops must not reach the output."""
    problem = make_problem(1333, heads, 0.3)
    problem.kept[..., 2] = False
    problem.kept[..., 2, 0] = True
    clean = attention(problem)
    problem.k[:, :, 2 * BLOCK : 3 * BLOCK] = float("nan")
    problem.v[:, :, 2 * BLOCK : 3 * BLOCK] = float("inf")
    if not torch.equal(clean, attention(problem)):
        raise WrongResultError(
            found="an output that depends on dropped keys",
            wanted="the same output",
            where="block_sparse_attention, N = 1333",
            fix="Run the tests marked gpu.",
        )


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, by CUDA events, interleaved; two first rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(end))
    return times


def row(what: str, problem: Problem, times: list[float], pairs: int | None, error: float | None) -> Row:
    """Summarise the times of one side; ``pairs`` None for work that is not attention."""
    median = statistics.median(times)
    everything = problem.q.shape[1] * problem.tokens**2
    return Row(
        what=what,
        tokens=problem.tokens,
        density=None if pairs is None else pairs / everything,
        milliseconds=median,
        spread=max(times) - min(times),
        tflops=None if pairs is None else 4 * HEAD_DIM * pairs / median / 1e9,
        error=error,
    )


def state(problem: Problem) -> dict[str, Tensor]:
    """State tensors of one site with one slot, holding the problem's mask."""
    heads = problem.q.shape[1]
    ctl = torch.zeros(CTL_COLUMNS, dtype=torch.int32, device="cuda")
    ctl[Ctl.EPOCH] = 1
    return {
        "ctl": ctl,
        "mask": problem.bits().unsqueeze(0).contiguous(),
        "anchors": torch.zeros(1, 1, heads, 2, HEAD_DIM, device="cuda"),
        "counters": torch.zeros(1, 1, heads, COUNTER_COLUMNS, dtype=torch.int64, device="cuda"),
    }


def flex_call(problem: Problem) -> Callable[[], Tensor]:
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
    return lambda: compiled(problem.q, problem.k, problem.v, block_mask=mask)


def compare(tokens: int, heads: int, density: float, repeats: int, flex: bool) -> list[Row]:
    """Dense SDPA, FlexAttention, our kernel and our op (kernel and expansion of the bits) on one mask."""
    import haste_compile.kernels.ops  # noqa: F401  defines torch.ops.haste
    from haste_compile.kernels.block_sparse_attention import kernel

    problem = make_problem(tokens, heads, density)
    q, k, v, lists, cached = problem.q, problem.k, problem.v, problem.lists(), state(problem)
    calls: dict[str, Callable[[], Tensor]] = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "haste kernel": lambda: kernel.attend(q, k, v, lists, block=BLOCK, scale=problem.scale)[0],
        "haste op": lambda: torch.ops.haste.block_sparse_attention(
            q, k, v, cached["mask"], cached["ctl"], block=BLOCK, scale=problem.scale
        )[0],
    }
    if flex:
        calls["FlexAttention"] = flex_call(problem)
    full = dataclasses.replace(problem, kept=torch.ones_like(problem.kept))
    errors: dict[str, float] = {}
    for name, call in list(calls.items()):
        try:
            errors[name] = check(name, call(), full if name == "dense SDPA" else problem)
        except WrongResultError as reason:
            if name != "FlexAttention":  # somebody else's kernel: leave it out, and go on
                raise
            print(f"left out: {reason}", file=sys.stderr)
            del calls[name]
    times = measure(calls, repeats)
    pairs = dict.fromkeys(calls, problem.pairs()) | {"dense SDPA": heads * tokens**2}
    return [row(name, problem, times[name], pairs[name], errors[name]) for name in calls]


def predict(tokens: int, heads: int, repeats: int) -> list[Row]:
    """The mask predictor by itself: a call that rebuilds every head, and a call that reuses every head."""
    import haste_compile.kernels.ops  # noqa: F401  defines torch.ops.haste

    problem = make_problem(tokens, heads, 0.25)
    cached = state(problem)
    top_p = torch.full((max(heads, 2),), 0.9, device="cuda")
    delta = torch.full((max(heads, 2),), float("inf"), device="cuda")
    forced = cached["ctl"].clone()
    forced[Ctl.FORCE] = 1

    def refresh(ctl: Tensor) -> None:
        torch.ops.haste.refresh_mask_(
            problem.q, problem.k, top_p, delta, ctl, cached["mask"], cached["anchors"], cached["counters"],
            block=BLOCK, stride=STRIDE, reuse="drift", gate_low=0.0, gate_high=1.0,
        )  # fmt: skip

    refresh(forced)
    built = cached["mask"].clone()
    refresh(cached["ctl"])
    if not torch.equal(built, cached["mask"]):
        raise WrongResultError(
            found="a changed mask", wanted="the same", where="refresh_mask_", fix="Run the tests marked gpu."
        )
    times = measure({"refresh": lambda: refresh(forced), "reuse": lambda: refresh(cached["ctl"])}, repeats)
    return [
        row("refresh_mask_, every head rebuilds", problem, times["refresh"], None, None),
        row("refresh_mask_, every head reuses", problem, times["reuse"], None, None),
    ]


def compare_launches(tokens: int, heads: int, density: float, repeats: int) -> list[Row]:
    """The attention kernel under several launch parameters; those that do not fit are left out, and named."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from haste_compile.kernels.block_sparse_attention import kernel
    from haste_compile.kernels.block_sparse_attention.launch import Launch

    problem = make_problem(tokens, heads, density)
    lists = problem.lists()
    launches = [
        Launch(tma=tma, warp_specialize=specialize, num_warps=warps, num_stages=stages)
        for tma, specialize, warps, stages in (
            (True, True, 4, 2),
            (True, True, 4, 1),
            (True, False, 8, 2),
            (True, False, 8, 3),
            (False, False, 8, 2),
        )
    ]
    calls: dict[str, Callable[[], Tensor]] = {}
    errors: dict[str, float] = {}
    for launch in launches:
        name = (
            f"{'TMA' if launch.tma else 'pointers'}{', specialised' if launch.warp_specialize else ''}, "
            f"{launch.num_warps} warps, {launch.num_stages} stages"
        )

        def call(launch: Launch = launch) -> Tensor:
            return kernel.attend(
                problem.q, problem.k, problem.v, lists, block=BLOCK, scale=problem.scale, launch=launch
            )[0]

        try:
            out = call()
        except (OutOfResources, CompilationError) as reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
            continue
        errors[name] = check(name, out, problem)
        calls[name] = call
    times = measure(calls, repeats)
    return [row(name, problem, times[name], problem.pairs(), errors[name]) for name in calls]


HEADER = f"{'what':<36} {'N':>7} {'density':>8} {'ms':>9} {'± ms':>7} {'TFLOP/s':>8} {'error':>6}"


def line(r: Row) -> str:
    """One row of the table under ``HEADER``."""
    density = "" if r.density is None else f"{r.density:.3f}"
    tflops = "" if r.tflops is None else f"{r.tflops:.0f}"
    error = "" if r.error is None else f"{r.error:.2f}×"
    return (
        f"{r.what:<36} {r.tokens:>7,} {density:>8} {r.milliseconds:>9.3f} {r.spread:>7.3f} "
        f"{tflops:>8} {error:>6}"
    )


def environment(heads: int) -> dict[str, str | int]:
    """Where the figures were taken."""
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.date.today().isoformat(),
        "heads": heads,
        "head_dim": HEAD_DIM,
        "block": BLOCK,
        "dtype": str(DTYPE),
        "warm_up_steps": 0,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32760, 75600])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, of which the median is shown")
    parser.add_argument("--quick", action="store_true", help="4,100 tokens, 4 heads, 3 rounds, no flex")
    parser.add_argument("--variants", action="store_true", help="only compare launch parameters")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--no-predictor", action="store_true", help="leave the mask predictor's timing out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.heads, options.repeats, options.no_flex = [4100], 4, 3, True
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if not torch.cuda.is_available():
            raise DeviceError(
                found="no CUDA device",
                wanted="one NVIDIA GPU",
                where="benchmarks/attention.py",
                fix="Run it on a machine with a GPU; the tests cover the kernels on the CPU.",
            )
        from haste_compile.kernels.block_sparse_attention import kernel

        facts = environment(options.heads)
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
        check_poison(
            lambda p: kernel.attend(p.q, p.k, p.v, p.lists(), block=BLOCK, scale=p.scale)[0], options.heads
        )
        print(f"{HEADER}\n{'-' * len(HEADER)}")
        rows: list[Row] = []
        for tokens in options.tokens:
            for density in options.densities:
                found = (
                    compare_launches(tokens, options.heads, density, options.repeats)
                    if options.variants
                    else compare(tokens, options.heads, density, options.repeats, flex=not options.no_flex)
                )
                rows += found
                print("\n".join(map(line, found)), flush=True)
            if not options.variants and not options.no_predictor:
                found = predict(tokens, options.heads, options.repeats)
                rows += found
                print("\n".join(map(line, found)), flush=True)
    except WrongResultError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    except HasteError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json is not None:
        record = {"environment": facts, "rows": [dataclasses.asdict(r) for r in rows]}
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
