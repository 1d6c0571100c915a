"""Time block-sparse attention against the best dense and sparse kernels, on one NVIDIA GPU.

    python -m benchmarks.attention                    # the table of the README: minutes
    python -m benchmarks.attention --quick            # correctness and a small timing: seconds
    python -m benchmarks.attention --variants         # every form of our kernel beside the others
    python -m benchmarks.attention --launches         # launch parameters of the Triton kernel side by side
    python -m benchmarks.attention --masks even uneven structured --heads 12 40
    python -m benchmarks.attention --replay           # CUDA graphs: without the launches from Python

Every timing follows a check of the same output: on sampled query blocks its error against float64 must stay
within twice that of SDPA in the same dtype on the same keys; a kernel that fails is not timed. All sides run
in one process, in an order that is permuted every round (interleaving.py), first calls excluded; medians.
TFLOP/s count kept query-key pairs, 4·D FLOP each. Sides that cannot run are named with the reason.

Exit code: 0, 1 when a kernel of ours is wrong, 2 when the machine cannot run the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attention_problems import (
    BLOCK,
    DTYPE,
    HEAD_DIM,
    MASKS,
    Problem,
    WrongResultError,
    check,
    check_poison,
    make_problem,
)
from benchmarks.attention_sides import FLASH_SPARSE, Side, sides, state
from benchmarks.interleaving import Call, Timer, captured, cuda_milliseconds, measure, paired_ratio
from benchmarks.machine import need_gpu
from haste_compile.errors import HasteError
from haste_compile.kernels.layout import Ctl

STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Row:
    """One timing.

    Attributes:
        what: which kernel or path.
        mask: kind of mask; None where the work is not attention.
        heads, tokens: H, N.
        density: measured, kept token pairs / all pairs; None where the work is not attention.
        milliseconds: median.
        spread: slowest - fastest, in milliseconds.
        flops, bytes: what one call must compute and move at least; None where the work is not attention.
        tflops: flops / time; None where the work is not attention.
        error: of the checked rows, over SDPA's on the same keys; None where nothing is to check.
        over_flash: how many times faster than FlashAttention-4's sparse forward in the same rounds: median,
            and its 95 % interval (interleaving.paired_ratio); None beside other kernels than ours.
    """

    what: str
    mask: str | None
    heads: int
    tokens: int
    density: float | None
    milliseconds: float
    spread: float
    flops: int | None
    bytes: int | None
    tflops: float | None
    error: float | None
    over_flash: tuple[float, float, float] | None = None


def row(
    what: str, problem: Problem, times: Sequence[float], mask: str | None = None, error: float | None = None
) -> Row:
    """Summarise the times of one side; ``problem`` is what it computes, ``mask`` None if not attention."""
    median = statistics.median(times)
    flops = None if mask is None else problem.flops()
    return Row(
        what=what,
        mask=mask,
        heads=problem.heads,
        tokens=problem.tokens,
        density=None if mask is None else problem.pairs() / (problem.heads * problem.tokens**2),
        milliseconds=median,
        spread=max(times) - min(times),
        flops=flops,
        bytes=None if mask is None else problem.bytes(),
        tflops=None if flops is None else flops / median / 1e9,
        error=error,
    )


def compare(
    candidates: Sequence[Side],
    mask: str,
    rounds: int,
    left_out: dict[str, str],
    *,
    replay: bool = False,
    timer: Timer = cuda_milliseconds,
) -> list[Row]:
    """Check every side's output, then time those that were right.

    Args:
        left_out: gets the sides of others whose output is wrong, or that no CUDA graph can capture.
        replay: time replays of a CUDA graph of each side; the check reads what a replay wrote.

    Raises:
        WrongResultError: a side of ours is wrong; then nothing is timed.
    """
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for side in candidates:
        try:
            call, out = _prepare(side, replay)
            errors[side.name] = check(side.name, out, side.computes)
            calls[side.name] = call
        except (WrongResultError, RuntimeError) as reason:
            if side.ours:
                raise
            left_out[side.name] = str(reason).splitlines()[0]
    times = measure(calls, rounds, timer=timer)
    flash = times.get(FLASH_SPARSE)
    rows = []
    for side in (side for side in candidates if side.name in calls):
        timed = row(side.name, side.computes, times[side.name], mask, errors[side.name])
        if flash is not None and side.ours:
            timed = dataclasses.replace(timed, over_flash=paired_ratio(flash, times[side.name]))
        rows.append(timed)
    return rows


def _prepare(side: Side, replay: bool) -> tuple[Call, Tensor]:
    if not replay:
        return side.call, side.call()
    call, out = captured(side.call)
    out.fill_(float("nan"))
    call()
    return call, out


def predict(tokens: int, heads: int, rounds: int, *, replay: bool = False) -> list[Row]:
    """The mask predictor by itself: a call that rebuilds every head, and a call that reuses every head."""
    import haste_compile.kernels.ops  # noqa: F401  defines torch.ops.haste

    problem = make_problem(tokens, heads, 0.25)
    cached = state(problem)
    device = problem.q.device
    top_p = torch.full((max(heads, 2),), 0.9, device=device)
    delta = torch.full((max(heads, 2),), float("inf"), device=device)
    forced = cached["ctl"].clone()
    forced[Ctl.FORCE] = 1

    def refresh(ctl: Tensor) -> Tensor:
        torch.ops.haste.refresh_mask_(
            problem.q, problem.k, top_p, delta, ctl, cached["mask"], cached["anchors"], cached["counters"],
            block=BLOCK, stride=STRIDE, reuse="drift", gate_low=0.0, gate_high=1.0,
        )  # fmt: skip
        return cached["mask"]

    built = refresh(forced).clone()
    if not torch.equal(built, refresh(cached["ctl"])):
        raise WrongResultError(
            found="a changed mask", wanted="the same", where="refresh_mask_", fix="Run the tests marked gpu."
        )
    paths: dict[str, Callable[[], Tensor]] = {
        "refresh_mask_, every head rebuilds": lambda: refresh(forced),
        "refresh_mask_, every head reuses": lambda: refresh(cached["ctl"]),
    }
    calls: dict[str, Call] = {name: captured(path)[0] if replay else path for name, path in paths.items()}
    times = measure(calls, rounds)
    return [row(name, problem, times[name]) for name in calls]


def launches(problem: Problem, left_out: dict[str, str]) -> list[Side]:
    """The Triton kernel under several launch parameters; those that do not fit are left out, and named."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    from haste_compile.kernels.block_sparse_attention import kernel
    from haste_compile.kernels.block_sparse_attention.launch import Launch

    lists = problem.lists()
    found = []
    for tma, warps, stages in ((True, 8, 2), (True, 8, 3), (True, 4, 2), (False, 8, 2)):
        launch = Launch(tma=tma, num_warps=warps, num_stages=stages)
        name = f"{'TMA' if tma else 'pointers'}, {warps} warps, {stages} stages"

        def call(launch: Launch = launch) -> Tensor:
            return kernel.attend(
                problem.q, problem.k, problem.v, lists, block=BLOCK, scale=problem.scale, launch=launch
            )[0]

        try:
            call()
        except (OutOfResources, CompilationError) as reason:
            left_out[name] = str(reason).splitlines()[0]
            continue
        found.append(Side(name, call, problem, ours=True))
    return found


