"""Time SVG2 at one attention site against dense SDPA, on one NVIDIA GPU: cluster, order, map, attend.

    python -m benchmarks.svg2                                # 1.3B and 14B, 480p and 720p: minutes
    python -m benchmarks.svg2 --quick                        # correctness and a small timing: seconds
    python -m benchmarks.svg2 --json benchmarks/results/svg2-h200.json
    python -m benchmarks.svg2 --geometry "1.3B 720p" --top-p 0.5 --attention-only --forms triton gluon
    python -m benchmarks.svg2 --geometry "1.3B 720p" --top-p 0.5 --floor 0.18    # density .25 or so
    python -m benchmarks.svg2 --geometry "1.3B 720p" --top-p 0.5 --forms --clusterings "1 program"

Queries and keys are drawn around a few hundred centres, since tokens without structure have no map worth
having; so speeds are those of given densities, and no evidence of quality. Before anything is timed

* k-means is compared with the reference on one head (inertia within 1e-3),
* the order is a permutation that sorts the labels, and the map that of the reference (but for rounding),
* attention's error against float64, on query clusters of every head, is within twice that of SDPA in the same
  dtype on the same keys;

what fails is not timed. A form of attention that no GPU has confirmed yet runs in a child process with a time
limit first, and is left out with the reason when it fails there.

All sides run in one process, interleaved, first calls excluded; medians. TFLOP/s count kept query-key pairs,
4·D FLOP each. "fixed blocks" is the kernel under XAttention at the density that the map has. A rebuild that
is not the first of its video starts from centroids that have drifted a little. A refresh launches eight
kernels, and the benchmark waits for every call; "replayed" is the same as a CUDA graph, without Python.

Exit code: 0, 1 when a kernel is wrong, 2 when the machine cannot run the benchmark.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.attention import (
    DTYPE,
    HEAD_DIM,
    HEADER,
    Row,
    WrongResultError,
    environment,
    line,
    make_problem,
    measure,
    row,
)
from benchmarks.attention_sides import PROBE_SECONDS, in_child
from benchmarks.interleaving import captured
from benchmarks.machine import need_gpu
from haste_compile.config import HasteConfig
from haste_compile.errors import HasteError
from haste_compile.kernels import cluster_ops
from haste_compile.kernels.block_mask import unpack_bits
from haste_compile.kernels.cluster_map import reference as cluster_map
from haste_compile.kernels.kmeans import reference as kmeans
from haste_compile.kernels.kmeans.variants import VARIANTS as CLUSTERINGS
from haste_compile.kernels.layout import Counter, Ctl
from haste_compile.kernels.variable_block_attention.reference import labels as labels_of
from haste_compile.kernels.variable_block_attention.variants import VARIANTS
from haste_compile.predictors import get_predictor
from haste_compile.predictors.base import site_layouts

#: Tokens of 81 frames at 480×832 and 720×1280, and heads of Wan 2.1 1.3B and 14B.
GEOMETRIES = {
    "1.3B 480p": (12, 32_760),
    "1.3B 720p": (12, 75_600),
    "14B 480p": (40, 32_760),
    "14B 720p": (40, 75_600),
}
CENTRES = 400
#: Tokens of a query cluster that are checked; all of a large one would take long in float64.
CHECKED_ROWS = 64
#: Heads, tokens and top_p that an unconfirmed form is tried on: fewer tiles than multiprocessors, and many.
#: Multiples of 16, as 75,600 is: no kernel is compiled a second time within the child's time.
TRIED = ((1, 112, 0.9), (2, 1024, 0.5), (12, 4112, 0.3), (12, 32_768, 0.5))


@dataclasses.dataclass(frozen=True)
class Site:
    """q, k, v [1, H, N, D] as a transformer delivers them, and the state of a site with one slot."""

    q: Tensor
    k: Tensor
    v: Tensor
    state: dict[str, Tensor]
    config: HasteConfig

    @property
    def tokens(self) -> int:
        return self.q.shape[2]

    @property
    def heads(self) -> int:
        return self.q.shape[1]

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    def refresh(self, *, first: bool = False, **rule: Any) -> None:
        """Rebuild every head, as at the first step of a video or as later; ``rule`` changes options."""
        call = get_predictor("svg2").refresh(self.config, self.scale)
        if first:
            self.state["counters"].zero_()
        call.op(self.q, self.k, *(self.state[name] for name in call.fields), **call.options | rule)

    def attend(self, form: str | None = None) -> Tensor:
        """What a model runs, or one form of the kernel by its name in ``variants.py``."""
        state = [self.state[name] for name in ("order", "offsets", "mask", "ctl")]
        if form is None:
            return cluster_ops.cluster_sparse_attention(self.q, self.k, self.v, *state, scale=self.scale)[0]
        return VARIANTS[form].attend(self.q, self.k, self.v, *state, scale=self.scale)[0]

    def pairs(self) -> int:
        return int(self.state["counters"][..., Counter.KEPT].sum())


def make_site(
    heads: int,
    tokens: int,
    top_p: float,
    *,
    floor: float = 0.1,
    device: str = "cuda",
    dtype: torch.dtype = DTYPE,
) -> Site:
    """Clustered q and k, Gaussian v, empty state."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    # In one space, as they are in a head: some centres of keys lie near some of queries.
    centres = 1.5 * draw(heads, CENTRES, HEAD_DIM)

    def tokens_around() -> Tensor:
        which = torch.randint(CENTRES, (tokens, heads), device=device, generator=generator)
        x = draw(tokens, heads, HEAD_DIM)
        x += centres[torch.arange(heads, device=device), which]
        return x.to(dtype)[None].transpose(1, 2)

    q, k = tokens_around(), tokens_around()
    v = draw(1, tokens, heads, HEAD_DIM).to(dtype).transpose(1, 2)
    options = {"predictor": "svg2", "top_p": top_p, "slots": 1, "reuse": "never", "cluster_floor": floor}
    config = HasteConfig.from_options(options)
    layouts = site_layouts(get_predictor("svg2"), tuple(q.shape), config)
    state = {
        name: torch.zeros(tuple(map(int, shape)), dtype=kind, device=device)
        for name, (shape, kind) in layouts.items()
    }
    state["ctl"][Ctl.EPOCH] = 1
    state["top_p"].fill_(top_p)
    return Site(q, k, v, state, config)


