"""Decide for every attention site whether it is rewritten, and if not, say why."""

from __future__ import annotations

import torch
from torch import fx

from haste_compile._torch import always, fake_value, guarded
from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError, UnsupportedSiteError
from haste_compile.passes.base import AttentionSite, PassContext

HEAD_DIMS = (64, 128)
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.bfloat16, torch.float16),
}


def check_eligibility(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Mark each site "eligible" or "skipped" with a reason; the graph stays as it is.

    A site that the kernels would compute wrongly, or not at all, has to stay dense, and a user who sees no
    speed-up has to find out why without a debugger.

        site                                 status     reason
        blocks.0.attn1  [1, 12, 32760, 128]  eligible
        blocks.0.attn2  [1, 12, 32760, 128]  skipped    cross-attention (32760 queries, 512 keys)

    Raises:
        UnsupportedSiteError: with ``strict=True``, for a self-attention site that is skipped for any
            reason but ``dense_layers``.
        OptionError: ``dense_layers`` names more self-attention sites than there are.
    """
    config = ctx.config
    self_sites = [site for site in ctx.sites if site.kind == "self"]
    _check_dense_layers(config, len(self_sites))
    kept_dense = [site for i, site in enumerate(self_sites) if i in config.dense_layers]
    eligible = 0
    for site in ctx.sites:
        if site in kept_dense:
            site.status, site.reason = "skipped", "kept dense by option dense_layers"
        elif reason := _why_not(site, gm, ctx):
            if config.strict and site.kind == "self":
                raise _unsupported(site, reason)
            site.status, site.reason = "skipped", reason
        else:
            site.status, site.index = "eligible", eligible
            eligible += 1


def _why_not(site: AttentionSite, gm: fx.GraphModule, ctx: PassContext) -> str | None:
    """The first reason against rewriting a site, or None."""
    call, query = site.call, site.query
    key, value = (fake_value(node) for node in (site.k, site.v))

    if site.kind == "cross":
        return f"cross-attention ({query.shape[-2]} queries, {key.shape[-2]} keys)"
    if site.node.graph is not gm.graph:
        return "inside a nested graph (activation checkpointing or another higher-order operator)"
    if site.name is None:
        return "no module path: the graph does not say which module owns it"
    if call.attn_mask is not None:
        return "an attention mask is given"
    if call.is_causal is not False:
        return "causal attention"
    if isinstance(call.dropout_p, fx.Node) or call.dropout_p > 0:
        return f"attention dropout {call.dropout_p}"
    if isinstance(call.scale, fx.Node):
        return "the softmax scale is computed in the graph"
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"queries {_sizes(query)} instead of [batch, heads, tokens, head dim]"
    if not always(query.shape[1] == key.shape[1]):
        return f"grouped-query attention ({query.shape[1]} query heads, {key.shape[1]} key heads)"
    if query.shape[-1] not in HEAD_DIMS:
        return f"head dim {query.shape[-1]} is not one of {', '.join(map(str, HEAD_DIMS))}"
    if not all(always(a == b) for x in (key, value) for a, b in zip(query.shape, x.shape, strict=True)):
        return f"queries {_sizes(query)}, keys {_sizes(key)} and values {_sizes(value)} differ in shape"
    if query.device.type not in DTYPES:
        return f"device {query.device.type} has no kernels"
    if query.dtype not in DTYPES[query.device.type] or not query.dtype == key.dtype == value.dtype:
        return f"dtype {'/'.join(sorted({_dtype(x) for x in (query, key, value)}))} on {query.device.type}"
    if site.expected.dtype != query.dtype:
        return f"autocast turns {_dtype(query)} queries into {_dtype(site.expected)} outputs"
    if any(x.stride(-1) != 1 for x in (query, key, value)):
        return "the head dimension is not contiguous in memory"
    return _why_not_tokens(query.shape[2], ctx)


def _why_not_tokens(tokens: int | torch.SymInt, ctx: PassContext) -> str | None:
    if ctx.dialect == "export" and not isinstance(tokens, int):
        return f"symbolic token count {tokens}: exported state has a fixed size, export with static shapes"
    # For a symbolic count this guards the graph: a smaller video compiles anew and stays dense.
    if not guarded(tokens >= ctx.config.min_tokens):
        return f"{tokens} tokens, fewer than min_tokens={ctx.config.min_tokens}"
    return ctx.predictor.why_not(tokens, ctx.config)


def _check_dense_layers(config: HasteConfig, sites: int) -> None:
    unknown = [index for index in config.dense_layers if index >= sites]
    if sites and unknown:
        raise OptionError(
            found=", ".join(map(str, unknown)),
            wanted=f"indices below {sites}, the number of self-attention sites in the graph",
            where="option dense_layers",
            fix="Number the self-attention sites from 0 in the order explain() lists them.",
        )


def _unsupported(site: AttentionSite, reason: str) -> UnsupportedSiteError:
    return UnsupportedSiteError(
        found=reason,
        wanted="self-attention that the kernels can run",
        where=f"attention site {site.label}",
        fix="Change the model or the options so that it fits, keep the site dense with dense_layers, "
        "or drop strict=True.",
    )


def _sizes(x: torch.Tensor) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def _dtype(x: torch.Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")
