"""Bring the video tokens in an order in which a block of consecutive tokens is compact."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, fx

from haste_compile import _torch
from haste_compile.errors import TokenOrderError
from haste_compile.passes.base import AttentionSite, PassContext, PermutedTokens
from haste_compile.passes.rewrite_self_attention import unbound_state
from haste_compile.passes.token_axis import Followed, follow, moved_axes, reshaped_axis, sizes, written_to
from haste_compile.predictors.base import Size
from haste_compile.token_order import ORDER_FIELDS, Grid


def permute_tokens(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Permute the tokens once behind the patch embedding, and the result back once before it is a video.

    Block-sparse attention keeps and skips runs of consecutive tokens. In raster order such a run is a few
    long rows of one frame; in another order (``token_order``) it is a compact piece of the video.

    Before:
        tokens = conv3d(latents, ...).flatten(2).transpose(1, 2).contiguous()   [B, N, C]
        cos = cat([...], -1).reshape(1, N, 1, D)
        q = rope(to_q(norm(tokens)), cos); ...                                  (all blocks)
        y = proj_out(...)                                                       [B, N, P]
        video = y.reshape(B, T, H, W, ...)
    After:
        tokens = conv3d(latents, ...).flatten(2).transpose(1, 2).contiguous()
        ordered_tokens = index_select(tokens, 1, order)
        cos = cat([...], -1).reshape(1, N, 1, D)
        ordered_cos = index_select(cos, 1, order)
        q = rope(to_q(norm(ordered_tokens)), ordered_cos); ...
        y = proj_out(...)
        restored = index_select(y, 1, inverse)
        video = restored.reshape(B, T, H, W, ...)

    Nothing is known by name. The grid is the output of the 3-D convolution that the sites' queries come from.
    From there the token axis is followed through every operation (``token_axis.py``). An operand that holds
    something for each token in raster order (rotary tables, per-token modulation) is permuted where it is
    made; the one tensor that an operation needs in raster order is permuted back. So each operation in
    between is known to let tokens change places. If one is not, if a site is reached by other tokens or if
    sizes are symbolic, the graph stays as it is and the report says why.

    Raises:
        TokenOrderError: with ``strict=True``, where the graph stays in raster order for such a reason.
    """
    if ctx.config.token_order == "raster":
        return
    try:
        plan = _plan(gm.graph, [site for site in ctx.sites if site.status == "eligible"])
    except _RasterOrderError as refusal:
        if ctx.config.strict:
            raise _unavailable(ctx.config.token_order, str(refusal)) from None
        ctx.order = PermutedTokens(reason=str(refusal))
        return
    gathers, restored = _insert(gm.graph, plan, ctx)
    ctx.order = PermutedTokens(ctx.config.token_order, plan.grid, gathers=gathers, restored=restored)
    for site in ctx.sites:  # a site may have read what is permuted now
        site.call = cast(_torch.AttentionCall, _torch.attention_call(site.node))