HEADER = (
    f"{'what':<36} {'mask':>10} {'H':>3} {'N':>7} {'density':>8} {'ms':>9} {'± ms':>7} {'TFLOP/s':>8} "
    f"{'GB/s':>6} {'error':>6} {'over FlashAttention-4':<22}"
)


def line(r: Row) -> str:
    """One row of the table under ``HEADER``."""
    density = "" if r.density is None else f"{r.density:.3f}"
    tflops = "" if r.tflops is None else f"{r.tflops:.0f}"
    rate = "" if r.bytes is None else f"{r.bytes / r.milliseconds / 1e6:.0f}"
    error = "" if r.error is None else f"{r.error:.2f}×"
    flash = "" if r.over_flash is None else "{:.3f} [{:.3f}, {:.3f}]".format(*r.over_flash)
    return (
        f"{r.what:<36} {r.mask or '':>10} {r.heads:>3} {r.tokens:>7,} {density:>8} {r.milliseconds:>9.3f} "
        f"{r.spread:>7.3f} {tflops:>8} {rate:>6} {error:>6} {flash:<22}"
    )


def environment() -> dict[str, object]:
    """Where the figures were taken, and of what."""
    import importlib.metadata

    import triton

    try:
        flash = importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        flash = None
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "flash-attn-4": flash,
        "date": datetime.date.today().isoformat(),
        "head_dim": HEAD_DIM,
        "block": BLOCK,
        "dtype": str(DTYPE),
        "warm_up_steps": 0,
        "order": "Williams design, shuffled",
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32760, 75600])
    parser.add_argument("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25, 0.1])
    parser.add_argument("--masks", choices=list(MASKS), nargs="+", default=["even"])
    parser.add_argument("--heads", type=int, nargs="+", default=[12])
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, rounded up to balanced passes")
    parser.add_argument("--quick", action="store_true", help="4,100 tokens, 4 heads, 3 rounds, no flex")
    parser.add_argument("--variants", action="store_true", help="every form of our kernel too")
    parser.add_argument("--launches", action="store_true", help="only compare launch parameters")
    parser.add_argument("--replay", action="store_true", help="time replays of CUDA graphs")
    parser.add_argument("--no-flex", action="store_true", help="leave FlexAttention out")
    parser.add_argument("--no-predictor", action="store_true", help="leave the mask predictor's timing out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    if options.quick:
        options.tokens, options.heads, options.rounds, options.no_flex = [4100], [4], 3, True
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        need_gpu("benchmarks/attention.py")
        facts = environment() | {"replay": options.replay}
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
        run(options, facts)
    except WrongResultError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    except HasteError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def run(options: argparse.Namespace, facts: dict[str, object]) -> None:
    """All rows, printed and recorded as they come, and what was left out, with the reason."""
    from haste_compile.kernels.block_sparse_attention import dispatch

    check_poison(
        "haste kernel",
        lambda p: dispatch.attend(p.q, p.k, p.v, p.lists(), block=BLOCK, scale=p.scale)[0],
        make_problem(1333, options.heads[0], 0.3),
    )
    print(f"{HEADER}\n{'-' * len(HEADER)}")
    rows: list[Row] = []
    left_out: dict[str, str] = {}

    def show(found: list[Row]) -> None:
        rows.extend(found)
        print("\n".join(map(line, found)), flush=True)
        if options.json is not None:
            record = {"rows": [dataclasses.asdict(r) for r in rows], "left_out": left_out}
            options.json.write_text(json.dumps({"environment": facts, **record}, indent=2) + "\n")

    for tokens in options.tokens:
        for heads in options.heads:
            for mask in options.masks:
                for density in options.densities:
                    problem = make_problem(tokens, heads, density, mask)
                    candidates = (
                        launches(problem, left_out)
                        if options.launches
                        else sides(problem, left_out, flex=not options.no_flex, variants=options.variants)
                    )
                    show(compare(candidates, mask, options.rounds, left_out, replay=options.replay))
            if not options.launches and not options.no_predictor:
                show(predict(tokens, heads, options.rounds, replay=options.replay))
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")


if __name__ == "__main__":
    sys.exit(main())
