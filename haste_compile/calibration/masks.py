"""A site's mask kept from one call and used in another, for any predictor: how staleness is measured."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from haste_compile.config import HasteConfig
from haste_compile.kernels.layout import Ctl
from haste_compile.predictors import get_predictor
from haste_compile.predictors.base import site_layouts

#: The fields that say nothing of the mask.
_OF_THE_CALL = ("ctl", "top_p", "delta", "counters", "anchors")


@torch.no_grad()
def build(q: Tensor, k: Tensor, top_p: Tensor, config: HasteConfig) -> dict[str, Tensor]:
    """The state that the predictor builds for these queries and keys, without what only reuse reads.

    Args:
        q, k: [B, H, N, D]; ``top_p``: fp32 [H].
    """
    predictor = get_predictor(config.predictor)
    state = _fresh(q, config)
    state["top_p"][: top_p.numel()] = top_p
    refresh = predictor.refresh(config, q.shape[3] ** -0.5)
    refresh.op(q, k, *(state[field] for field in refresh.fields), **refresh.options)
    return {field: tensor for field, tensor in state.items() if field not in _OF_THE_CALL}


@torch.no_grad()
def attend(mask: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, config: HasteConfig) -> Tensor:
    """Attention of these queries, keys and values under a mask that was built for others; out like q."""
    attention = get_predictor(config.predictor).attention(config, q.shape[3] ** -0.5)
    state = {**_fresh(q, config), **{field: tensor.to(q.device) for field, tensor in mask.items()}}
    return attention.op(q, k, v, *(state[field] for field in attention.fields), **attention.options)[0]


def token_means(x: Tensor) -> Tensor:
    """Mean over the tokens, fp32 [B, H, D], on the host: what temporal mask reuse measures drift with."""
    return (x.sum(dim=2, dtype=torch.float32) / x.shape[2]).cpu()


def _fresh(q: Tensor, config: HasteConfig) -> dict[str, Tensor]:
    alone = dataclasses.replace(config, slots=1)
    layouts = site_layouts(get_predictor(config.predictor), tuple(q.shape), alone)
    state = {
        field: torch.zeros(tuple(map(int, shape)), dtype=dtype, device=q.device)
        for field, (shape, dtype) in layouts.items()
    }
    state["ctl"][Ctl.EPOCH] = 1
    return state
