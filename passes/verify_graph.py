"""Check the rewritten graph against its written specification.

| rule                      | what holds                                                                 |
|---------------------------|----------------------------------------------------------------------------|
| sites_are_decided         | every site is rewritten, or skipped with a reason                          |
| dense_attention_matches   | dense attention is left at every skipped site, and nowhere else            |
| ops_are_paired            | each rewritten site has one refresh and then one attention, in graph order |
| pairs_agree               | both read the same q, k, mask and ctl; the graph has a single ctl          |
| state_is_bound            | no ``unbound_state`` is left; state operands are inputs or buffers         |
| state_is_mutated_once     | no two refreshes write one tensor; only its site's ops touch it            |
| inputs_are_in_order       | a live graph's state inputs come last, in the order the binding recorded   |
| order_is_undone           | permuted tokens have no reader in raster order, reach every rewritten site |
|                           | and leave by the one node that restores their order                        |
| outputs_keep_their_layout | outputs have the shape, strides, dtype and device that their users expect  |

A rule that fails is a defect in a pass, never in the user's model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

from torch import Tensor, fx

from haste_compile import _torch
from haste_compile.errors import GraphContractError
from haste_compile.passes.base import AttentionSite, PassContext, PlaceholderBinding, same_layout
from haste_compile.passes.rewrite_self_attention import unbound_state
from haste_compile.predictors.base import OpCall


def verify_graph(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Apply the rules in order, each relying on those above it; the graph stays as it is.

    A wrong rewrite would not crash: it would give a plausible video made with another layer's mask.

    Raises:
        GraphContractError: names the first rule that is broken, and everything that breaks it.
    """
    gm.graph.lint()
    for rule in RULES:
        broken = list(rule(gm, ctx))
        if broken:
            raise GraphContractError(
                found=f"{rule.__name__}: " + "; ".join(broken),
                wanted="a graph that keeps the specification in passes/verify_graph.py",
                where="rewritten graph",
                fix="This is a defect in haste_compile: report it, with what HASTE_DUMP=folder writes.",
            )