class _RasterOrderError(Exception):
    """Why the tokens of this graph have to stay in raster order, for the user to read."""


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Token axes of the tensors to permute, the tensor to permute back, and who reads it in raster order."""

    grid: Grid
    sources: dict[fx.Node, int]
    result: fx.Node
    axis: int
    readers: tuple[fx.Node, ...]


def _plan(graph: fx.Graph, sites: Sequence[AttentionSite]) -> _Plan:
    if not sites:
        raise _RasterOrderError("no attention site is rewritten")
    count = sites[0].shape[2]
    if not isinstance(count, int):
        raise _RasterOrderError(f"symbolic token count {count}: compile each size with dynamic=False")
    embeddings = _patch_embeddings(sites, count)
    grids = {cast(Grid, (sizes(node) or ())[2:]) for node in embeddings}
    if len(grids) != 1:
        found = "no 3-D convolution" if not grids else f"convolutions of {len(grids)} different grids"
        raise _RasterOrderError(
            f"{found} with one output for each of the {count} tokens leads to the attention sites, so their "
            "grid is unknown (a block that is compiled alone does not see the patch embedding)"
        )
    sources = dict(_entry(node, count) for node in embeddings)
    axes, needs = _propagate(graph, sources, count)
    for site in sites:
        if any(axes.get(node) != 2 for node in (site.q, site.k, site.v)):
            raise _RasterOrderError(f"{site.label} attends to other tokens than those of the patch embedding")
    _check_writes(graph, axes)
    if len(needs) != 1:
        places = [f"{r.name} in {_torch.module_path(r) or 'the graph'}" for rs in needs.values() for r in rs]
        some = ", ".join(places[:4])
        raise _RasterOrderError(f"{len(needs)} tensors, not one, are needed in raster order: for {some}")
    ((result, readers),) = needs.items()
    if result in sources or not _is_contiguous(result):
        raise _RasterOrderError(f"{result.name} cannot be permuted back: it is not contiguous, or an input")
    (grid,) = grids
    return _Plan(grid, sources, result, axes[result], tuple(readers))


def _patch_embeddings(sites: Sequence[AttentionSite], count: int) -> list[fx.Node]:
    """3-D convolutions with T·H·W = N in their output [B, C, T, H, W], among what the sites come from."""
    pending = [node for site in sites for node in (site.q, site.k, site.v)]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending += node.all_input_nodes
    convolutions = [node for node in seen if _torch.op_name(node) in ("conv3d", "convolution")]
    return [node for node in convolutions if _holds_grid(sizes(node), count)]


def _holds_grid(shape: tuple[Size, ...] | None, count: int) -> bool:
    if shape is None or len(shape) != 5 or not all(isinstance(size, int) for size in shape[2:]):
        return False
    return math.prod(shape[2:]) == count


def _entry(embedding: fx.Node, count: int) -> tuple[fx.Node, int]:
    """The last contiguous tensor of tokens on the one path from the embedding, and its token axis.

    Everything before it has one reader, so nobody else sees its memory.
    """
    entry: tuple[fx.Node, int] | None = None
    node, axes = embedding, [2, 3, 4]
    while len(node.users) == 1:
        (reader,) = node.users
        if len(axes) == 1:
            followed = follow(reader, {node: axes[0]}, count)
            step = [followed.axis] if followed and followed.axis is not None and not followed.alike else None
        else:
            step = _grid_axes(node, reader, axes, count)
        if step is None or written_to(reader) is not None:
            break
        node, axes = reader, step
        if len(axes) == 1 and _is_contiguous(node):
            entry = node, axes[0]
    if entry is None:
        raise _RasterOrderError(f"the tokens of {embedding.name} are never a contiguous tensor of their own")
    return entry


def _grid_axes(node: fx.Node, reader: fx.Node, axes: list[int], count: int) -> list[int] | None:
    """Where the three axes of the grid go, kept in turn or merged to the token axis."""
    before, after = sizes(node) or (), sizes(reader)
    moved = moved_axes(reader, axes, len(before))
    if moved is not None:
        return moved if moved == list(range(moved[0], moved[0] + 3)) else None
    if after is None or _torch.op_name(reader) not in ("flatten", "reshape", "view"):
        return None
    axis = reshaped_axis(before, after, axes, count)
    return None if axis is None else [axis]


def _propagate(
    graph: fx.Graph, sources: dict[fx.Node, int], count: int
) -> tuple[dict[fx.Node, int], dict[fx.Node, list[fx.Node]]]:
    """Follow the tokens from ``sources``, to which every tensor is added that has to be permuted alike.

    Returns:
        the token axis of every permuted node; those needed in raster order, and by whom.
    """
    while True:
        axes: dict[fx.Node, int] = {}
        needs: dict[fx.Node, list[fx.Node]] = {}
        alike: dict[fx.Node, int] = {}
        for node in graph.nodes:
            permuted = [operand for operand in node.all_input_nodes if operand in axes]
            followed = follow(node, axes, count) if permuted else None
            if permuted and followed is None:
                for operand in permuted:
                    needs.setdefault(operand, []).append(node)
            elif followed is not None:
                alike = dict(followed.alike)
                if followed.axis is not None:
                    if sources.pop(node, followed.axis) != followed.axis:
                        raise _RasterOrderError(f"{node.name} has two token axes")
                    axes[node] = followed.axis
            if alike:
                break
            if node in sources:
                axes[node] = sources[node]
        else:
            return axes, needs
        for operand, axis in alike.items():
            source, at = _origin(operand, axis, axes, count)
            if source in sources:
                raise _RasterOrderError(f"{operand.name} meets permuted tokens in an order that is not known")
            sources[source] = at


def _origin(operand: fx.Node, axis: int, axes: dict[fx.Node, int], count: int) -> tuple[fx.Node, int]:
    """The earliest contiguous tensor that an operand's tokens come from by operations that let them move.

    All blocks then share what is permuted once.
    """
    best: tuple[fx.Node, int] | None = None
    candidates = [(operand, axis)]
    while len(candidates) == 1:
        ((node, axis),) = candidates
        if _is_contiguous(node):
            best = node, axis
        candidates = [
            (source, at)
            for source in node.all_input_nodes
            if source not in axes and source.op not in ("placeholder", "get_attr")
            for at, size in enumerate(sizes(source) or ())
            if _torch.always(size == count) and follow(node, {source: at}, count) == Followed(axis)
        ]
    if best is None:
        raise _RasterOrderError(f"{operand.name} cannot be permuted: it is not contiguous")
    return best


def _check_writes(graph: fx.Graph, axes: dict[fx.Node, int]) -> None:
    """Permuted tensors are copies: a later write to what they were copied from would be lost."""
    begun = False
    for node in graph.nodes:
        begun = begun or node in axes
        target = written_to(node)
        if begun and target is not None and target not in axes:
            raise _RasterOrderError(f"{node.name} writes to {target.name}, whose tokens it does not know")


def _insert(graph: fx.Graph, plan: _Plan, ctx: PassContext) -> tuple[tuple[fx.Node, ...], fx.Node]:
    place = {node: i for i, node in enumerate(graph.nodes)}
    first_reader = {node: min(node.users, key=place.__getitem__) for node in plan.sources}
    sources = sorted(plan.sources, key=lambda node: place[first_reader[node]])
    fake = _torch.empty_fake(_torch.fake_value(sources[0]), (math.prod(plan.grid),), torch.int64)
    with graph.inserting_before(first_reader[sources[0]]):
        order, inverse = (
            graph.create_node("call_function", unbound_state, (None, field), name=f"unbound_{field}")
            for field in ORDER_FIELDS
        )
    for index in (order, inverse):
        _torch.set_fake_value(index, fake, ctx.dialect)
    gathers = []
    for i, source in enumerate(sources):
        with graph.inserting_before(first_reader[source]):
            name = f"haste_ordered_{i}"
            gathers.append(_gather(graph, source, plan.sources[source], order, name, list(source.users), ctx))
    with graph.inserting_after(plan.result):
        restored = _gather(graph, plan.result, plan.axis, inverse, "haste_restored", plan.readers, ctx)
    return tuple(gathers), restored


def _gather(
    graph: fx.Graph,
    source: fx.Node,
    axis: int,
    index: fx.Node,
    name: str,
    readers: Iterable[fx.Node],
    ctx: PassContext,
) -> fx.Node:
    """``index_select`` of a tensor, for those of its readers that want it in the other order."""
    target = torch.ops.aten.index_select.default
    gather = graph.create_node("call_function", target, (source, axis, index), name=name)
    gather.meta.update({k: v for k, v in source.meta.items() if k in ("nn_module_stack", "stack_trace")})
    _torch.set_fake_value(gather, _torch.evaluate(gather), ctx.dialect)
    for reader in readers:
        reader.replace_input_with(source, gather)
    return gather


def _is_contiguous(node: fx.Node) -> bool:
    fake = _torch.fake_value(node)
    return isinstance(fake, Tensor) and fake.is_contiguous()


def _unavailable(order: str, reason: str) -> TokenOrderError:
    return TokenOrderError(
        found=reason,
        wanted="a whole transformer whose tokens can be permuted behind the patch embedding and back",
        where=f"option token_order={order!r}",
        fix="Compile the whole transformer, leave token_order at 'raster', or drop strict=True.",
    )
