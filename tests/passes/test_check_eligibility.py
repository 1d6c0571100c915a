"""Every reason to leave a site dense, and what strictness makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graph_capture import SMALL, Rewriting, ToyAttention, ToyModel, capture, export, rewrite, tokens, toy
from torch import Tensor, nn
from torch.export import Dim

from haste_compile.config import HasteConfig
from haste_compile.errors import OptionError, UnsupportedSiteError
from haste_compile.passes import PassContext, PlaceholderBinding, check_eligibility, find_attention_sites


def decide(module: nn.Module, *args: Any, config: HasteConfig = SMALL) -> list[tuple[str, str]]:
    gm = capture(module, *args)
    ctx = PassContext(config, "dynamo", PlaceholderBinding())
    find_attention_sites(gm, ctx)
    check_eligibility(gm, ctx)
    return [(site.status, site.reason) for site in ctx.sites]


class Inner(nn.Module):
    """Attention over heads made by ``make_heads(x)``, in a block of its own."""

    def __init__(self, make_heads: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], **options: Any) -> None:
        super().__init__()
        self.make_heads, self.options = make_heads, options

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*self.make_heads(x), **self.options).sum() * x


def heads(x: Tensor, dim: int = 64) -> Tensor:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def test_plain_self_attention_is_eligible():
    assert decide(toy({}, {"heads": 1, "dim": 128}), tokens()) == [("eligible", "")] * 2


mask = torch.ones(200, 200, dtype=torch.bool)

REASONS = {
    "cross": (toy({"context": True}), (tokens(), tokens(30)), "cross-attention (200 queries, 30 keys)"),
    "mask": (toy({"attn_mask": mask}), (tokens(),), "an attention mask is given"),
    "causal": (toy({"is_causal": True}), (tokens(),), "causal attention"),
    "dropout": (toy({"dropout_p": 0.25}), (tokens(),), "attention dropout 0.25"),
    "gqa": (
        toy({"heads": 4, "kv_heads": 2, "enable_gqa": True}),
        (tokens(features=256),),
        "grouped-query attention (4 query heads, 2 key heads)",
    ),
    "head dim": (toy({"heads": 4, "dim": 32}), (tokens(),), "head dim 32 is not one of 64, 128"),
    "dtype": (toy({}).double(), (tokens().double(),), "dtype float64 on cpu"),
    "rank": (
        ToyModel(Inner(lambda x: (x, x, x))),
        (tokens(features=64),),
        "queries [1, 200, 64] instead of [batch, heads, tokens, head dim]",
    ),
    "value dim": (
        ToyModel(Inner(lambda x: (heads(x), heads(x), heads(x, 32)[:, :2]))),
        (tokens(),),
        "queries [1, 2, 200, 64], keys [1, 2, 200, 64] and values [1, 2, 200, 32] differ in shape",
    ),
    "strides": (
        ToyModel(Inner(lambda x: (heads(x).mT.contiguous().mT,) * 3)),
        (tokens(),),
        "the head dimension is not contiguous in memory",
    ),
    "device": (toy({}).to("meta"), (tokens().to("meta"),), "device meta has no kernels"),
    "no module path": (
        ToyAttention(),
        (tokens(),),
        "no module path: the graph does not say which module owns it",
    ),
}


@pytest.mark.parametrize("name", REASONS)
def test_reason(name: str):
    module, args, reason = REASONS[name]
    assert decide(module, *args) == [("skipped", reason)]


def test_too_few_tokens():
    config = dataclasses.replace(SMALL, min_tokens=201)
    assert decide(toy({}), tokens(200), config=config) == [
        ("skipped", "200 tokens, fewer than min_tokens=201")
    ]
    assert decide(toy({}), tokens(201), config=config) == [("eligible", "")]


def test_a_single_block_has_nothing_to_skip():
    assert decide(toy({}), tokens(64)) == [("skipped", "64 tokens are a single block of 64")]
    assert decide(toy({}), tokens(65)) == [("eligible", "")]


def test_enable_gqa_with_equal_head_counts_is_ordinary_attention():
    assert decide(toy({"enable_gqa": True}), tokens()) == [("eligible", "")]


def test_scale_given_as_a_number_is_kept_and_as_a_computed_value_refused():
    class Learned(ToyAttention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            q = heads(self.to_q(x))
            return (
                F.scaled_dot_product_attention(q, q, q, scale=x.shape[1] ** -0.5).transpose(1, 2).flatten(2)
            )

    rewriting = Rewriting(SMALL)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(ToyModel(Learned()), backend=rewriting, dynamic=True)(tokens())
        torch._dynamo.reset()
        torch.compile(toy({"scale": 0.5}), backend=rewriting)(tokens())
    symbolic, constant = (ctx.sites[0] for ctx in rewriting.contexts)
    assert (symbolic.status, symbolic.reason) == ("skipped", "the softmax scale is computed in the graph")
    assert (constant.status, constant.scale) == ("rewritten", 0.5)


def test_float32_queries_under_autocast():
    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(x)

    model = ToyModel(Inner(lambda x: (heads(x), heads(x) + 1, heads(x))))
    gm = capture(run, tokens())
    ctx = PassContext(SMALL, "dynamo", PlaceholderBinding())
    find_attention_sites(gm, ctx)
    check_eligibility(gm, ctx)
    assert ctx.sites[0].reason == "autocast turns float32 queries into bfloat16 outputs"


def test_activation_checkpointing():
    class Checkpointed(ToyAttention):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=False)

    rewriting = Rewriting(SMALL)
    torch._dynamo.reset()
    model = ToyModel(Checkpointed())
    out = torch.compile(model, backend=rewriting)(tokens().requires_grad_())
    assert rewriting.contexts[0].sites[0].reason.startswith("inside a nested graph")
    assert torch.equal(out, model(tokens()))


def test_symbolic_tokens_cannot_be_exported_with_state():
    with torch.no_grad():
        program = torch.export.export(toy({}), (tokens(),), dynamic_shapes=({1: Dim("n", min=65, max=999)},))
    ctx = rewrite(program.module(), dialect="export")
    assert ctx.sites[0].reason.startswith("symbolic token count")


def test_a_smaller_video_recompiles_and_stays_dense():
    rewriting = Rewriting(dataclasses.replace(SMALL, min_tokens=150))
    torch._dynamo.reset()
    model = toy({})
    compiled = torch.compile(model, backend=rewriting, dynamic=True)
    with torch.no_grad():
        for count in (200, 300, 100):
            torch.testing.assert_close(compiled(tokens(count)), model(tokens(count)))
    assert [ctx.sites[0].status for ctx in rewriting.contexts] == ["rewritten", "skipped"]


def test_dense_layers_count_self_attention_in_graph_order():
    config = dataclasses.replace(SMALL, dense_layers=(1,), strict=True)
    model = toy({}, {"context": True}, {}, {})
    gm = capture(model, tokens(), tokens(30))
    ctx = rewrite(gm, config)
    assert [site.status for site in ctx.sites] == ["rewritten", "skipped", "skipped", "rewritten"]
    assert ctx.sites[2].reason == "kept dense by option dense_layers"
    assert [site.index for site in ctx.sites] == [0, None, None, 1]


def test_dense_layers_beyond_the_graph():
    with pytest.raises(OptionError, match="found 2, 7; wanted indices below 2"):
        decide(toy({}, {}), tokens(), config=dataclasses.replace(SMALL, dense_layers=(0, 2, 7)))


def test_strict_raises_for_self_attention_only():
    strict = dataclasses.replace(SMALL, strict=True)
    cross = toy({}, {"context": True})
    assert decide(cross, tokens(), tokens(30), config=strict)[0] == ("eligible", "")
    with pytest.raises(UnsupportedSiteError, match="blocks.1.*found causal attention"):
        decide(toy({}, {"is_causal": True}), tokens(), config=strict)


def test_both_dialects_decide_alike():
    model = toy({}, {"is_causal": True}, {"attn_mask": mask}, {"dropout_p": 0.1}, {"scale": 0.3})
    live = rewrite(capture(model, tokens()))
    exported = rewrite(export(model, tokens()), dialect="export")
    assert [(s.name, s.status, s.reason, s.scale) for s in live.sites] == [
        (s.name, s.status, s.reason, s.scale) for s in exported.sites
    ]
