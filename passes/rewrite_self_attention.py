"""Replace dense self-attention by mask refresh and block-sparse attention."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from haste_compile.errors import GraphContractError
from haste_compile.passes.base import AttentionSite, PassContext, same_layout


def rewrite_self_attention(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Insert the predictor's two ops at every eligible site; users of the old node get their output.

    Two ops and not one: attention stays pure, so it can be traced with gradients on, and the one mutation is
    where a compiler can see it. State is named here and supplied by the next pass. With XAttention:

    Before:
        out = scaled_dot_product_attention(q, k, v)
        y = out.transpose(1, 2)
    After:
        mask = unbound_state(0, "mask"); ...
        refresh = haste.refresh_mask_(q, k, top_p, delta, ctl, mask, anchors, counters, block=128, ...)
        attention = haste.block_sparse_attention(q, k, v, mask, ctl, block=128, scale=0.088)
        sparse = attention[0]
        out = scaled_dot_product_attention(q, k, v)          (dead)
        y = sparse.transpose(1, 2)

    The op's output has the layout of q. Where dense attention would have had another, a copy restores it,
    since the users were traced with those strides.
    """
    for site in ctx.sites:
        if site.status == "eligible":
            with gm.graph.inserting_before(site.node):
                site.inserted = _insert(gm.graph, site, ctx)
            for node in site.inserted:
                for key in ("nn_module_stack", "stack_trace"):
                    if key in site.node.meta:
                        node.meta[key] = site.node.meta[key]
            site.node.replace_all_uses_with(site.inserted[-1])
            site.status = "rewritten"


def unbound_state(site: int | None, field: str) -> Tensor:
    """Stands for a state tensor until ``bind_state`` supplies it; never runs.

    Raises:
        GraphContractError: it did run.
    """
    raise GraphContractError(
        found=f"field {field!r} of site {site} without a tensor",
        wanted="a state input",
        where="rewritten graph",
        fix="Run bind_state after rewrite_self_attention.",
    )


def _insert(graph: fx.Graph, site: AttentionSite, ctx: PassContext) -> tuple[fx.Node, ...]:
    i = site.index
    refreshing = ctx.predictor.refresh(ctx.config, site.scale)
    attending = ctx.predictor.attention(ctx.config, site.scale)
    state = {
        field: graph.create_node("call_function", unbound_state, (i, field), name=f"unbound_{i}_{field}")
        for field in ctx.layouts(site)
    }
    refresh = graph.create_node(
        "call_function",
        refreshing.op,
        (site.q, site.k, *(state[field] for field in refreshing.fields)),
        refreshing.options,
        name=f"haste_{i}_refresh",
    )
    attention = graph.create_node(
        "call_function",
        attending.op,
        (site.q, site.k, site.v, *(state[field] for field in attending.fields)),
        attending.options,
        name=f"haste_{i}_attention",
    )
    out = graph.create_node("call_function", operator.getitem, (attention, 0), name=f"haste_{i}_out")
    return refresh, attention, out, *_restore_layout(graph, out, site)


def _restore_layout(graph: fx.Graph, out: fx.Node, site: AttentionSite) -> list[fx.Node]:
    """Nodes that copy ``out``, laid out like the queries, into the layout of the old output."""
    wanted = site.expected
    if same_layout(torch.empty_like(site.query), wanted):
        return []
    order = wanted.dim_order()
    inverse = [order.index(dim) for dim in range(len(order))]
    aten = torch.ops.aten
    ordered = graph.call_function(aten.permute.default, (out, order))
    copied = graph.call_function(aten.clone.default, (ordered,), {"memory_format": torch.contiguous_format})
    return [ordered, copied, graph.call_function(aten.permute.default, (copied, inverse))]
