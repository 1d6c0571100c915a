"""Time whole forwards of full-size Wan transformers, dense against haste, both compiled, on one NVIDIA GPU.

    python -m benchmarks.wan_forward --size 480p                        # 1.3B, whole model: minutes
    python -m benchmarks.wan_forward --size 720p --compile whole blocks
    python -m benchmarks.wan_forward --model 14B --size 720p --compile blocks --steps 4

STRUCTURED RANDOM WEIGHTS: SPEED ONLY. structured_weights.py builds them so that the mean density and the rate
at which masks are rebuilt come out as asked for; both are measured in the timed steps and printed.

Dense and haste share one set of weights and run the same denoising steps in turn, the first of each pair
alternating; steps of a first pass compile and are not counted. Before that, the output of the attention op on
one site's own q, k, v and mask must be within twice SDPA's error of float64.

The table breaks a forward down by kernel, and compares with the bound: a forward in which self-attention
takes its dense time × density, and all the rest what it takes dense.

Exit code: 0, 1 when the kernel is wrong, 2 when the machine cannot run the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks.attention_problems import BLOCK, Problem, WrongResultError, check
from benchmarks.interleaving import Timer, cuda_milliseconds
from benchmarks.machine import need_gpu
from benchmarks.structured_weights import (
    build_transformer,
    find_delta,
    find_factor,
    latents_at,
    sigmas,
)
from haste_compile.config import HasteConfig
from haste_compile.errors import HasteError
from haste_compile.kernels.block_mask import unpack_bits
from haste_compile.kernels.layout import COUNTER_COLUMNS, Counter, Ctl
from haste_compile.pipeline import optimize
from haste_compile.state import HasteState, states_of

TOP_P = 0.9
WEIGHTS = "structured random weights: speed only"


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A transformer and a video: layers, heads, feed-forward width, and tokens along t, h, w."""

    layers: int
    heads: int
    ffn_dim: int
    grid: tuple[int, int, int]
    text_tokens: int = 512


MODELS = {"1.3B": (30, 12, 8960), "14B": (40, 40, 13824)}
GRIDS = {"480p": (21, 30, 52), "720p": (21, 45, 80)}


