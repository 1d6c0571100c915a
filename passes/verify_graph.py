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
from haste_compile.passes.base import (
    ATTENTION,
    REFRESH,
    AttentionSite,
    PassContext,
    PlaceholderBinding,
    same_layout,
)
from haste_compile.passes.rewrite_self_attention import unbound_state

# Positions of the state operands in the two ops' arguments.
_REFRESH_STATE = {"top_p": 2, "delta": 3, "ctl": 4, "mask": 5, "anchors": 6, "counters": 7}
_ATTENTION_STATE = {"mask": 3, "ctl": 4}
_MUTATED = ("mask", "anchors", "counters")


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
    found = [node for node in gm.graph.nodes if node.target in (REFRESH, ATTENTION)]
    wanted = [node for site in ctx.rewritten for node in site.inserted[:2]]
    if found != wanted:
        yield f"ops are {_names(found)} instead of {_names(wanted)}"


def pairs_agree(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for site in ctx.rewritten:
        refresh, attention = site.inserted[:2]
        if refresh.args[:2] != attention.args[:2]:
            yield f"{site.label} refreshes for {refresh.args[:2]} and attends with {attention.args[:2]}"
        for field, position in _ATTENTION_STATE.items():
            if _operand(site, field) is not attention.args[position]:
                yield f"{site.label} has two tensors for {field}"
    clocks = {_operand(site, "ctl") for site in ctx.rewritten}
    if len(clocks) > 1:
        yield f"{len(clocks)} different ctl tensors"


def state_is_bound(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    for node in gm.graph.find_nodes(op="call_function", target=unbound_state):
        yield f"{node.name} has no tensor"
    for site in ctx.rewritten:
        for field in _REFRESH_STATE:
            node = _operand(site, field)
            if node.op not in ("placeholder", "get_attr"):
                yield f"{field} of {site.label} is computed by {node.name}"


def state_is_mutated_once(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    operands = Counter(_operand(site, field) for site in ctx.rewritten for field in _MUTATED)
    yield from (f"{node.name} is mutated {count} times" for node, count in operands.items() if count > 1)
    for site in ctx.rewritten:
        for field in _MUTATED:
            strangers = set(_operand(site, field).users) - set(site.inserted[:2])
            if strangers:
                yield f"{field} of {site.label} is also used by {_names(strangers)}"


def inputs_are_in_order(gm: fx.GraphModule, ctx: PassContext) -> Iterator[str]:
    if isinstance(ctx.binding, PlaceholderBinding):
        bound = ctx.binding.nodes
        placeholders = list(gm.graph.find_nodes(op="placeholder"))
        if placeholders[len(placeholders) - len(bound) :] != bound:
            yield f"the last inputs are not {_names(bound)}"


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


def _operand(site: AttentionSite, field: str) -> fx.Node:
    return cast(fx.Node, site.inserted[0].args[_REFRESH_STATE[field]])


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
    outputs_keep_their_layout,
)
