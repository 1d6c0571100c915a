"""What the order of the tokens does to density at equal error.

    python -m benchmarks.token_order                     # nano-wan: two prompts, three steps of 10
    python -m benchmarks.token_order --model FOLDER --height 480 --width 832 --frames 81 -o block_size=128
    python -m benchmarks.token_order --top-p 0.8 0.9 0.95 --json benchmarks/results/token-order-nano-wan.json

Videos are denoised dense. At some steps the inputs of the conditional branch are kept, and for each of them

1. one dense forward gives q, k, v of every self-attention site and the velocity;
2. for each order and top_p, every site attends once with masks made from scratch (``attend_once``), its
   tokens in that order: density, and the relative error ‖sparse − dense‖ / ‖dense‖ of a head's output;
3. the same with *exact* scores in place of the predictor's, the softmax mass of every pair of blocks: what
   the order itself allows, apart from how well the predictor guesses;
4. the transformer runs with all sites sparse in that order, through the ``haste`` backend: density, and the
   relative error of the velocity.

Errors are root mean squares over heads, sites, steps and prompts, densities are means. "At equal
error" is an order's density over that of raster order, where the two curves (log density against log error,
interpolated) have the same error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from haste_compile.config import TOKEN_ORDERS, HasteConfig, parse_options
from haste_compile.errors import HasteError
from haste_compile.explanation import explain
from haste_compile.generation import Request, default_options, default_request, generate
from haste_compile.kernels.block_mask import token_pairs
from haste_compile.kernels.block_sparse_attention.cpu import attend
from haste_compile.kernels.top_p_select.reference import top_p_select
from haste_compile.loading import NANO_WAN, default_dtype, load_pipeline
from haste_compile.pipeline import optimize
from haste_compile.predictors import get_predictor
from haste_compile.state import states_of
from haste_compile.token_order import Grid, describe, spread, token_order

PROMPTS = (
    "a red circle moves left, a blue square moves up",
    "a green triangle moves right, a yellow circle moves down",
)
TOP_P = (0.75, 0.85, 0.92, 0.97)
#: What is measured: attention with the predictor's scores, with exact scores, and the whole transformer.
KINDS = ("attention", "exact", "velocity")


@dataclasses.dataclass(frozen=True)
class Row:
    """One setting over everything recorded."""

    kind: str
    order: str
    top_p: float
    density: float
    error: float

    def __str__(self) -> str:
        return f"{self.kind:>9} {self.order:>8} {self.top_p:6.3f} {self.density:8.4f} {self.error:9.5f}"


HEADER = f"{'':>9} {'order':>8} {'top_p':>6} {'density':>8} {'error':>9}"


class SelfAttention(TorchFunctionMode):
    """Collects q, k, v [B, H, N, D] and the output of every call of dense self-attention."""

    def __init__(self) -> None:
        self.sites: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            q, k, v = (given[name] for name in ("query", "key", "value"))
            if q.shape == k.shape:
                self.sites.append((q, k, v, out))
        return out


class Figures:
    """Gathers density and squared relative error for each setting."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str, float], list[tuple[float, float]]] = defaultdict(list)

    def add(self, kind: str, order: str, top_p: float, density: float, squared_error: float) -> None:
        self._seen[kind, order, top_p].append((density, squared_error))

    def rows(self) -> list[Row]:
        rows = []
        for setting, seen in sorted(self._seen.items(), key=lambda item: _place(*item[0])):
            densities, errors = zip(*seen, strict=True)
            rows.append(Row(*setting, statistics.fmean(densities), math.sqrt(statistics.fmean(errors))))
        return rows


def _place(kind: str, order: str, top_p: float) -> tuple[int, int, float]:
    return KINDS.index(kind), TOKEN_ORDERS.index(order), top_p