@dataclasses.dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        compile: "whole" or "blocks".
        density, refresh_rate: measured over the timed steps.
        dense_ms, haste_ms: medians of a forward over the timed steps. haste_mean_ms: mean, for what varies
            from step to step is how many masks are rebuilt.
        dense_first_s, haste_first_s: the first call, compilation and all.
        state_bytes: masks, anchors and counters.
        bound: largest possible dense / haste at that density; None without a profile.
        dense_parts, haste_parts: milliseconds of a forward by kind of kernel.
    """

    compile: str
    density: float
    refresh_rate: float
    dense_ms: float
    dense_spread: float
    haste_ms: float
    haste_mean_ms: float
    haste_spread: float
    dense_first_s: float
    haste_first_s: float
    state_bytes: int
    bound: float | None
    dense_parts: dict[str, float]
    haste_parts: dict[str, float]

    @property
    def speedup(self) -> float:
        return self.dense_ms / self.haste_mean_ms


#: Kinds of kernels by name, first match wins; what no line matches is "rest".
KINDS = (
    ("sparse attention", r"block_sparse_attention"),
    ("refresh: means", r"chunk_sums_kernel|combine_kernel"),
    ("refresh: gate", r"decide_kernel"),
    ("refresh: scores", r"group_lse_kernel"),
    ("refresh: top-p", r"select_kernel"),
    ("expansion", r"expand_kernel"),
    ("dense attention", r"cudnn.*(sdpa|fprop|attention)|flash|fmha|mha_|sdpa"),
    ("linear", r"gemm|cutlass|nvjet|xmma|cublas|triton_tem_fused.*mm|triton_mm"),
)


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel of that name does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, kernel, re.I)), "rest")


def parts(kernels: Iterable[tuple[str, float]], forwards: int) -> dict[str, float]:
    """Milliseconds a forward by kind, from (kernel name, microseconds) of several forwards."""
    found: dict[str, float] = {}
    for name, microseconds in kernels:
        kind = kind_of(name)
        found[kind] = found.get(kind, 0.0) + microseconds / 1e3 / forwards
    return found


def bound(dense_parts: Mapping[str, float], haste_parts: Mapping[str, float], density: float) -> float:
    """Dense time over the least time: self-attention at its dense rate on the kept pairs, no predictor.

    Cross-attention runs the same kernels as dense self-attention; what is left of them in the haste run is
    cross-attention.
    """
    total = sum(dense_parts.values())
    self_attention = dense_parts.get("dense attention", 0.0) - haste_parts.get("dense attention", 0.0)
    return total / (total - self_attention * (1.0 - density))


class Run:
    """One transformer with structured weights and its dense twin, on the steps of one video."""

    def __init__(
        self, geometry: Geometry, device: str, dtype: torch.dtype, options: Mapping[str, Any], *,
        density: float, refresh: float, steps: int, **changes: Any,
    ) -> None:  # fmt: skip
        self.geometry, self.device, self.steps = geometry, device, steps
        self.options: dict[str, Any] = {"top_p": TOP_P, "min_tokens": 0, "slots": 2, **options}
        block, stride = self.options.get("block_size", BLOCK), self.options.get("stride", 16)
        factor = find_factor(
            geometry.grid, 128, density, top_p=TOP_P, block=block, stride=stride, device=device
        )
        self.transformer = build_transformer(
            factor=factor, layers=geometry.layers, heads=geometry.heads, ffn_dim=geometry.ffn_dim,
            dtype=dtype, device=device, **changes,
        )  # fmt: skip
        config = self.transformer.config
        frames, height, width = geometry.grid
        generator = torch.Generator(device).manual_seed(1)

        def gaussian(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        size = (1, config.in_channels, frames, 2 * height, 2 * width)
        self._noise, self._video = gaussian(*size), gaussian(*size)
        self._text = gaussian(1, geometry.text_tokens, config.text_dim)
        self.options["delta"] = find_delta(self._means(), refresh)

    @torch.no_grad()
    def forward(self, transformer: nn.Module, step: int) -> Tensor:
        """One forward of the conditional branch at a step."""
        sigma = sigmas(self.steps)[step]
        return transformer(
            hidden_states=latents_at(self._noise, self._video, sigma),
            timestep=torch.tensor([1000.0 * sigma], device=self.device),
            encoder_hidden_states=self._text,
            return_dict=False,
        )[0]

    def twin(self) -> nn.Module:
        """A second module over the same parameters, to be compiled in another way."""
        with torch.device("meta"):
            twin = type(self.transformer).from_config(self.transformer.config)
        twin.load_state_dict(self.transformer.state_dict(), assign=True)
        twin.rope = self.transformer.rope  # its tables are no parameters
        return twin.eval().requires_grad_(False)

    def states(self, config: HasteConfig) -> list[HasteState]:
        """Those of a handle; states of earlier options are kept beside them."""
        return [state for state in states_of(self.transformer) if state.config == config]

    def _means(self) -> Tensor:
        """Means of q and k at every step, [steps, L, H, 2, D], with every mask rebuilt."""
        recorded = []
        with optimize(self.transformer, reuse="never", **{**self.options, "inner": "eager"}) as handle:
            for step in range(self.steps):
                self.forward(self.transformer, step)
                states = self.states(handle.config)
                sites = [state.tensor(i, "anchors") for state in states for i in range(len(state.specs))]
                slot = int(states[0].clock.ctl[Ctl.SLOT])
                recorded.append(torch.stack([anchors[slot, 0] for anchors in sites]).cpu())
        torch.compiler.reset()
        return torch.stack(recorded)


def counts(states: Iterable[HasteState]) -> tuple[int, int, int]:
    """Kept pairs, rebuilds and head calls so far, over all sites."""
    total = torch.zeros(COUNTER_COLUMNS, dtype=torch.int64)
    for state in states:
        for counters in state.counters():
            total += counters.sum((0, 1, 2))
    return int(total[Counter.KEPT_SUM]), int(total[Counter.REFRESHES]), int(total[Counter.CALLS])


def rates(states: Sequence[HasteState], before: tuple[int, int, int]) -> tuple[float, float]:
    """Density and refresh rate since ``before``, an earlier ``counts``."""
    pairs, rebuilds, calls = (now - then for now, then in zip(counts(states), before, strict=True))
    return pairs / (calls * states[0].specs[0].N ** 2), rebuilds / calls


def time_steps(run: Run, sides: tuple[nn.Module, nn.Module], timer: Timer) -> tuple[list[float], list[float]]:
    """Milliseconds of every step but the first; the side that begins a step alternates."""
    times: tuple[list[float], list[float]] = ([], [])
    for step in range(1, run.steps):
        for index in (0, 1) if step % 2 else (1, 0):
            times[index].append(timer(functools.partial(run.forward, sides[index], step)))
    return times


class _FirstAttention(TorchFunctionMode):
    """Remembers q, k, v of the first ``scaled_dot_product_attention``."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: tuple[Tensor, ...] = ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not self.inputs:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            self.inputs = tuple(named[name] for name in ("query", "key", "value"))
        return func(*args, **(kwargs or {}))


def check_site(run: Run, dense: nn.Module, state: HasteState) -> float:
    """Error of the op on the first site's own q, k, v and mask, over SDPA's (attention_problems.check)."""
    with _FirstAttention() as seen:
        run.forward(dense, 0)
    q, k, v = seen.inputs
    ctl, mask = state.tensor(None, "ctl"), state.tensor(0, "mask")
    out, _ = torch.ops.haste.block_sparse_attention(q, k, v, mask, ctl, block=BLOCK, scale=q.shape[3] ** -0.5)
    kept = unpack_bits(mask[int(ctl[Ctl.SLOT])], mask.shape[3])
    return check("haste op", out, Problem(q, k, v, kept))


