"""Each rule of the specification accepts a good graph and catches one that a faulty pass could make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch.nn.functional as F
from graph_capture import SMALL, capture, latents, rewrite, tokens, toy, toy_video
from torch import fx

from haste_compile.errors import GraphContractError
from haste_compile.passes import PassContext, verify_graph
from haste_compile.passes.rewrite_self_attention import unbound_state
from haste_compile.passes.verify_graph import RULES

MASK_OF_REFRESH, MASK_OF_ATTENTION, CTL_OF_REFRESH = 5, 3, 4


def good() -> tuple[fx.GraphModule, PassContext]:
    gm = capture(toy({}, {"is_causal": True}, {}), tokens())
    return gm, rewrite(gm)


def undecided(gm: fx.GraphModule, ctx: PassContext) -> None:
    ctx.sites[1].status = "found"


def skipped_without_reason(gm: fx.GraphModule, ctx: PassContext) -> None:
    ctx.sites[1].reason = ""


def dense_left_over(gm: fx.GraphModule, ctx: PassContext) -> None:
    site = ctx.rewritten[0]
    with gm.graph.inserting_before(site.inserted[0]):
        gm.graph.call_function(F.scaled_dot_product_attention, (site.q, site.k, site.v))


def skipped_site_lost(gm: fx.GraphModule, ctx: PassContext) -> None:
    node = ctx.sites[1].node
    node.replace_all_uses_with(ctx.sites[1].q)
    gm.graph.erase_node(node)


def refresh_lost(gm: fx.GraphModule, ctx: PassContext) -> None:
    gm.graph.erase_node(ctx.rewritten[0].inserted[0])


def refresh_after_attention(gm: fx.GraphModule, ctx: PassContext) -> None:
    refresh, attention = ctx.rewritten[1].inserted[:2]
    attention.append(refresh)


def refresh_for_other_queries(gm: fx.GraphModule, ctx: PassContext) -> None:
    refresh = ctx.rewritten[1].inserted[0]
    refresh.update_arg(0, ctx.rewritten[0].q)


def attention_with_the_other_mask(gm: fx.GraphModule, ctx: PassContext) -> None:
    first, second = ctx.rewritten
    second.inserted[1].update_arg(MASK_OF_ATTENTION, first.inserted[0].args[MASK_OF_REFRESH])


def two_clocks(gm: fx.GraphModule, ctx: PassContext) -> None:
    refresh, attention = ctx.rewritten[1].inserted[:2]
    other = ctx.rewritten[1].inserted[0].args[2]
    refresh.update_arg(CTL_OF_REFRESH, other)
    attention.update_arg(4, other)


def unbound(gm: fx.GraphModule, ctx: PassContext) -> None:
    with gm.graph.inserting_before(ctx.rewritten[0].inserted[0]):
        gm.graph.call_function(unbound_state, (0, "mask"))


def computed_threshold(gm: fx.GraphModule, ctx: PassContext) -> None:
    refresh = ctx.rewritten[0].inserted[0]
    with gm.graph.inserting_before(refresh):
        refresh.update_arg(2, gm.graph.call_method("clone", (refresh.args[2],)))


def shared_mask(gm: fx.GraphModule, ctx: PassContext) -> None:
    first, second = ctx.rewritten
    for node, position in zip(second.inserted, (MASK_OF_REFRESH, MASK_OF_ATTENTION), strict=False):
        node.update_arg(position, first.inserted[0].args[MASK_OF_REFRESH])


def mask_read_elsewhere(gm: fx.GraphModule, ctx: PassContext) -> None:
    refresh = ctx.rewritten[0].inserted[0]
    with gm.graph.inserting_after(ctx.rewritten[0].out):
        gm.graph.call_method("clone", (refresh.args[MASK_OF_REFRESH],))


def input_moved(gm: fx.GraphModule, ctx: PassContext) -> None:
    placeholders = gm.graph.find_nodes(op="placeholder")
    placeholders[0].prepend(placeholders[-1])


def layout_changed(gm: fx.GraphModule, ctx: PassContext) -> None:
    site = ctx.rewritten[0]
    with gm.graph.inserting_before(site.inserted[0]):
        copied = gm.graph.call_method("contiguous", (site.q,))
        copied.meta["example_value"] = site.query.contiguous()
    for node in site.inserted[:2]:
        node.update_arg(0, copied)


def dtype_changed(gm: fx.GraphModule, ctx: PassContext) -> None:
    site = ctx.rewritten[0]
    site.expected = site.expected.half()


CASES: list[tuple[Callable[[fx.GraphModule, PassContext], None], str]] = [
    (undecided, "sites_are_decided: blocks.1 is found"),
    (skipped_without_reason, "sites_are_decided: blocks.1 is skipped without a reason"),
    (dense_left_over, "dense_attention_matches: dense attention scaled_dot_product_attention is left"),
    (skipped_site_lost, "dense_attention_matches: blocks.1 is skipped but its attention is gone"),
    (refresh_lost, "ops_are_paired: ops are [haste_0_attention, haste_1_refresh, haste_1_attention]"),
    (refresh_after_attention, "haste_0_attention, haste_1_attention, haste_1_refresh] instead of"),
    (refresh_for_other_queries, "pairs_agree: blocks.2 refreshes for"),
    (attention_with_the_other_mask, "pairs_agree: blocks.2 has two tensors for mask"),
    (two_clocks, "pairs_agree: 2 different ctl tensors"),
    (unbound, "state_is_bound: unbound_state has no tensor"),
    (computed_threshold, "state_is_bound: top_p of blocks.0 is computed by clone"),
    (shared_mask, "state_is_mutated_once: haste_0_mask is mutated 2 times"),
    (mask_read_elsewhere, "state_is_mutated_once: mask of blocks.0 is also used by [clone]"),
    (input_moved, "inputs_are_in_order: the last inputs are not [haste_ctl,"),
    (layout_changed, "blocks.0 gives sizes (1, 2, 200, 64) strides (25600, 12800, 64, 1), not sizes"),
    (dtype_changed, "outputs_keep_their_layout: blocks.0 gives torch.float32 on cpu, not torch.float16"),
]  # fmt: skip


def ordered() -> tuple[fx.GraphModule, PassContext]:
    gm = capture(toy_video(), latents())
    return gm, rewrite(gm, dataclasses.replace(SMALL, token_order="tile3d", strict=True))


def raster_reader(gm: fx.GraphModule, ctx: PassContext) -> None:
    gather = ctx.order.gathers[1]
    with gm.graph.inserting_after(gather):
        gm.graph.call_method("clone", (gather.args[0],))


def order_not_undone(gm: fx.GraphModule, ctx: PassContext) -> None:
    restored = ctx.order.restored
    restored.replace_all_uses_with(restored.args[0])


def site_in_raster_order(gm: fx.GraphModule, ctx: PassContext) -> None:
    attention = ctx.rewritten[1].inserted[1]
    attention.update_arg(2, next(iter(gm.graph.find_nodes(op="placeholder"))))


def inverse_for_order(gm: fx.GraphModule, ctx: PassContext) -> None:
    ctx.order.gathers[0].update_arg(2, ctx.order.restored.args[2])


def computed_order(gm: fx.GraphModule, ctx: PassContext) -> None:
    restored = ctx.order.restored
    with gm.graph.inserting_before(restored):
        restored.update_arg(2, gm.graph.call_method("clone", (restored.args[2],)))


def restored_from_elsewhere(gm: fx.GraphModule, ctx: PassContext) -> None:
    ctx.order.restored.update_arg(0, next(iter(gm.graph.find_nodes(op="placeholder"))))


ORDER_CASES: list[tuple[Callable[[fx.GraphModule, PassContext], None], str]] = [
    (raster_reader, " is also read by [clone]"),
    (order_not_undone, "order_is_undone: permuted tokens reach the output"),
    (site_in_raster_order, "order_is_undone: second.blocks.0 reads [l_self_"),
    (inverse_for_order, "order_is_undone: more than one order"),
    (computed_order, "order_is_undone: haste_restored permutes by clone"),
    (restored_from_elsewhere, "order_is_undone: haste_restored restores an order that"),
]


def test_a_good_graph_in_another_order_passes():
    gm, ctx = ordered()
    verify_graph(gm, ctx)
    assert len(ctx.order.gathers) == 2  # the tokens and their positions


@pytest.mark.parametrize(("corrupt", "message"), ORDER_CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_rule_on_orders_catches(corrupt: Callable[[fx.GraphModule, PassContext], None], message: str):
    gm, ctx = ordered()
    corrupt(gm, ctx)
    with pytest.raises(GraphContractError) as caught:
        verify_graph(gm, ctx)
    assert message in caught.value.found


def test_a_good_graph_passes():
    verify_graph(*good())


@pytest.mark.parametrize(("corrupt", "message"), CASES, ids=lambda case: getattr(case, "__name__", ""))
def test_rule_catches(corrupt: Callable[[fx.GraphModule, PassContext], None], message: str):
    gm, ctx = good()
    corrupt(gm, ctx)
    with pytest.raises(GraphContractError) as caught:
        verify_graph(gm, ctx)
    assert message in caught.value.found


def test_every_rule_has_a_case_and_a_line_in_the_specification():
    covered = {message.split(":")[0] for _, message in (*CASES, *ORDER_CASES) if ":" in message}
    assert covered == {rule.__name__ for rule in RULES}
    specification = verify_graph.__globals__["__doc__"]
    assert all(f"| {rule.__name__} " in specification for rule in RULES)