def record_calls(pipe: Any, request: Request, at: Sequence[int]) -> list[dict[str, Any]]:
    """The transformer's inputs at the given steps of a dense video; the conditional branch comes first."""
    calls: dict[int, dict[str, Any]] = {}
    step = 0

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if step in at and step not in calls:
            calls[step] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items()}

    def step_ended(done: int) -> None:
        nonlocal step
        step = done + 1

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        generate(pipe, request, step_ended)
    finally:
        hook.remove()
    return list(calls.values())


def measure_sites(
    recorder: SelfAttention, grid: Grid, config: HasteConfig, top_ps: Sequence[float], figures: Figures
) -> None:
    """Steps 2 and 3 of the module's docstring, for one dense forward."""
    predictor = get_predictor(config.predictor)
    for q, k, v, out in recorder.sites:
        heads, count = q.shape[1], q.shape[2]
        dense = out.float().square().sum((2, 3))
        for name in TOKEN_ORDERS:
            order = token_order(name, grid, config.block_size)
            tokens = [x.transpose(1, 2)[:, order].transpose(1, 2) for x in (q, k, v)]
            wanted = out[:, :, order].float()
            mass = exact_mass(tokens[0], tokens[1], config.block_size)
            for top_p in top_ps:
                thresholds = torch.full((heads,), top_p)
                bits = top_p_select(mass, thresholds)
                by_mass, _ = attend(*tokens, bits, block=config.block_size, scale=q.shape[3] ** -0.5)
                sparse, pairs = predictor.attend_once(*tokens, thresholds, config)
                found = {
                    "attention": (sparse, pairs),
                    "exact": (by_mass, token_pairs(bits, count, config.block_size)),
                }
                for kind, (result, kept) in found.items():
                    squared = (result.float() - wanted).square().sum((2, 3)) / dense
                    density = float(kept.double().mean()) / count**2
                    figures.add(kind, name, top_p, density, float(squared.mean()))