def compare(
    run: Run, how: str, *, timer: Timer, profile: bool = True,
    dense_backend: str = "inductor",
) -> Result:  # fmt: skip
    """Compile both sides, check the kernel, and time the steps of one video."""
    dense = run.twin()
    for module in [dense] if how == "whole" else list(dense.blocks):
        module.compile(backend=dense_backend, dynamic=False)
    with optimize(run.transformer, compile=how, **run.options) as handle:  # type: ignore[arg-type]
        sides = (dense, run.transformer)
        first = [_seconds(lambda side=side: run.forward(side, 0)) for side in sides]
        for step in range(1, run.steps):
            for side in sides:
                run.forward(side, step)
        states = run.states(handle.config)
        check_site(run, run.twin(), states[0])
        run.forward(run.transformer, 0)  # a new video: every mask is rebuilt, which is not timed
        before = counts(states)
        times = time_steps(run, sides, timer)
        density, refresh_rate = rates(states, before)
        kernels: list[dict[str, float]] = [{}, {}]
        if profile:
            kernels = [_profiled(run, side) for side in sides]
        return Result(
            compile=how,
            density=density,
            refresh_rate=refresh_rate,
            dense_ms=statistics.median(times[0]),
            dense_spread=max(times[0]) - min(times[0]),
            haste_ms=statistics.median(times[1]),
            haste_mean_ms=statistics.fmean(times[1]),
            haste_spread=max(times[1]) - min(times[1]),
            dense_first_s=first[0],
            haste_first_s=first[1],
            state_bytes=sum(state.nbytes() for state in states),
            bound=bound(kernels[0], kernels[1], density) if profile else None,
            dense_parts=kernels[0],
            haste_parts=kernels[1],
        )


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    call().flatten()[0].item()  # waits for the device
    return time.perf_counter() - start


def _profiled(run: Run, side: nn.Module) -> dict[str, float]:
    from torch.profiler import ProfilerActivity, profile

    run.forward(side, 0)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for step in range(1, run.steps):
            run.forward(side, step)
        torch.cuda.synchronize()
    kernels = [(event.key, event.self_device_time_total) for event in profiler.key_averages()]
    return parts(kernels, run.steps - 1)


def report(result: Result) -> str:
    """The table of one comparison."""
    lines = [
        f"{result.compile}: dense {result.dense_ms:.1f} ± {result.dense_spread / 2:.1f} ms, haste "
        f"{result.haste_mean_ms:.1f} ms (median {result.haste_ms:.1f}, ± {result.haste_spread / 2:.1f}), "
        f"{result.speedup:.2f}×; density {result.density:.3f}, refresh rate {result.refresh_rate:.2f}",
        f"  first call: dense {result.dense_first_s:.0f} s, haste {result.haste_first_s:.0f} s; "
        f"state {result.state_bytes / 1e6:.0f} MB",
    ]
    if result.bound is not None:
        lines.append(f"  bound {result.bound:.2f}×, reached {result.speedup / result.bound:.0%} of it")
    for kind in [kind for kind, _ in KINDS] + ["rest"]:
        dense, haste = result.dense_parts.get(kind), result.haste_parts.get(kind)
        if dense is not None or haste is not None:
            lines.append(f"  {kind:<18} {dense or 0.0:>9.2f} ms dense {haste or 0.0:>9.2f} ms haste")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=list(MODELS), default="1.3B")
    parser.add_argument("--size", choices=list(GRIDS), default="480p")
    parser.add_argument("--compile", choices=("whole", "blocks"), nargs="+", default=["whole"])
    parser.add_argument("--density", type=float, default=0.25, help="mean density to aim at")
    parser.add_argument("--refresh", type=float, default=0.2, help="share of masks rebuilt a step to aim at")
    parser.add_argument("--steps", type=int, default=12, help="denoising steps of the video")
    parser.add_argument("--no-profile", action="store_true", help="leave the breakdown and the bound out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        need_gpu("benchmarks/wan_forward.py")
        import triton

        geometry = Geometry(*MODELS[options.model], GRIDS[options.size])
        facts = {
            "weights": WEIGHTS,
            "model": options.model,
            "size": options.size,
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": datetime.date.today().isoformat(),
            "steps": options.steps,
            "warm_up_steps": 0,
        }
        print(", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
        run = Run(
            geometry, "cuda", torch.bfloat16, {}, density=options.density, refresh=options.refresh,
            steps=options.steps,
        )  # fmt: skip
        results = []
        for how in options.compile:
            torch.compiler.reset()
            results.append(compare(run, how, timer=cuda_milliseconds, profile=not options.no_profile))
            print(report(results[-1]), flush=True)
    except WrongResultError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    except HasteError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json is not None:
        rows = [{**dataclasses.asdict(result), "speedup": result.speedup} for result in results]
        options.json.write_text(json.dumps({"environment": facts, "rows": rows}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
