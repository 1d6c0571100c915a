"""Run NVIDIA's compute-sanitizer over every kernel at small shapes: memcheck and racecheck.

    python -m benchmarks.sanitize                       # both tools, all kernels: minutes
    python -m benchmarks.sanitize --tools memcheck --cases "attention, triton"

Each tool runs each case in a process of its own under a time limit, without PyTorch's caching allocator, so
that an access past the end of a tensor leaves its allocation. A case checks nothing else; the tests do that.

Exit code: 0, 1 when a tool has findings or a case fails, 2 when the tool or a CUDA device is missing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.attention_problems import BLOCK, HEAD_DIM, Problem
from benchmarks.attention_sides import state
from benchmarks.svg2 import make_site
from haste_compile.kernels.layout import Ctl

TOOLS = ("memcheck", "racecheck")
#: Seconds that one case may take under a tool, which slows kernels down a hundredfold.
LIMIT = 240
#: Three blocks, the last one ragged, two heads.
TOKENS, HEADS = 2 * BLOCK + 44, 2


def cases(device: str) -> dict[str, Callable[[], object]]:
    """Every kernel, by way of the op or the function that launches it."""
    import haste_compile.kernels.ops  # noqa: F401  defines torch.ops.haste
    from haste_compile.kernels.block_sparse_attention.variants import VARIANTS

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=generator).to(device, dtype).transpose(1, 2)
        for _ in range(3)
    )
    problem = Problem(q, k, v, torch.ones(1, HEADS, 3, 3, dtype=torch.bool, device=device).tril())
    cached = state(problem)
    top_p, delta = torch.full((HEADS,), 0.9, device=device), torch.zeros(HEADS, device=device)
    dense = cached["ctl"].clone()
    dense[Ctl.DENSE] = 1

    def refresh(reuse: str, relative: bool = False) -> None:
        torch.ops.haste.refresh_mask_(
            q, k, top_p, delta, cached["ctl"], cached["mask"], cached["anchors"], cached["counters"],
            block=BLOCK, stride=16, reuse=reuse, interval=2, relative=relative,
        )  # fmt: skip

    def attention(ctl: torch.Tensor) -> None:
        torch.ops.haste.block_sparse_attention(q, k, v, cached["mask"], ctl, block=BLOCK, scale=problem.scale)

    site = make_site(HEADS, TOKENS, 0.5, device=device, dtype=dtype)
    few = {"first_iterations": 3, "iterations": 2}
    site.refresh(first=True, **few)
    found: dict[str, Callable[[], object]] = {
        "clusters, first rebuild": lambda: site.refresh(first=True, **few),
        "clusters, later rebuild": lambda: site.refresh(**few),
        "attention over clusters": site.attend,
        "refresh, drift": lambda: [refresh("drift"), refresh("drift", relative=True)],
        "refresh, interval": lambda: [refresh("interval") for _ in range(3)],
        "attention op": lambda: attention(cached["ctl"]),
        "attention op, dense step": lambda: attention(dense),
    }
    if device == "cuda":
        for name, variant in VARIANTS.items():
            if variant.refuses(torch.cuda.get_device_capability(), BLOCK) is None:
                found[f"attention, {name}"] = lambda variant=variant: variant.attend(
                    q, k, v, problem.lists(), block=BLOCK, scale=problem.scale
                )
    return found


def find_tool() -> str | None:
    """Path of compute-sanitizer, from PATH or beside the CUDA compiler."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda"), "/usr/local/cuda"]
    beside = [str(Path(home) / "bin/compute-sanitizer") for home in homes]
    return next((path for name in ["compute-sanitizer", *beside] if (path := shutil.which(name))), None)


def findings(output: str) -> int | None:
    """Errors and hazards that a tool counted; None when it did not come to its summary."""
    summaries = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    return sum(int(number) for pair in summaries for number in pair if number) if summaries else None


def examine(tool: str, check: str, case: str, limit: float = LIMIT) -> tuple[int | None, str]:
    """Run one case under one tool: how many findings (None: it failed), and what was said."""
    command = [tool, "--tool", check, sys.executable, "-m", "benchmarks.sanitize", "--child", case]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None, f"no end within {limit:g} s"
    output = done.stdout + done.stderr
    count = findings(output)
    return (None if done.returncode and not count else count), output


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tools", choices=TOOLS, nargs="+", default=list(TOOLS))
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these")
    parser.add_argument("--child", metavar="CASE", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        cases("cuda")[options.child]()
        torch.cuda.synchronize()
        return 0
    tool = find_tool()
    if tool is None or not torch.cuda.is_available():
        missing = "a CUDA device" if tool else "compute-sanitizer (it comes with the CUDA toolkit)"
        print(f"skipped: {missing} is not there", file=sys.stderr)
        return 2
    clean = True
    for check in options.tools:
        for case in options.cases or cases("cuda"):
            count, output = examine(tool, check, case)
            print(f"{check:<10} {case:<28} {'failed' if count is None else count}", flush=True)
            if count != 0:
                clean = False
                print(output[-4000:], file=sys.stderr)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
