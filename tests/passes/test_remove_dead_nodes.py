"""Replaced attention goes, and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graph_capture import ToyModel, capture, rewrite, tokens
from torch import Tensor, nn


class WithInPlaceMethod(nn.Module):
    """Writes through a view whose own value nobody reads: dead to a cleaner that knows no mutation."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 64)).transpose(1, 2) * 1.0
        q[:, :, 0].add_(1.0)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


def test_dense_attention_is_gone_and_in_place_methods_stay():
    gm = capture(ToyModel(WithInPlaceMethod()), tokens())
    before = list(gm.graph.nodes)
    ctx = rewrite(gm)
    after = set(gm.graph.nodes)
    assert [n for n in before if n not in after] == [site.node for site in ctx.rewritten]
    assert len(ctx.rewritten) == 1
    (written,) = [n for n in after if n.target == "add_"]
    assert not written.users
    assert F.scaled_dot_product_attention not in {n.target for n in after}
    assert torch.is_tensor(ctx.sites[0].expected)
