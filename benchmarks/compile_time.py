"""How long the haste backend takes to compile, over dense ``torch.compile``: whole model and repeated blocks.

    python -m benchmarks.compile_time --threads 1 --json compile-time.json  # CPU: a small Wan transformer
    python -m benchmarks.compile_time --device cuda --layers 30 --heads 12 --dim 128 --tokens 480p

Every figure is the first call of a fresh process with empty caches, less a second call; Dynamo and Inductor
have compiled a small function before, and Inductor's processes are there, so that their own start is not
counted. The two sides alternate. With ``--threads 1`` compilation stays in the process, and CPU seconds, its
own and those of the compilers that it starts, are the steadier figure on a machine that does other things.
Without it there are as many processes as users have, whose CPU seconds are not seen: wall time counts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: Latent frames, height and width by name.
SIZES = {"small": (5, 16, 16), "480p": (21, 60, 104)}
SIDES = ("dense", "haste")


def one(side: str, how: str, options: argparse.Namespace) -> dict[str, float]:
    """Compile one side in this process and time it, in wall and CPU seconds."""
    import torch
    from diffusers import WanTransformer3DModel
    from torch._inductor.async_compile import AsyncCompile

    import haste_compile
    from haste_compile import _torch

    torch.compile(lambda x: torch.nn.functional.linear(x, x).relu() + 1)(
        torch.ones(64, 64, device=options.device)
    )
    while _torch.compile_processes() > 1 and not AsyncCompile.use_process_pool():
        time.sleep(0.1)
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    with torch.device(options.device):
        transformer = WanTransformer3DModel(
            num_layers=options.layers, num_attention_heads=options.heads, attention_head_dim=options.dim,
            ffn_dim=4 * options.heads * options.dim,
        ).to(dtype).eval().requires_grad_(False)  # fmt: skip
        inputs = {
            "hidden_states": torch.randn(1, 16, *SIZES[options.tokens], dtype=dtype),
            "timestep": torch.full((1,), 500.0),
            "encoder_hidden_states": torch.randn(1, 512, transformer.config.text_dim, dtype=dtype),
            "return_dict": False,
        }
    if side == "haste":
        # On a GPU as users run it; the CPU's model is too small for blocks of 128.
        sizes = {"block_size": 64, "min_tokens": 64} if options.device == "cpu" else {}
        haste_compile.optimize(transformer, compile=how, **sizes)
    else:
        for module in [transformer] if how == "whole" else list(transformer.blocks):
            module.compile(dynamic=False)

    def call() -> tuple[float, float]:
        wall, cpu = time.perf_counter(), _cpu_seconds()
        with torch.no_grad():
            transformer(**inputs)[0].flatten()[0].item()
        return time.perf_counter() - wall, _cpu_seconds() - cpu

    first, second = call(), call()
    return {"wall": first[0] - second[0], "cpu": first[1] - second[1]}


def _cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def in_fresh_process(side: str, how: str, threads: int | None, arguments: Sequence[str]) -> dict[str, float]:
    """``one`` in a process of its own with empty caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": cache,
            "TRITON_CACHE_DIR": f"{cache}/triton",
        }
        if threads is not None:
            environment["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
        command = [sys.executable, "-m", "benchmarks.compile_time", *arguments, "--child", side, how]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def summarise(how: str, times: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians of both sides and their ratio, in CPU and in wall seconds."""
    row: dict[str, Any] = {"compile": how}
    for unit in ("cpu", "wall"):
        medians = {side: statistics.median(t[unit] for t in times[side]) for side in SIDES}
        row |= {f"{side}_{unit}_s": round(medians[side], 2) for side in SIDES}
        row[f"{unit}_ratio"] = round(medians["haste"] / medians["dense"], 3)
        row[f"{unit}_s"] = {side: [round(t[unit], 2) for t in times[side]] for side in SIDES}
    return row


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--tokens", choices=list(SIZES), default="small")
    parser.add_argument("--compile", choices=("whole", "blocks"), nargs="+", default=["whole", "blocks"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, metavar="N", help="of Inductor; left out: as many as it likes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "HOW"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.child:
        print(json.dumps(one(*options.child, options)))
        return 0
    import torch

    facts = {
        "device": options.device,
        "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "layers": options.layers,
        "heads": options.heads,
        "head_dim": options.dim,
        "latents": SIZES[options.tokens],
        "threads": options.threads,
    }
    given = list(sys.argv[1:] if arguments is None else arguments)
    rows: dict[str, dict[str, Any]] = {}
    for how in options.compile:
        times: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        for turn in range(options.rounds):
            for side in SIDES if turn % 2 == 0 else SIDES[::-1]:
                times[side].append(in_fresh_process(side, how, options.threads, given))
            rows[how] = row = summarise(how, times)
            print(
                f"{how:<7} round {turn + 1}: dense {row['dense_wall_s']:.1f} s, haste "
                f"{row['haste_wall_s']:.1f} s ({row['wall_ratio']:.2f}×; CPU {row['cpu_ratio']:.2f}×)",
                flush=True,
            )
            if options.json is not None:  # at once: the next round may be cut off
                record = {"environment": facts, "rows": list(rows.values())}
                options.json.write_text(json.dumps(record, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