def exact_mass(q: Tensor, k: Tensor, block: int) -> Tensor:
    """Softmax mass between blocks, [B, H, T, T] float32; a row sums to the tokens of its block."""
    count, blocks = q.shape[2], -(-q.shape[2] // block)
    rows = []
    for piece in q.split(block, dim=2):
        mass = torch.softmax(piece.float() @ k.float().transpose(2, 3) * q.shape[3] ** -0.5, dim=-1)
        padded = F.pad(mass.sum(2), (0, blocks * block - count))
        rows.append(padded.unflatten(2, (blocks, block)).sum(3))
    return torch.stack(rows, 2)


def measure_velocity(
    transformer: nn.Module,
    calls: Sequence[dict[str, Any]],
    dense: Sequence[Tensor],
    options: dict[str, Any],
    top_ps: Sequence[float],
    figures: Figures,
) -> None:
    """Step 4 of the module's docstring, for one order."""
    torch.compiler.reset()
    with optimize(transformer, inner="eager", reuse="never", strict=True, **options) as handle:
        transformer(**calls[0])  # makes the state whose thresholds are set below
        for call, velocity in zip(calls, dense, strict=True):
            for top_p in top_ps:
                handle.reset()
                for state in states_of(transformer):
                    _set_top_p(state, top_p)
                sparse = _velocity(transformer, call)
                squared = (sparse - velocity).square().sum() / velocity.square().sum()
                density = handle.statistics()["transformer"].density
                figures.add("velocity", options["token_order"], top_p, density, float(squared))


def _set_top_p(state: Any, top_p: float) -> None:
    for site in range(len(state.specs)):
        state.tensor(site, "top_p").fill_(top_p)


def _velocity(transformer: nn.Module, call: dict[str, Any]) -> Tensor:
    output = transformer(**call)
    return (output[0] if isinstance(output, tuple) else output.sample).float()


def at_equal_error(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Densities over raster order's, at the errors of raster order that the other curve covers."""
    curves: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.error > 0:
            curves[row.kind, row.order].append(row)
    for (kind, order), curve in curves.items():
        if order == "raster" or (kind, "raster") not in curves:
            continue
        points = sorted((math.log(row.error), math.log(row.density)) for row in curve)
        errors, densities = zip(*points, strict=True)
        for base in curves[kind, "raster"]:
            if errors[0] <= math.log(base.error) <= errors[-1]:
                density = math.exp(np.interp(math.log(base.error), errors, densities))
                yield {
                    "kind": kind,
                    "order": order,
                    "error": base.error,
                    "raster_density": base.density,
                    "ratio": density / base.density,
                }


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    device = torch.device("cpu")
    pipe = load_pipeline(args.model, device=device, dtype=default_dtype(device))
    base = dataclasses.replace(default_request(args.model), steps=args.steps)
    given = {name: getattr(args, name) for name in ("height", "width", "frames")}
    base = dataclasses.replace(base, **{name: value for name, value in given.items() if value is not None})
    options = {k: v for k, v in default_options(args.model).items() if k in ("block_size", "stride")}
    options.update(parse_options(args.option))
    config = HasteConfig.from_options(options)

    calls: list[dict[str, Any]] = []
    for prompt in args.prompt or PROMPTS:
        request = dataclasses.replace(base, prompt=prompt, seed=args.seed)
        calls += record_calls(pipe, request, args.at)
        _say(f"recorded {len(calls)} calls; {prompt!r}")
    grid = _grid(pipe, base, options)
    _say("; ".join(describe(name, grid, config.block_size) for name in TOKEN_ORDERS[1:]))

    figures, dense = Figures(), []
    with torch.no_grad():
        for call in calls:
            with SelfAttention() as recorder:
                dense.append(_velocity(pipe.transformer, call))
            measure_sites(recorder, grid, config, args.top_p, figures)
            _say(f"attention of call {len(dense)} of {len(calls)}")
        for name in TOKEN_ORDERS:
            order = {**options, "token_order": name}
            measure_velocity(pipe.transformer, calls, dense, order, args.top_p, figures)
            _say(f"velocity in order {name}")
    rows, ratios = figures.rows(), list(at_equal_error(figures.rows()))
    _say("\n".join([HEADER, *map(str, rows)]))
    for found in ratios:
        _say("{kind:>9} {order:>8} at error {error:.4f}: density {ratio:.3f} of raster's".format(**found))
    if args.json:
        report = {
            "model": "nano-wan" if Path(args.model) == NANO_WAN else str(args.model),
            "torch": torch.__version__,
            "device": "cpu",
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            "prompts": list(args.prompt or PROMPTS),
            "seed": args.seed,
            "steps": base.steps,
            "at": list(args.at),
            "calls": len(calls),
            "options": options,
            "grid": list(grid),
            "orders": {name: describe(name, grid, config.block_size) for name in TOKEN_ORDERS},
            "spread": {
                name: spread(token_order(name, grid, config.block_size), grid, config.block_size)
                for name in TOKEN_ORDERS
            },
            "rows": [dataclasses.asdict(row) for row in rows],
            "at_equal_error": ratios,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _grid(pipe: Any, request: Request, options: dict[str, Any]) -> Grid:
    size = {"height": request.height, "width": request.width, "num_frames": request.frames}
    found = explain(pipe, **size, **{**options, "token_order": "hilbert", "strict": True})
    grid = found["transformer"].grid
    if grid is None:
        raise RuntimeError("strict=True lets no other order than the one asked for pass")
    return grid


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.token_order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default=NANO_WAN, help="folder or hub id; default: nano-wan")
    parser.add_argument("--prompt", action="append", help="repeatable; default: two that nano-wan knows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--at", type=int, nargs="+", default=[1, 4, 8], help="steps that are recorded, from 0"
    )
    parser.add_argument("--top-p", type=float, nargs="+", default=list(TOP_P))
    parser.add_argument(
        "-o", "--option", action="append", default=[], metavar="NAME=VALUE", help="repeatable"
    )
    for name in ("height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int, help="default: what suits the model")
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(arguments)


def _say(line: str) -> None:
    print(line, flush=True)  # a row takes a minute: it must not wait in a buffer


if __name__ == "__main__":
    try:
        main()
    except HasteError as error:
        sys.exit(f"{error}")
