"""Erase the attention nodes that the rewrite left without users."""

from __future__ import annotations

from torch import fx

from haste_compile.passes.base import PassContext


def remove_dead_nodes(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Erase the dense attention node of every rewritten site.

    Left in place, its cost would depend on the compiler behind this one noticing that nobody reads it.
    ``Graph.eliminate_dead_code`` will not do: Dynamo graphs hold in-place methods (``x.add_(y)``) whose
    result nobody reads, and it would take them for dead.

    Before:
        out = scaled_dot_product_attention(q, k, v)
        y = haste_0_out.transpose(1, 2)
    After:
        y = haste_0_out.transpose(1, 2)
    """
    for site in ctx.rewritten:
        gm.graph.erase_node(site.node)