def sites_are_decided(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for site in ctx.sites:
        if site.status not in ("rewritten", "skipped"):
            yield f"{site.label} is {site.status}"
        elif site.status == "skipped" and not site.reason:
            yield f"{site.label} is skipped without a reason"


def dense_attention_matches(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    skipped = {site.node: site for site in ctx.sites if site.status == "skipped"}
    left = {
        node
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if _torch.attention_call(node) is not None
    }
    for node in left - set(skipped):
        yield f"dense attention {node.name} is left"
    for node in set(skipped) - left:
        yield f"{skipped[node].label} is skipped but its attention is gone"


def ops_are_paired(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    ops = {call.op for site in ctx.rewritten for call in _calls(site, ctx)}
    found = [node for node in gm.graph.nodes if node.target in ops]
    wanted = [node for site in ctx.rewritten for node in site.inserted[:2]]
    if found != wanted:
        yield f"ops are {_names(found)} instead of {_names(wanted)}"


def pairs_agree(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for site in ctx.rewritten:
        refresh, attention = site.inserted[:2]
        if refresh.args[:2] != attention.args[:2]:
            yield f"{site.label} refreshes for {refresh.args[:2]} and attends with {attention.args[:2]}"
        operands = _operands(site, ctx)
        for field, node in zip(_calls(site, ctx)[1].fields, attention.args[3:], strict=True):
            if operands[field] is not node:
                yield f"{site.label} has two tensors for {field}"
    clocks = {_operands(site, ctx)["ctl"] for site in ctx.rewritten}
    if len(clocks) > 1:
        yield f"{len(clocks)} different ctl tensors"


def state_is_bound(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in gm.graph.find_nodes(op="call_function", target=unbound_state):
        yield f"{node.name} has no tensor"
    for site in ctx.rewritten:
        for field, node in _operands(site, ctx).items():
            if node.op not in ("placeholder", "get_attr"):
                yield f"{field} of {site.label} is computed by {node.name}"


def state_is_mutated_once(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    operands = Counter(node for site in ctx.rewritten for node in _mutated(site, ctx).values())
    yield from (f"{node.name} is mutated {count} times" for node, count in operands.items() if count > 1)
    for site in ctx.rewritten:
        for field, node in _mutated(site, ctx).items():
            strangers = set(node.users) - set(site.inserted[:2])
            if strangers:
                yield f"{field} of {site.label} is also used by {_names(strangers)}"


def inputs_are_in_order(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if isinstance(ctx.binding, PlaceholderBinding):
        bound = ctx.binding.nodes
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        if placeholders[len(placeholders) - len(bound) :] != bound:
            yield f"the last inputs are not {_names(bound)}"


def order_is_undone(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    gathers, restored = ctx.order.gathers, ctx.order.restored
    reached, pending = set(gathers), list(gathers)
    while pending:
        for user in pending.pop().users:
            if user is not restored and user not in reached:
                reached.add(user)
                pending.append(user)
    for gather in gathers:
        source = cast(fx.Node, gather.args[0])
        if strangers := set(source.users) - {gather}:
            yield f"{source.name} is also read by {_names(strangers)}"
    if restored is not None and restored.args[0] not in reached:
        yield f"{restored.name} restores an order that {restored.args[0]} does not have"
    if reached & set(gm.graph.find_nodes(op="output")):
        yield "permuted tokens reach the output"
    for site in ctx.rewritten if gathers else ():
        operands = cast(tuple[fx.Node, ...], site.inserted[1].args[:3])
        if raster := set(operands) - reached:
            yield f"{site.label} reads {_names(raster)} in raster order"
    if len({gather.args[2] for gather in gathers}) > 1 or restored in gathers:
        yield "more than one order"
    for node in (*gathers, *([restored] if restored else [])):
        index = cast(fx.Node, node.args[2])
        if index.op not in ("placeholder", "get_attr") or (index is gathers[0].args[2]) == (node is restored):
            yield f"{node.name} permutes by {index.name}"


def outputs_keep_their_layout(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for site in ctx.rewritten:
        known: dict[fx.Node, Any] = {}
        for node in site.inserted[1:]:
            known[node] = _torch.evaluate(node, known)
        out, expected = known[site.out], site.expected
        if out.dtype != expected.dtype or out.device != expected.device:
            yield f"{site.label} gives {out.dtype} on {out.device}, not {expected.dtype} on {expected.device}"
        elif not same_layout(out, expected):
            yield f"{site.label} gives {_layout(out)}, not {_layout(expected)}"


def _calls(site: AttentionSite, ctx: PassContext) -> tuple[OpCall, OpCall]:
    """The refresh and the attention that the predictor asked for."""
    return ctx.predictor.refresh(ctx.config, site.scale), ctx.predictor.attention(ctx.config, site.scale)


def _operands(site: AttentionSite, ctx: PassContext) -> dict[str, fx.Node]:
    """State operands of the refresh: they follow q and k."""
    fields = _calls(site, ctx)[0].fields
    return dict(zip(fields, cast(tuple[fx.Node, ...], site.inserted[0].args[2:]), strict=True))


def _mutated(site: AttentionSite, ctx: PassContext) -> dict[str, fx.Node]:
    """The operands that the refresh writes to, by its schema."""
    call = _calls(site, ctx)[0]
    written = [a.alias_info is not None and a.alias_info.is_write for a in call.op._schema.arguments[2:]]
    operands = _operands(site, ctx)
    return {field: operands[field] for field, write in zip(call.fields, written, strict=False) if write}


def _names(nodes: Iterable[fx.Node]) -> str:
    return "[" + ", ".join(node.name for node in nodes) + "]"


def _layout(x: Tensor) -> str:
    return f"sizes {tuple(x.shape)} strides {x.stride()}"


RULES: tuple[Callable[[fx.GraphModule, PassContext], Iterator[str]], ...] = (
    sites_are_decided,
    dense_attention_matches,
    ops_are_paired,
    pairs_agree,
    state_is_bound,
    state_is_mutated_once,
    inputs_are_in_order,
    order_is_undone,
    outputs_keep_their_layout,
)