def check_state(site: Site, *, iterations: int) -> None:
    """Hold clusters, order and map of a first rebuild against the references.

    Args:
        iterations: of k-means at the first rebuild.

    Raises:
        WrongResultError: something is not what the reference computes.
    """
    state = {name: x[0, 0] for name, x in site.state.items() if x.dim() > 2}
    rows = state["mask"].shape[1]
    ends = (slice(0, rows + 1), slice(rows + 1, None))
    parts = (slice(0, rows), slice(rows, None))
    found = [labels_of(state["order"][None, :, i], state["offsets"][None, :, ends[i]])[0] for i in (0, 1)]
    for side, x in enumerate((site.q, site.k)):
        everyone = state["order"][:, side].sort(1).values == torch.arange(site.tokens, device=x.device)
        _demand(bool(everyone.all()), "an order that is no permutation", "cluster_order", site)
        in_order = found[side].gather(1, state["order"][:, side].long()).diff(dim=1) >= 0
        _demand(bool(in_order.all()), "tokens out of order", "cluster_order", site)
        token, centroids = x[0, :1], state["centroids"][:1, parts[side]]
        start = kmeans.first_centroids(token, centroids.shape[1])
        wanted = kmeans.kmeans(token, start, iterations=iterations, tolerance=0.0)
        ours, theirs = (
            (token[0].double() - means[0].double()[labels[0]]).square().sum().item()
            for labels, means in ((found[side][:1], centroids), wanted)
        )
        close = abs(ours - theirs) <= 1e-3 * theirs
        _demand(close, f"inertia {ours:.6g} beside the reference's {theirs:.6g}", "kmeans", site)
    sizes = [state["offsets"][:, end].diff().long() for end in ends]
    centroids = [state["centroids"][:, part] for part in parts]
    least = math.ceil(site.config.cluster_floor * sizes[1].shape[1] - 1e-9)
    top_p = site.state["top_p"][: site.heads]
    wanted_map = cluster_map.cluster_map(*centroids, sizes[1], top_p, scale=site.scale, least=least)
    kept, wanted_kept = (unpack_bits(bits, sizes[1].shape[1]) for bits in (state["mask"], wanted_map))
    differing = (kept != wanted_kept).float().mean().item()
    _demand(differing < 1e-3, f"a map of which {differing:.2%} differ", "cluster_map", site)
    pairs = cluster_map.token_pairs(state["mask"], *sizes)
    counted = state["counters"][:, Counter.KEPT]
    _demand(torch.equal(pairs, counted), "counters that miscount the map", "cluster_map", site)


