"""Find every attention site and tell self-attention from cross-attention."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from haste_compile import _torch
from haste_compile.errors import GraphContractError, NoAttentionSitesError
from haste_compile.passes.base import AttentionSite, PassContext

_LINEAR_TARGETS = (F.linear, torch.ops.aten.linear.default, torch.ops.aten.addmm.default)


def find_attention_sites(gm: fx.GraphModule, ctx: PassContext) -> None:
    """List the ``scaled_dot_product_attention`` nodes in ``ctx.sites``; the graph stays as it is.

    Only the attention node itself is matched: what leads to it differs by model (rotary embedding, query
    normalisation, fused projections, LoRA), and the in-place writes of rotary embeddings break the data flow.

    Names do not tell self-attention from cross-attention, data flow does: in self-attention, queries and keys
    have the same length and are projected from the same tensor.

        x ── linear ── norm ── rope ── q ┐                    x ─── linear ── q ┐
        x ── linear ── norm ── rope ── k ┼ attention: self    text  linear ── k ┼ attention: cross
        x ── linear ────────────────── v ┘                    text  linear ── v ┘

    Raises:
        NoAttentionSitesError: there is none; some attention backends leave no such node. A graph that is one
            piece of a function which Dynamo had to break may well have none.
        GraphContractError: the graph records no shapes.
    """
    ctx.sites = [_read_site(node, call) for node, call in _attention_nodes(gm)]
    if not ctx.sites and not _torch.is_fragment(gm):
        raise NoAttentionSitesError(
            found="no scaled_dot_product_attention node",
            wanted="at least one attention site",
            where="traced graph",
            fix="Compile the transformer itself. diffusers attention backends such as 'flex' or 'sage' leave "
            "no such node: call transformer.set_attention_backend('native') before compiling.",
        )


def _attention_nodes(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, _torch.AttentionCall]]:
    for module in gm.modules():  # the graph itself, then the bodies of higher-order operators
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                call = _torch.attention_call(node)
                if call is not None:
                    yield node, call


def _read_site(node: fx.Node, call: _torch.AttentionCall) -> AttentionSite:
    expected = _torch.fake_value(node)
    if not isinstance(expected, Tensor):
        raise GraphContractError(
            found=f"node {node.name} without a recorded shape",
            wanted="a graph traced by torch.compile or torch.export",
            where="input graph",
            fix="Let torch.compile call the backend instead of calling it on a graph of your own.",
        )
    return AttentionSite(
        node=node,
        call=call,
        name=_torch.module_path(node),
        kind=_kind(call),
        expected=expected,
    )


def _kind(call: _torch.AttentionCall) -> Literal["self", "cross"]:
    queries, keys = (_torch.fake_value(n) for n in (call.query, call.key))
    if not _torch.always(queries.shape[-2] == keys.shape[-2]):
        return "cross"
    projected_q, leaves_q = _origins(call.query)
    projected_k, leaves_k = _origins(call.key)
    if projected_q and projected_k:
        return "self" if projected_q & projected_k else "cross"
    # Without projections: the same inputs, or three separate inputs, of which only the length is known.
    separate = call.query.op == call.key.op == "placeholder"
    return "self" if separate or leaves_q & leaves_k else "cross"


def _origins(start: fx.Node) -> tuple[set[fx.Node], set[fx.Node]]:
    """Walk up from a query or key: inputs of the first linear layers met, and leaves reached without one.

    A LoRA branch adds its own inner activation to the first set, beside the tensor it shares with the base
    layer.
    """
    projected: set[fx.Node] = set()
    leaves: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [start]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if _is_linear(node):
            projected.add(_linear_input(node))
        elif node.op in ("placeholder", "get_attr") or _torch.attention_call(node) is not None:
            leaves.add(node)
        else:
            pending += node.all_input_nodes
            if _is_allocation(node):
                pending += _written_into(node)
    return projected, leaves


def _is_linear(node: fx.Node) -> bool:
    if node.op == "call_module":
        owner = node.graph.owning_module
        return owner is not None and isinstance(owner.get_submodule(str(node.target)), nn.Linear)
    return node.op == "call_function" and node.target in _LINEAR_TARGETS


def _linear_input(node: fx.Node) -> fx.Node:
    if node.target is torch.ops.aten.addmm.default:
        return node.all_input_nodes[1]  # (bias, input, weight)
    return node.all_input_nodes[0]


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_allocation(node: fx.Node) -> bool:
    return _target_name(node).removeprefix("new_").startswith(("empty", "zeros"))


def _written_into(allocation: fx.Node) -> list[fx.Node]:
    """Values stored in a fresh tensor, through views of it: ``out[..., 0::2] = even``."""
    values: list[fx.Node] = []
    views = [allocation]
    while views:
        view = views.pop()
        for user in view.users:
            name = _target_name(user)
            if user.target is operator.setitem or name == "copy_":
                if user.args[0] is view:
                    values += [arg for arg in user.all_input_nodes if arg is not view]
            elif name in ("getitem", "slice", "select", "view", "unflatten", "unbind"):
                views.append(user)
    return values
