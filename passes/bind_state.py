"""Supply the state tensors that the rewritten sites name."""

from __future__ import annotations

from torch import fx

from haste_compile import _torch
from haste_compile.passes.base import PassContext
from haste_compile.passes.rewrite_self_attention import unbound_state
from haste_compile.token_order import ORDER_FIELDS


def bind_state(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Replace every named state tensor by the node that ``ctx.binding`` makes; then type the new nodes.

    A compiled graph is shared by all instances of a module, so in a live graph thresholds and masks are
    inputs, found at each call for the instance that calls. An exported artifact owns its state: there they
    are buffers.

    Before:
        def forward(self, x):
            mask = unbound_state(0, "mask")
            refresh = haste.refresh_mask_(q, k, ..., mask, ...)
    After (Dynamo):                                          After (export):
        def forward(self, x, haste_ctl, haste_0_mask, ...):      def forward(self, x):
            refresh = haste.refresh_mask_(q, k, ...,                 haste_0_mask = self.haste_0_mask
                haste_0_mask, ...)                                   refresh = haste.refresh_mask_(...)
    """
    unbound = {node.args: node for node in gm.graph.find_nodes(op="call_function", target=unbound_state)}
    wanted = [(site, site.index, field) for site in ctx.rewritten for field in ctx.layouts(site)]
    if ctx.order.gathers:
        wanted += [(ctx.rewritten[0], None, field) for field in ORDER_FIELDS]
    for site, index, field in wanted:
        name = unbound[index, field]
        name.replace_all_uses_with(ctx.binding.bind(gm, ctx, site, field))
        gm.graph.erase_node(name)
    for site in ctx.rewritten:
        for node in site.inserted:
            _torch.set_fake_value(node, _torch.evaluate(node), ctx.dialect)