def check_attention(site: Site, out: Tensor, samples: int = 3) -> float:
    """Largest ratio of errors against float64, ``out``'s over SDPA's, on some query clusters of every head.

    Raises:
        WrongResultError: a ratio above 2, or a value that is not finite.
    """
    order, offsets, mask = (site.state[name][0, 0] for name in ("order", "offsets", "mask"))
    clusters = mask.shape[1]
    kept = unpack_bits(mask, offsets.shape[1] - clusters - 2)
    worst = 0.0
    for head in range(site.heads):
        of_key = labels_of(order[None, None, head, 1], offsets[None, None, head, clusters + 1 :])[0, 0]
        sizes = offsets[head, : clusters + 1].diff()
        errors, yardsticks = [], []
        for cluster in sizes.nonzero().flatten()[:: max(1, clusters // samples)].tolist():
            begin = int(offsets[head, cluster])
            rows = order[head, 0, begin : begin + min(int(sizes[cluster]), CHECKED_ROWS)].long()
            q = site.q[:, head : head + 1, rows]
            keys = kept[head, cluster][of_key]
            k, v = (x[:, head : head + 1, keys] for x in (site.k, site.v))
            exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
            yardsticks.append((F.scaled_dot_product_attention(q, k, v) - exact).abs().max().item())
            errors.append((out[:, head : head + 1, rows] - exact).abs().max().nan_to_num(math.inf).item())
        found = f"error {max(errors):.2e} beside SDPA's {max(yardsticks):.2e}, head {head}"
        _demand(max(errors) <= 2 * max(yardsticks), found, "attention", site)
        worst = max(worst, max(errors) / max(yardsticks))
    return worst


def usable_forms(
    site: Site, left_out: dict[str, str], wanted: Sequence[str] | None = None
) -> dict[str, float]:  # fmt: skip
    """Error of every form of the kernel that may be timed, as ``check_attention`` has it.

    Args:
        wanted: names in ``variants.py``; None: all.
        left_out: gets the others, name -> reason.

    Raises:
        WrongResultError: a form that a GPU has confirmed is wrong.
    """
    errors: dict[str, float] = {}
    for name in VARIANTS if wanted is None else wanted:
        variant = VARIANTS[name]
        reason = variant.refuses(torch.cuda.get_device_capability(site.q.device))
        if reason is None and not variant.confirmed:
            reason = probe(name)
        if reason is None:
            try:
                errors[name] = check_attention(site, site.attend(name))
            except WrongResultError as error:
                if variant.confirmed:
                    raise
                reason = str(error)
        if reason is not None:
            left_out[f"svg2 attention, {name}"] = reason
    return errors


@functools.cache
def probe(name: str) -> str | None:
    """Why a form must not run in this process; None when its output was right in a child that may hang."""
    return in_child(try_form, name, PROBE_SECONDS)


def try_form(name: str, sites: tuple[tuple[int, int, float], ...] = TRIED, device: str = "cuda") -> None:
    """Run one form on sites of (heads, tokens, top_p), ten times each, and in a dense step.

    Raises:
        WrongResultError: wrong, or another result from run to run.
    """
    for heads, tokens, top_p in sites:
        site = make_site(heads, tokens, top_p, device=device)
        site.refresh(first=True, first_iterations=4)
        first = site.attend(name)
        check_attention(site, first)
        steady = all(torch.equal(first, site.attend(name)) for _ in range(10))
        _demand(steady, "an output that differs from run to run", f"attention, {name}", site)
        site.state["ctl"][Ctl.DENSE] = 1
        exact = F.scaled_dot_product_attention(site.q[:, :, :64].double(), site.k.double(), site.v.double())
        error, yardstick = (
            (out[:, :, :64] - exact).abs().max().nan_to_num(math.inf).item()
            for out in (site.attend(name), F.scaled_dot_product_attention(site.q, site.k, site.v))
        )
        found = f"error {error:.2e} beside SDPA's {yardstick:.2e} in a dense step"
        _demand(error <= 2 * yardstick, found, f"attention, {name}", site)


def _demand(right: bool, found: str, what: str, site: Site) -> None:
    if not right:
        raise WrongResultError(
            found=found,
            wanted="the reference's result",
            where=f"{what}, {site.heads} heads, N = {site.tokens}",
            fix="Run the tests marked gpu.",
        )


def compare(
    heads: int,
    tokens: int,
    top_p: float,
    repeats: int,
    left_out: dict[str, str],
    *,
    forms: Sequence[str] | None = None,
    clusterings: Sequence[str] = (),
    floor: float = 0.1,
    attention_only: bool = False,
) -> list[Row]:
    """Check, then time, everything that a site does, or just its attention.

    Args:
        left_out: gets the forms of attention that cannot run, name -> reason.
        forms: of attention, by their names in ``variants.py``, beside the one that a model gets; None: all.
        clusterings: configurations of k-means by their names, beside the one that a model gets.
        floor: share of the key clusters that every query cluster keeps.
    """
    from haste_compile.kernels.block_sparse_attention import dispatch as fixed_blocks
    from haste_compile.kernels.cluster_map import kernel as map_kernel
    from haste_compile.kernels.cluster_order import kernel as order_kernel
    from haste_compile.kernels.kmeans import kernel as kmeans_kernel

    site = make_site(heads, tokens, top_p, floor=floor)
    state, q, k, v = site.state, site.q, site.k, site.v
    site.refresh(first=True)
    if not attention_only:
        check_state(site, iterations=site.config.cluster_iterations[0])
    errors = {"svg2 attention": check_attention(site, site.attend())}
    usable = usable_forms(site, left_out, forms)
    errors |= {f"svg2 attention, {name}": error for name, error in usable.items()}
    pairs = site.pairs()

    problem = make_problem(tokens, heads, pairs / (heads * tokens**2))
    lists = problem.lists()
    drifted = state["centroids"] + 0.02 * torch.randn_like(state["centroids"])
    flags = torch.ones(1, heads, dtype=torch.int32, device="cuda")
    books = state["counters"].clone()
    books[..., Counter.REFRESHES] = 2
    rows = state["mask"].shape[3]
    least = math.ceil(floor * (state["centroids"].shape[3] - rows) - 1e-9)

    order, offsets = state["order"].clone(), state["offsets"].clone()  # those of the map stay

    def cluster(first: bool = False, name: str | None = None) -> Tensor:
        state["centroids"].copy_(drifted)
        return kmeans_kernel.cluster_(
            q, k, flags, state["ctl"], state["counters"] if first else books, state["centroids"],
            q_clusters=rows, first_iterations=50, iterations=2, tolerance=0.0, order=order, offsets=offsets,
            tiles=None if name is None else CLUSTERINGS[name],
        )  # fmt: skip

    def rebuild(first: bool = False) -> None:
        state["centroids"].copy_(drifted)
        site.refresh(first=first)

    def first_cluster() -> Tensor:
        state["counters"][..., Counter.REFRESHES] = 1
        return cluster(first=True)

    labels = cluster()
    alike = {name: (cluster(name=name) == labels).float().mean().item() for name in clusterings}
    left_out |= {
        f"cluster, {name}": f"{1 - share:.2%} of the labels differ"
        for name, share in alike.items()
        if share < 0.999
    }
    calls: dict[str, Callable[[], object]] = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
        "fixed blocks, equal density": lambda: fixed_blocks.attend(
            problem.q, problem.k, problem.v, lists, block=lists.block, scale=site.scale
        ),
        "svg2 attention": site.attend,
        **{f"svg2 attention, {name}": functools.partial(site.attend, name) for name in usable},
    }  # fmt: skip
    rebuilding: dict[str, Callable[[], object]] = {
        "cluster, 2 iterations": cluster,
        **{
            f"cluster, {name}": functools.partial(cluster, name=name)
            for name, share in alike.items()
            if share >= 0.999
        },
        "cluster, 50 iterations": first_cluster,
        "order": lambda: order_kernel.sort_(
            labels, flags, state["ctl"], state["order"], state["offsets"], q_clusters=rows
        ),
        "map": lambda: map_kernel.select_(
            state["centroids"], state["offsets"], state["top_p"], flags, state["ctl"], state["mask"], books,
            scale=site.scale, least=least,
        ),
        "refresh, every head rebuilds": rebuild,
        "refresh, every head reuses": lambda: site.refresh(reuse="freeze"),
    }  # fmt: skip
    if not attention_only:
        calls |= rebuilding
        for name in ("refresh, every head rebuilds", "refresh, every head reuses"):
            calls[f"{name}, replayed"] = _replayed(rebuilding[name], state["mask"])
    times = measure(calls, repeats)
    timed = [row(name, problem, times[name]) for name in calls]
    counted = {
        "dense SDPA": heads * tokens**2,
        "fixed blocks, equal density": problem.pairs(),
        **dict.fromkeys(errors, pairs),
    }
    return [_counted(r, counted[r.what], errors.get(r.what)) if r.what in counted else r for r in timed]


def _replayed(call: Callable[[], object], result: Tensor) -> Callable[[], object]:
    def with_result() -> Tensor:
        call()
        return result

    return captured(with_result)[0]


def _counted(timed: Row, pairs: int, error: float | None) -> Row:
    """With what follows from the kept pairs of one sample."""
    flops = 4 * HEAD_DIM * pairs
    return dataclasses.replace(
        timed,
        density=pairs / (timed.heads * timed.tokens**2),
        flops=flops,
        tflops=flops / timed.milliseconds / 1e9,
        error=error,
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--geometry", nargs="+", choices=list(GEOMETRIES), default=list(GEOMETRIES))
    parser.add_argument("--top-p", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=7, help="timed rounds, of which the median is shown")
    parser.add_argument("--quick", action="store_true", help="4 heads of 4,100 tokens, 3 rounds")
    parser.add_argument("--forms", nargs="*", help="of attention, as in variants.py; default: all of them")
    parser.add_argument(
        "--clusterings", nargs="+", default=(), choices=list(CLUSTERINGS), help="k-means configurations too"
    )
    parser.add_argument("--floor", type=float, default=0.1, help="share of key clusters that every row keeps")
    parser.add_argument("--attention-only", action="store_true", help="neither check nor time the rebuild")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    options = parser.parse_args(arguments)
    unknown = set(options.forms or ()) - set(VARIANTS)
    if unknown:
        parser.error(f"no form {sorted(unknown)}; there are {sorted(VARIANTS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    geometries = {name: GEOMETRIES[name] for name in options.geometry}
    if options.quick:
        geometries, options.repeats = {"quick": (4, 4100)}, 3
    try:
        need_gpu("benchmarks/svg2.py")
        known = {**environment(), "centres": CENTRES, "floor": options.floor}
        left_out: dict[str, str] = {}
        record: dict[str, Any] = {"environment": known, "geometries": {}, "left_out": left_out}
        del record["environment"]["block"]
        print(", ".join(f"{key} {value}" for key, value in record["environment"].items()), flush=True)
        for name, (heads, tokens) in geometries.items():
            for top_p in options.top_p:
                rows = compare(
                    heads, tokens, top_p, options.repeats, left_out,
                    forms=options.forms, clusterings=options.clusterings, floor=options.floor,
                    attention_only=options.attention_only,
                )  # fmt: skip
                dense = rows[0].milliseconds
                print(f"{name}, top_p {top_p:g}\n{HEADER} {'of dense':>9}")
                print("\n".join(f"{line(r)} {r.milliseconds / dense:>9.2%}" for r in rows), flush=True)
                record["geometries"].setdefault(name, {})[f"{top_p:g}"] = [
                    dataclasses.asdict(r) for r in rows
                ]
                if options.json is not None:  # each as it comes: the next may run out of time
                    options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print("\n".join(f"left out: {name}: {reason}" for name, reason in left_out.items()), flush=True)
    except WrongResultError as error:
        print(f"not timed: {error}", file=sys.stderr)
        return 1
    except HasteError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
