"""Does a kernel compute the same while other processes use the GPU? Every launch against a quiet one.

    python -m benchmarks.contention --seconds 60 --json contention.json

Every form of our attention kernels, and some kernels of others, computes one problem alone. Then other
processes begin: some run cases of ``sanitize`` under compute-sanitizer, again and again, if it is there; one
multiplies matrices, one attends. All kernels are launched in turn meanwhile, and whatever differs from its
quiet launch in a single bit is counted and described: elements that are NaN, and tiles of 64 rows that
differ. So Triton's own warp specialisation was found out (docs/speed-notebook.md).

Exit code: 0, 1 when a kernel of ours differed, 2 when there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.attention import environment
from benchmarks.attention_problems import BLOCK, DTYPE, make_problem
from benchmarks.attention_sides import LeftOutError, cudnn_sdpa, flash_sparse
from benchmarks.machine import need_gpu
from benchmarks.sanitize import examine, find_tool
from benchmarks.svg2 import make_site
from haste_compile.errors import HasteError

#: Rows of the pieces in which a difference is counted: what one consumer of Hopper's kernels computes.
ROWS = 64
HEADS, TOKENS, DENSITY = 40, 8192, 0.25
#: What the other processes do; the last ones only where compute-sanitizer is.
LOADS = ("product", "attention")
SANITIZED = ("attention, gluon", "attention over clusters", "clusters, first rebuild")
#: Launches of one kernel before the next has its turn.
IN_A_ROW = 3

#: Launches a kernel and returns what it wrote.
Call = Callable[[], Sequence[Tensor]]


@dataclasses.dataclass
class Tally:
    """What became of the launches of one kernel.

    Attributes:
        ours: whether a difference is our fault.
        differing: of each launch that differed: seconds since the start, NaN elements, and pieces of ``ROWS``
            rows that differ.
    """

    ours: bool
    launches: int = 0
    differing: list[tuple[float, int, int]] = dataclasses.field(default_factory=list)


def watch(
    calls: Mapping[str, Call],
    ours: Mapping[str, bool],
    begin: Callable[[], contextlib.AbstractContextManager[object]],
    seconds: float,
) -> dict[str, Tally]:
    """Launch each call quietly, then all of them in turn for ``seconds`` while what ``begin`` began runs."""
    quiet = {name: [x.clone() for x in call()] for name, call in calls.items()}
    tallies = {name: Tally(ours[name]) for name in calls}
    with begin():
        started = time.monotonic()
        while (now := time.monotonic() - started) < seconds:
            for name, call in calls.items():
                for _ in range(IN_A_ROW):
                    found = call()
                    tallies[name].launches += 1
                    if not all(map(torch.equal, found, quiet[name])):
                        out, wanted = found[0], quiet[name][0]
                        pieces = (out != wanted).any(-1).flatten().split(ROWS)
                        count = sum(bool(piece.any()) for piece in pieces)
                        tallies[name].differing.append((now, int(out.isnan().sum()), count))
    return tallies


def gpu_calls(left_out: dict[str, str]) -> tuple[dict[str, Call], dict[str, bool]]:
    """Every kernel by name, and whether it is ours; what cannot run here goes to ``left_out``."""
    from haste_compile.kernels.block_sparse_attention import kernel
    from haste_compile.kernels.block_sparse_attention.variants import VARIANTS

    problem = make_problem(TOKENS, HEADS, DENSITY)
    q, k, v, lists = problem.q, problem.k, problem.v, problem.lists()
    capability = torch.cuda.get_device_capability()
    calls: dict[str, Call] = {}
    for name, variant in VARIANTS.items():
        reason = variant.refuses(capability, BLOCK)
        if reason is not None:
            left_out[name] = reason
            continue
        calls[name] = functools.partial(variant.attend, q, k, v, lists, block=BLOCK, scale=problem.scale)
    half = [x[..., :64] for x in (q, k, v)]
    calls["64 features"] = functools.partial(kernel.attend, *half, lists, block=BLOCK, scale=problem.scale)
    site = make_site(HEADS, TOKENS, 0.5)
    site.refresh(first=True)
    calls["clusters"] = functools.partial(_alone, site.attend)
    ours = dict.fromkeys(calls, True)
    for make in (cudnn_sdpa, flash_sparse):
        try:
            side = make(problem)
        except LeftOutError as error:
            left_out[make.__name__] = str(error)
            continue
        calls[side.name] = functools.partial(_alone, side.call)
    calls["product"] = _product()
    return calls, {name: ours.get(name, False) for name in calls}


def _alone(call: Callable[[], Tensor]) -> tuple[Tensor]:
    return (call(),)


def _product() -> Call:
    x = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    return functools.partial(_alone, lambda: x @ x)


@contextlib.contextmanager
def others(loads: Sequence[str], cases: Sequence[str]) -> Iterator[None]:
    """Processes that use the GPU, from when they have had time to start until the block ends."""
    kinds = [["--load", load] for load in loads] + [["--sanitize", case] for case in cases]
    command = [sys.executable, "-m", "benchmarks.contention"]
    started = [
        subprocess.Popen([*command, *kind], stdout=subprocess.DEVNULL, start_new_session=True)
        for kind in kinds
    ]
    try:
        time.sleep(10)
        yield
    finally:
        for process in started:  # with its children: a sanitizer's are busy on the GPU
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def use_the_gpu(load: str) -> None:
    """Until it is killed."""
    calls = {load: _product()} if load == "product" else gpu_calls({})[0]
    while True:
        for call in calls.values():
            call()
        torch.cuda.synchronize()


def sanitize_for_ever(case: str) -> None:
    """Until it is killed."""
    tool = find_tool()
    assert tool is not None
    while True:
        examine(tool, "memcheck", case)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--loads", nargs="*", choices=LOADS, default=list(LOADS), help="busy processes")
    parser.add_argument("--cases", nargs="*", metavar="CASE", default=list(SANITIZED), help="of sanitize")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the tallies there")
    parser.add_argument("--load", choices=LOADS, help=argparse.SUPPRESS)
    parser.add_argument("--sanitize", metavar="CASE", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        need_gpu("benchmarks/contention.py")
        if options.load:
            use_the_gpu(options.load)
        if options.sanitize:
            sanitize_for_ever(options.sanitize)
        left_out: dict[str, str] = {}
        calls, ours = gpu_calls(left_out)
        cases = options.cases if find_tool() is not None else []
        if not cases:
            left_out["processes under compute-sanitizer"] = "it is not there, or no case was asked for"
        begin = functools.partial(others, options.loads, cases)
        tallies = watch(calls, ours, begin, options.seconds)
    except HasteError as error:
        print(error, file=sys.stderr)
        return 2
    for name, tally in tallies.items():
        print(f"{name:<44} {len(tally.differing)} of {tally.launches} differ {tally.differing[:3] or ''}")
    for name, reason in left_out.items():
        print(f"left out: {name}: {reason}")
    if options.json is not None:
        record = {
            "environment": environment(),
            "beside": {"loads": options.loads, "sanitized": cases},
            "tallies": {name: dataclasses.asdict(tally) for name, tally in tallies.items()},
            "left_out": left_out,
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(any(tally.ours and tally.differing for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
